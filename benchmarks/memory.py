"""Device memory while something runs."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

GIB = 1 << 30


@contextmanager
def sampled_memory(devices: Sequence[jax.Device], seconds: float = 0.005) -> Iterator[list[float]]:
    """The most GiB that each device has in use while the block runs, in a list that is filled at its end.

    The allocator's own peak is that of the whole process. A program's temporary memory is one allocation,
    which it holds as long as it runs, so that looking every few milliseconds finds it. Empty on a CPU.

    Args:
        devices: that are looked at.
        seconds: between two looks.
    """
    peaks, done, result = [0] * len(devices), threading.Event(), []

    def look() -> None:
        while True:
            for number, device in enumerate(devices):
                peaks[number] = max(peaks[number], device.memory_stats()["bytes_in_use"])
            if done.wait(seconds):
                return

    if devices[0].memory_stats() is None:
        yield result
        return
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
        result.extend(round(peak / GIB, 2) for peak in peaks)

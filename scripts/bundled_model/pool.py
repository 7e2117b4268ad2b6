"""Rendered samples in shared memory: worker processes draw ahead of the accelerator."""

import multiprocessing
import queue
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bundled_model.conversations import PROMPTS
from vlmlora.demo.printed_text import MAX_LENGTH, MAX_WIDTH, MIN_WIDTH, printed_sample
from vlmlora.demo.text_image import CELL, TextImage

SIZES = tuple(
    (height, width)
    for height, widest in ((32, MAX_WIDTH), (48, MAX_WIDTH // 2), (64, MAX_WIDTH // 2))
    for width in range(MIN_WIDTH, widest + 1, CELL)
)
"""Height and width of every picture that the renderer makes."""
PIXEL_BYTES = 3 * max(height * width for height, width in SIZES)
NUM_CONVERSATIONS = 2 * len(PROMPTS)
"""Each prompt without a system message, then each with one."""
RECORD = np.dtype(
    [
        ("pixels", np.uint8, PIXEL_BYTES),
        ("size", np.uint8),
        ("conversation", np.uint8),
        ("answer", np.uint16, MAX_LENGTH),
        ("answer_length", np.uint8),
    ]
)
"""One sample: RGB bytes row by row, index into `SIZES`, conversation, token ids of the text, their number."""


def record_of(sample: TextImage, conversation: int, tokenizer: Tokenizer) -> np.void:
    """A sample as a scalar of type `RECORD`."""
    record = np.zeros((), RECORD)
    flat = sample.image.reshape(-1)
    record["pixels"][: flat.size] = flat
    record["size"] = SIZES.index(sample.image.shape[:2])
    record["conversation"] = conversation
    ids = tokenizer.encode(sample.text, add_special_tokens=False).ids
    record["answer"][: len(ids)] = ids
    record["answer_length"] = len(ids)
    return record


def draw_records(
    seed: int, start: int, count: int, fonts: Sequence[Path], tokenizer: Tokenizer, *, held_out: bool = False
) -> np.ndarray:
    """Samples `start` to `start + count` of the stream `seed`, as an array of `RECORD`.

    Held-out samples are all asked the first prompt without a system message. In training that is every second
    one; the rest is spread over the other conversations.
    """
    records = np.zeros(count, RECORD)
    for i in range(count):
        index = start + i
        conversation = 0 if held_out or index % 2 == 0 else (index // 2) % NUM_CONVERSATIONS
        sample = printed_sample(seed, index, fonts, held_out=held_out)
        records[i] = record_of(sample, conversation, tokenizer)
    return records


class SamplePool:
    """A ring of rendered samples that worker processes fill, and then draw anew, chunk by chunk.

    Use it as a context manager.

    Args:
        fonts: Fonts to render with.
        tokenizer_file: The model's `tokenizer.json`.
        scratch: Folder for the file that the processes share; one in memory, such as /dev/shm, is fastest.
        capacity: Samples in the ring.
        chunk: Samples that a worker draws at a time.
        workers: Number of processes.
        seed: Names the stream of samples.

    Raises:
        OSError: If `scratch` has too little room.

    Attributes:
        rendered: Samples drawn so far.
    """

    def __init__(
        self,
        fonts: Sequence[Path],
        tokenizer_file: Path,
        scratch: Path,
        *,
        capacity: int,
        chunk: int,
        workers: int,
        seed: int,
    ):
        self.chunk = chunk
        self.num_chunks = max(2, capacity // chunk)
        # Chunks at the workers, waiting ones included, so that none is idle between two calls of `refresh`.
        in_flight = min(self.num_chunks // 2, 4 * workers)
        self._most_ready = self.num_chunks - in_flight
        self.rendered = 0
        needed, free = self.num_chunks * chunk * RECORD.itemsize, shutil.disk_usage(scratch).free
        if needed > free:
            raise OSError(
                f"{scratch} has {free / 1e9:.1f} GB free and needs {needed / 1e9:.1f}; "
                "choose another folder or a smaller capacity"
            )
        self._folder = tempfile.TemporaryDirectory(dir=scratch)
        file = Path(self._folder.name) / "samples"
        self._records = np.memmap(file, RECORD, "w+", shape=(self.num_chunks, chunk))
        self._ready: list[int] = []
        self._next_start = 0
        # Not forked from this process, which may have JAX's threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bundled_model.pool"])
        self._tasks, self._done = context.Queue(), context.Queue()
        arguments = (file, self._records.shape, self._tasks, self._done, tuple(fonts), tokenizer_file, seed)
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]

    def __enter__(self) -> "SamplePool":
        for worker in self._workers:
            worker.start()
        for chunk in range(self.num_chunks):
            self._submit(chunk)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()
        self._tasks.cancel_join_thread()
        self._folder.cleanup()

    def _submit(self, chunk: int) -> None:
        self._tasks.put((chunk, self._next_start))
        self._next_start += self.chunk

    def refresh(self, *, wait_for: int = 1) -> None:
        """Takes in finished chunks; once enough are ready, has the oldest one drawn anew for each.

        Args:
            wait_for: Block until this many chunks are ready.

        Raises:
            RuntimeError: If a worker has died.
        """
        wait_for = min(wait_for, self._most_ready)
        while True:
            try:
                self._ready.append(self._done.get(timeout=1 if len(self._ready) < wait_for else 0.001))
            except queue.Empty:
                if not all(worker.is_alive() for worker in self._workers):
                    raise RuntimeError("a rendering worker has died; its traceback is above") from None
                if len(self._ready) >= wait_for:
                    return
                continue
            self.rendered += self.chunk
            if len(self._ready) > self._most_ready:
                self._submit(self._ready.pop(0))

    def sample(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """`batch` records drawn at random from the chunks that are ready."""
        chunks = np.asarray(self._ready)[rng.integers(len(self._ready), size=batch)]
        return self._records[chunks, rng.integers(self.chunk, size=batch)]


def _work(
    file: Path,
    shape: tuple[int, int],
    tasks: multiprocessing.Queue,
    done: multiprocessing.Queue,
    fonts: Sequence[Path],
    tokenizer_file: Path,
    seed: int,
) -> None:
    records = np.memmap(file, RECORD, "r+", shape=shape)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    while True:
        chunk, start = tasks.get()
        records[chunk] = draw_records(seed, start, shape[1], fonts, tokenizer)
        done.put(chunk)

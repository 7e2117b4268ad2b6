"""Start the processes of a run on this machine."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port(candidates=(0,)):
    """A TCP port that nothing listened on a moment ago; 0 leaves the choice to the system."""
    for candidate in candidates:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", candidate))
            return listener.getsockname()[1]
    raise OSError("every port is in use")


@contextmanager
def start(module, count, *arguments, environment=lambda index: {}):
    """``python -m module INDEX COUNT PORT *arguments``, `count` times; kills what still runs at the end."""
    port = free_port()
    shared = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
        # They run little of what they compile.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (index, count, port, *arguments))],
            cwd=ROOT,
            env={**shared, **environment(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def says(process, line):
    """Whether the process writes `line`, among others, before it ends."""
    return f"{line}\n" in process.stdout


def ended(process, *, within):
    """What the process wrote to stderr until it ended by itself, within so many seconds."""
    return process.communicate(timeout=within)[1]

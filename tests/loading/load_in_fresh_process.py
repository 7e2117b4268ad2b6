"""Loads a checkpoint where torch cannot be imported, and prints the model's bytes and the peak of memory.

Run as ``python load_in_fresh_process.py DIRECTORY [nf4]``.
"""

import json
import re
import sys
import threading
from pathlib import Path

sys.modules["torch"] = None  # As if it were not installed.

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from vlmlora.models.loading import load_model, read_config  # noqa: E402


def anonymous_bytes() -> int:
    """Memory of this process that is not the pages of a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(directory: str, quantize: str | None = None) -> None:
    """Load, and watch the memory meanwhile."""
    config = read_config(directory)
    jax.block_until_ready(jax.numpy.zeros(8))
    start = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(directory, config, dtype="bfloat16", quantize=quantize)
    done.set()
    thread.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    print(json.dumps({"model": size, "peak": peak - start}))


main(*sys.argv[1:])

"""Loads a checkpoint where torch cannot be imported, and prints the model's bytes and the peak of memory.

Run as ``python load_in_fresh_process.py DIRECTORY``: once as it is stored, once as NF4.
"""

import gc
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


def load(directory: str, quantize: str | None) -> dict[str, int]:
    """The bytes of the model, and by how much memory grew at most."""
    config = read_config(directory)
    gc.collect()
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
    return {"model": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))), "peak": peak - start}


print(json.dumps({str(quantize): load(sys.argv[1], quantize) for quantize in (None, "nf4")}))

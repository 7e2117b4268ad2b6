"""One of two processes that load a checkpoint on a mesh of both's devices; prints memory as JSON.

Run as ``python load_in_two_processes.py DIRECTORY ADDRESS NUMBER``: first as it is stored, then as NF4.
"""

import gc
import json
import re
import sys
import threading
from pathlib import Path

import jax

directory, address, number = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, int(number))

from flax import nnx  # noqa: E402

from vlmlora.distributed import make_mesh, parameter_shardings  # noqa: E402
from vlmlora.models.loading import load_model, read_config  # noqa: E402
from vlmlora.models.registry import family_of  # noqa: E402


def anonymous_bytes() -> int:
    """Memory of this process that is not the pages of a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load(quantize: str | None) -> dict:
    """The bytes of the model and of each device, and by how much memory grew at most."""
    config = read_config(directory)
    family = family_of(config)
    shardings = parameter_shardings(family.model(config, dtype="bfloat16"), family, make_mesh(fsdp=4))
    gc.collect()
    start = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    module = load_model(directory, config, dtype="bfloat16", quantize=quantize, shardings=shardings)
    done.set()
    thread.join()
    leaves = jax.tree.leaves(nnx.state(module))
    held = [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(2)]
    return {"model": sum(leaf.nbytes for leaf in leaves), "devices": held, "peak": peak - start}


print(json.dumps({str(quantize): load(quantize) for quantize in (None, "nf4")}))

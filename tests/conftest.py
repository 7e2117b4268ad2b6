"""Shape and type annotations of the library are checked at every call that the tests make."""

import gc
import os
from pathlib import Path

from jaxtyping import install_import_hook

# Imports and traces make millions of objects that stay. A collection looks through all of them and frees few.
gc.set_threshold(100_000, 50, 100)

# A program is compiled as one piece: the tests' are tiny, and the other core has a worker of its own.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"

# Compiled programs are kept for the other worker, for processes that tests start, and for the next run, since
# nearly half of the time goes into compiling. `python -m pytest --cache-clear` drops them.
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

# Before anything imports the packages, so that their functions are the checked ones.
install_import_hook(["vlmlora", "vlmlora_kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_finish(session):
    """What is imported by now stays to the end: no collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """The oracles run on small shapes, where threads cost more than they give."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _quick_compilation():
    """On a CPU, programs are compiled without the passes that make code fast and change no result.

    Shapes are tiny and compilation is what the tests wait for. The notebooks and the demo run in processes of
    their own, which compile with all passes, as a user's do; so do the tests on a GPU.
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)

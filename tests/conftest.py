"""Shape and type annotations of the library are checked at every call that the tests make."""

from jaxtyping import install_import_hook

# Before anything imports the packages, so that their functions are the checked ones.
install_import_hook(["vlmlora", "vlmlora_kernels"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """The oracles run on small shapes, where threads cost more than they give."""
    torch.set_num_threads(1)

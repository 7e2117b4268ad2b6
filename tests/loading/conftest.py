"""Checkpoints that several tests read."""

import pytest
import torch

from tests.loading.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory):
    """An untied bfloat16 checkpoint of one file, and its parameters."""
    directory = tmp_path_factory.mktemp("bf16")
    return directory, write_checkpoint(directory, dtype=torch.bfloat16)

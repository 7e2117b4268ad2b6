"""Two processes with two devices each load a checkpoint of several hundred megabytes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loading.test_streaming import large_checkpoint  # noqa: F401

PROGRAM = Path(__file__).with_name("load_in_two_processes.py")


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_model(large_checkpoint):  # noqa: F811
    """Their devices are the host's memory: what a process grows by is its part, and what is on its way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    programs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, large_checkpoint, address, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for program in programs:
        out, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
        found = json.loads(out.splitlines()[-1])
        for mode in found.values():
            # A quarter each, but for norms and biases.
            assert all(held < 0.26 * mode["model"] for held in mode["devices"])
        dense = found["None"]
        assert dense["model"] > 3.8e8
        # Half of the model is 192 MB; a process that held all of it would grow by 383 MB at least.
        assert dense["peak"] < 0.85 * dense["model"], found
        print(found)

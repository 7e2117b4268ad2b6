"""Runs the files ``eight_*.py`` beside this one in a process that has eight virtual devices.

The rest of the suite runs on one device, whose number a process fixes when JAX starts. So pytest does not
collect those files by itself; run one by hand as

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest -n 0 tests/distributed/eight_*.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("eight_*.py"))
# A file that is slow as a whole needs no process to find that nothing is selected.
PARTLY_SHORT = [file for file in FILES if "\npytestmark = pytest.mark.slow\n" not in file.read_text()]
# No test was selected; pytest's exit status 5.
NOTHING_SELECTED = 5


def run(files: list[Path], marks: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", marks, "--durations=0"]
    command += map(str, files)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    print(done.stdout)
    assert done.returncode in (0, NOTHING_SELECTED), done.stdout + done.stderr


def test_on_eight_devices():
    run(PARTLY_SHORT, "not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_eight_devices_at_length(file):
    run([file], "slow")


def test_no_file_is_left_out():
    assert FILES

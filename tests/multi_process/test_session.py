"""Processes find each other as JAX does it, and a process that fails ends the run with the reason."""

import os
import random

import pytest

from tests.multi_process.processes import ended, free_port, start
from vlmlora import multi_process

# JAX takes the port from the number of the job, modulo 2¹².
PORTS = range(65535 - 2**12 + 1, 65536)


def explicit():
    return lambda index: {}


def slurm():
    job = 3 * 2**12 + free_port(random.sample(PORTS, 50)) - PORTS[0]
    return lambda index: {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def open_mpi():
    job = free_port(random.sample(PORTS, 50)) - PORTS[0]
    return lambda index: {
        "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(explicit, marks=pytest.mark.slow),
        slurm,
        pytest.param(open_mpi, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_the_run_with_its_reason(settings):
    with start("tests.multi_process.fail", 2, settings.__name__, environment=settings()) as processes:
        survivor, failed = (ended(process, within=60) for process in processes)
    assert "OSError: the data are gone" in failed
    assert "process 1 of 2 failed with OSError, and ends the run" in failed
    assert processes[1].returncode == 1
    assert "stopped sending heartbeats):\n1\n" in survivor
    assert processes[0].returncode not in (0, None)
    # Which host and process a number stands for is in the log.
    assert f"process 1 of 2 is {os.uname().nodename}, pid {processes[1].pid}, 2 × cpu" in survivor


def test_settings_that_are_missing_are_named(monkeypatch):
    for variable in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=r"found none of SLURM.*pass coordinator_address, num_pro"):
        multi_process.initialize()
    with pytest.raises(ValueError, match=r"found none of SLURM.*pass process_id"):
        multi_process.initialize("localhost:1234", 2)
    with pytest.raises(ValueError, match="process_id=3 of num_processes=2"):
        multi_process.initialize("localhost:1234", 2, 3)

"""One training run in several processes, on one machine or many, through JAX's own runtime.

Every process runs the same program. Arrays are global: each process holds the shards of its own devices, and
a jitted function runs in all of them together (https://docs.jax.dev/en/latest/multi_process.html).
`vlmlora.distributed` makes the mesh of all processes' devices and puts model and batches on it.
"""

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from vlmlora.nn.variables import Trainable

logger = logging.getLogger(__name__)

_ENVIRONMENTS = (
    ("SLURM", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")),
    ("Open MPI", ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ("Kubernetes", ("KUBERNETES_SERVICE_HOST",)),
)
_NAME_BYTES = 256


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 60,
    shutdown_timeout: int = 300,
) -> None:
    """Join the run's processes; call it before anything else that uses JAX.

    What is None is read from SLURM, Open MPI or Kubernetes, as `jax.distributed.initialize` does it.

    Args:
        coordinator_address: ``host:port`` of process 0, the same in every process.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        local_device_ids: GPUs that this process uses. None: under SLURM and Open MPI the one with the number
            of the process on its machine, otherwise all.
        initialization_timeout: seconds until all processes must have joined. One that waits longer is ended.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead, which ends all
            others with a message that names it.
        shutdown_timeout: seconds that a process which is done waits for the others at its end.

    Raises:
        ValueError: no environment was found and the settings are not complete, or they contradict each other.
        RuntimeError: JAX has been used already.
    """
    environment = _environment()
    settings = {
        "coordinator_address": coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in settings.items() if value is None]
    if missing and environment is None:
        raise ValueError(
            "cannot join the run's processes: found none of SLURM, Open MPI and Kubernetes; "
            f"pass {', '.join(missing)}"
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} of num_processes={num_processes}: they count from 0")
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    patience = threading.Timer(
        min(30.0, initialization_timeout / 2),
        lambda: logger.warning(
            "%s still waits for all processes to meet at %s, and ends after %d s. Each must be started with "
            "the same address and number of processes, process 0 on the host of that address, and its port "
            "must be reachable",
            who,
            coordinator_address or f"the address that {environment} gives",
            initialization_timeout,
        ),
    )
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **settings,
            local_device_ids=local_device_ids,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=shutdown_timeout,
        )
    except (ValueError, TypeError) as error:
        hint = f"; pass {', '.join(missing)}" if missing else ""
        if environment == "Kubernetes":
            hint += " or install the package kubernetes, with which JAX asks the cluster"
        raise ValueError(f"cannot join the run's processes: {error} (found {environment}){hint}") from error
    finally:
        patience.cancel()
    for index, name in enumerate(_names_of_processes()):
        logger.info("process %d of %d is %s", index, jax.process_count(), name)


@contextmanager
def session(*args: Any, heartbeat_timeout: int = 60, **kwargs: Any) -> Iterator[None]:
    """`initialize`, and at the end take leave of the other processes.

    When the body fails, this process prints the error and ends at once with status 1, rather than to wait
    for the others, which then end too. A failed collective operation is mostly the consequence of another
    process's end: the process then waits until the runtime says which one it was, `heartbeat_timeout` at
    most.

    Args:
        args, heartbeat_timeout, kwargs: as `initialize` takes them.
    """
    initialize(*args, heartbeat_timeout=heartbeat_timeout, **kwargs)
    try:
        yield
    except SystemExit as leave:
        if leave.code in (None, 0):
            jax.distributed.shutdown()
            raise
        _leave(f"left with {leave.code!r}")
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            sys.stderr.write(
                f"process {jax.process_index()} could not go on with the others; waits up to "
                f"{heartbeat_timeout + 10} s to learn whether one of them has died\n"
            )
            sys.stderr.flush()
            time.sleep(heartbeat_timeout + 10)  # The runtime ends this process as soon as it knows.
        _leave(f"failed with {type(error).__name__}")
    else:
        jax.distributed.shutdown()


def _leave(why: str) -> None:
    sys.stderr.write(f"process {jax.process_index()} of {jax.process_count()} {why}, and ends the run\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving through the interpreter's end would wait for processes that wait for this one.
    os._exit(1)


def _environment() -> str | None:
    for name, variables in _ENVIRONMENTS:
        if all(variable in os.environ for variable in variables):
            return name
    return None


def _names_of_processes() -> list[str]:
    """Host, process number and devices of each process; a collective operation, the first of the run."""
    devices = jax.local_devices()
    name = f"{socket.gethostname()}, pid {os.getpid()}, {len(devices)} × {devices[0].device_kind}"
    encoded = np.frombuffer(name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(encoded)).reshape(-1, _NAME_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered.astype(np.uint8)]


def with_whole_adapters(module: nnx.Module) -> nnx.Module:
    """The module, with what is trainable whole in every process; all processes call it."""
    if jax.process_count() == 1:
        return module

    def whole(array: jax.Array) -> np.ndarray:
        if not (array.is_fully_addressable or array.is_fully_replicated):
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    graphdef, trainable, frozen = nnx.split(module, Trainable, ...)
    return nnx.merge(graphdef, jax.tree.map(whole, trainable), frozen)


def on_first_process(write: Callable[[], None]) -> None:
    """Call `write` in the first process; the others wait until it is done."""
    if jax.process_index() == 0:
        write()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("on_first_process")

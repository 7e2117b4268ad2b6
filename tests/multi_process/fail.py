"""Join a run as its environment says, or by the arguments; then one process fails, which others wait for.

python -m tests.multi_process.fail PROCESS PROCESSES PORT explicit|slurm|open_mpi
"""

import logging
import sys

import jax
import numpy as np

from vlmlora.distributed import make_mesh, place_batch
from vlmlora.multi_process import session

if __name__ == "__main__":
    process_id, num_processes = int(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level=logging.INFO)
    jax.config.update("jax_num_cpu_devices", 2)
    explicit = sys.argv[4] == "explicit"
    settings = (f"127.0.0.1:{sys.argv[3]}", num_processes, process_id) if explicit else ()
    with session(*settings, initialization_timeout=60, heartbeat_timeout=3):
        assert (jax.process_index(), jax.process_count()) == (process_id, num_processes)
        mesh = make_mesh()
        local = {"input_ids": np.full((2, 3), 1 + process_id), "position_ids": np.ones((3, 2, 3), np.int32)}
        batch = place_batch(local, mesh)
        assert batch["input_ids"].shape == (4, 3)
        assert batch["position_ids"].shape == (3, 4, 3)
        total = jax.jit(lambda batch, weight: weight * batch["input_ids"].sum())
        weight = np.float32(2)
        assert float(total(batch, weight)) == 2 * 3 * 2 * (1 + 2)
        refused = ""
        try:
            place_batch({"input_ids": np.ones((1, 3), np.int32)}, mesh)
        except ValueError as error:
            refused = str(error)
        assert "has 2 rows on axis 0, which do not divide among data=1 × fsdp=4" in refused
        if process_id == 1:
            raise OSError("the data are gone")
        while True:
            float(total(batch, weight))

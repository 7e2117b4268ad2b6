"""Train the bundled model in one of several processes of two CPU devices each; then go on until killed.

python -m tests.multi_process.train_bundled_model PROCESS PROCESSES PORT DIRECTORY AXIS
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from PIL import Image

from vlmlora.data.loader import make_batches
from vlmlora.demo.handwriting import bundled_model
from vlmlora.distributed import make_mesh
from vlmlora.fast_vision_model import FastVisionModel
from vlmlora.multi_process import session
from vlmlora.training.loop import fit
from vlmlora.training.loss import make_loss_fn
from vlmlora.training.state import Checkpoints
from vlmlora.training.step import init_train_state, make_train_step

SAMPLES, BATCH_SIZE, EPOCHS, STEPS, HEARTBEAT = 10, 8, 2, 4, 5


class Conversations:
    """Conversations over none to two pictures of several sizes; remembers which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.read.append(index)
        rng = np.random.default_rng(index)
        pictures = [
            Image.fromarray(rng.integers(0, 256, (32, 32 + 16 * (index % 4), 3)).astype(np.uint8))
            for _ in range(index % 3)
        ]
        question = [{"type": "image", "image": picture} for picture in pictures]
        question.append({"type": "text", "text": "?" * (1 + index % 2)})
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": str(1000 + 7 * index)}]},
        ]


def parts(mesh=None):
    """The model with adapters that drop out, its processor, and a step; on a mesh if one is given."""
    model, processor = FastVisionModel.from_pretrained(
        bundled_model(), load_in_16bit=True, mesh=mesh, progress=False
    )
    model = FastVisionModel.get_peft_model(
        model,
        r=2,
        lora_dropout=0.1,
        finetune_vision_layers=False,
        use_gradient_checkpointing=False,
        verbose=False,
    )
    graphdef, adapters, frozen = model.split()
    # Not Adam, which makes a step out of the rounding errors of a gradient that is zero.
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing=False), optimizer)
    return model, processor, step, init_train_state(adapters, optimizer), frozen


def main(process_id, directory, axis):
    """Train, save, export, say so; then take steps until killed."""
    mesh = make_mesh(**{"data": 1, "fsdp": 1, axis: -1})
    model, processor, step, state, frozen = parts(mesh)
    dataset = Conversations()
    batches = make_batches(dataset, processor, batch_size=BATCH_SIZE, num_epochs=EPOCHS)
    measured, dataset.read = dataset.read, []
    with Checkpoints(directory / "checkpoints", every=3, lora_config=model.lora_config) as checkpoints:
        key = jax.random.key(5)
        state, history = fit(
            step, state, frozen, batches, total_steps=STEPS, key=key, checkpoints=checkpoints
        )
    model.update(state.adapters)
    model.save_pretrained(directory / "adapter")
    result = {"losses": history.losses, "measured": measured, "read": dataset.read}
    (directory / f"{process_id}.json").write_text(json.dumps(result))
    print("trained", flush=True)
    while True:
        state, metrics = step(state, frozen, batches[0], key)
        float(metrics["loss"])


if __name__ == "__main__":
    process_id, num_processes = int(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", 2)
    with session(
        f"127.0.0.1:{sys.argv[3]}",
        num_processes,
        process_id,
        initialization_timeout=120,
        heartbeat_timeout=HEARTBEAT,
    ):
        main(process_id, Path(sys.argv[4]), sys.argv[5])

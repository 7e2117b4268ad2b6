"""Step time and memory of QLoRA training on many GPUs, on paper: from one GPU's measured step and links.

python -m benchmarks.cost_model        # writes docs/cost_model.png and prints a table

What is assumed, and where it is likely wrong, is in docs/cost_model.md.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from vlmlora.training.loss import CHUNK_SIZE

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "train_step.json"
GIB = 1 << 30

# H100 SXM: https://www.nvidia.com/en-us/data-center/h100/ (BF16 without sparsity, HBM3; NVLink has 900 GB/s
# for both directions).
PEAK_FLOPS = 989e12
HBM_BYTES_PER_SECOND = 3.35e12
NVLINK_BYTES_PER_SECOND = 450e9
# One 400 Gb/s NDR port a GPU: https://docs.nvidia.com/dgx/dgxh100-user-guide/ (eight ConnectX-7).
INFINIBAND_BYTES_PER_SECOND = 50e9
GPUS_PER_NODE = 8
MEMORY_GIB = 80e9 / GIB

# Assumptions.
LINK_EFFICIENCY = 0.8
SECONDS_PER_HOP = 3e-6
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
RANK = 16
LABELLED = 0.25


@dataclass(frozen=True)
class Model:
    """What of a model's shape costs anything.

    Attributes:
        layers, hidden, kv_width, intermediate, vocab: of the language model.
        vision_layers, vision_hidden, vision_intermediate: of the vision tower.
        vision_matrices: matrices of its feed-forward part, 3 if gated.
        patches: that an image of one row has.
    """

    name: str
    layers: int
    hidden: int
    kv_width: int
    intermediate: int
    vocab: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_matrices: int
    patches: int

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a decoder layer."""
        d, kv, f = self.hidden, self.kv_width, self.intermediate
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def vision_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a vision layer."""
        d, f = self.vision_hidden, self.vision_intermediate
        return [(d, 3 * d), (d, d)] + [(d, f)] * self.vision_matrices

    @property
    def language_weights(self) -> int:
        """Parameters of the decoder's linear layers."""
        return self.layers * sum(i * o for i, o in self.layer_shapes)

    @property
    def vision_weights(self) -> int:
        """Parameters of the vision tower's linear layers."""
        return self.vision_layers * sum(i * o for i, o in self.vision_shapes)

    @property
    def head(self) -> int:
        """Parameters of the head, and of the embeddings again."""
        return self.vocab * self.hidden

    @property
    def adapters(self) -> int:
        """LoRA parameters on all of them."""
        return RANK * sum(
            count * sum(i + o for i, o in shapes)
            for count, shapes in (
                (self.layers, self.layer_shapes),
                (self.vision_layers, self.vision_shapes),
            )
        )


# Shapes from the models' config.json. The image is one of 448×448, of which Llama makes one tile of 560×560.
MODELS = (
    Model("Qwen2.5-VL-7B", 28, 3584, 512, 18944, 152064, 32, 1280, 3420, 3, 1024),
    Model("Llama-3.2-11B-Vision", 40, 4096, 1024, 14336, 128256, 40, 1280, 5120, 2, 1601),
    Model("Qwen2.5-VL-72B", 80, 8192, 1024, 29568, 152064, 32, 1280, 3456, 3, 1024),
)


@dataclass(frozen=True)
class MeshSize:
    """Sizes of the axes, `tensor` innermost: its GPUs are neighbours."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def gpus(self) -> int:
        """How many there are."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        compute: seconds of computation.
        communication: seconds of collective operations; none of it is hidden behind computation.
        memory_gib: of one GPU.
        tokens_per_second: of one GPU, text and image tokens of the rows.
    """

    compute: float
    communication: float
    memory_gib: float
    tokens_per_second: float


def flops(model: Model, rows: int, tokens: int) -> float:
    """Operations of a step: forward, once more for gradient checkpointing, and the inputs' gradients.

    A frozen weight gets no gradient, so that a multiplication by it counts 2 × 3; one by an adapter 2 × 4.
    """
    text, patches = rows * tokens, rows * model.patches
    linear = 6 * (model.language_weights * text + model.vision_weights * patches)
    head = 6 * model.head * text * LABELLED
    adapters = 8 * model.adapters * text  # The vision tower's see as many patches, about.
    # Two products over half of the square; the backward pass takes 2.5 times the forward pass.
    attention = (2 + 2.5) * 2 * model.layers * rows * tokens**2 * model.hidden
    return linear + head + adapters + attention


def decode_seconds(model: Model) -> float:
    """Seconds to decode every NF4 weight to bfloat16 three times, bound by memory."""
    weights = model.language_weights + model.vision_weights
    return 3 * weights * (NF4_BYTES + 2) / HBM_BYTES_PER_SECOND


def efficiency() -> float:
    """Share of the peak that the measured step with the most tokens reaches, decoding set apart."""
    model = MODELS[0]
    most = max(json.loads(MEASURED.read_text())["work"], key=lambda work: work["rows"] * work["tokens"])
    seconds = most["step_seconds"] - decode_seconds(model)
    return flops(model, most["rows"], most["tokens"]) / seconds / PEAK_FLOPS


def bandwidth(size: int, stride: int) -> float:
    """Bytes a second that each GPU of a group sends and receives.

    The group has `size` members, every `stride`-th GPU. Within a node that is NVLink. Across nodes a ring
    passes through each InfiniBand port of the members that one node has.
    """
    in_node = max(1, min(size, GPUS_PER_NODE // stride))
    if in_node == size:
        return NVLINK_BYTES_PER_SECOND * LINK_EFFICIENCY
    return min(NVLINK_BYTES_PER_SECOND, in_node * INFINIBAND_BYTES_PER_SECOND) * LINK_EFFICIENCY


def gather_seconds(size_bytes: float, size: int, stride: int, times: int = 1) -> float:
    """An all-gather or a reduce-scatter over a ring, `size_bytes` in all, in so many operations."""
    if size == 1:
        return 0.0
    hops = times * (size - 1) * SECONDS_PER_HOP
    return size_bytes * (size - 1) / size / bandwidth(size, stride) + hops


def estimate(model: Model, mesh: MeshSize, rows: int, tokens: int) -> Step:
    """A step with `rows` rows of `tokens` tokens for each group of GPUs that share a batch's part.

    Args:
        model: what is trained.
        mesh: on how many GPUs.
        rows: of one member of `data` and `fsdp`; the GPUs along `tensor` work on them together.
        tokens: of a row.
    """
    compute = flops(model, rows, tokens) / mesh.tensor / (efficiency() * PEAK_FLOPS)
    compute += decode_seconds(model) / mesh.tensor
    return Step(
        compute,
        communication_seconds(model, mesh, rows, tokens),
        memory_gib(model, mesh, rows, tokens),
        rows * tokens / mesh.tensor / (compute + communication_seconds(model, mesh, rows, tokens)),
    )


def communication_seconds(model: Model, mesh: MeshSize, rows: int, tokens: int) -> float:
    """Seconds of a step's collective operations."""
    layers = model.layers + model.vision_layers
    weights = (model.language_weights + model.vision_weights) * NF4_BYTES + 2 * 2 * model.head
    gradients = 4 * model.adapters / mesh.tensor
    # fsdp: a layer's weights for the forward and for the backward pass, and the adapters and their gradients.
    fsdp = gather_seconds(2 * weights / mesh.tensor, mesh.fsdp, mesh.tensor, 2 * layers)
    fsdp += gather_seconds(2 * gradients, mesh.fsdp, mesh.tensor, 2)
    # data: an all-reduce of the adapters' gradients, which is a reduce-scatter and an all-gather.
    data = gather_seconds(2 * gradients / mesh.fsdp, mesh.data, mesh.tensor * mesh.fsdp, 2)
    # tensor: two all-reduces of a layer's output forward, again for checkpointing, and backward.
    passed = 2 * rows * (model.layers * tokens * model.hidden)
    passed += 2 * rows * model.vision_layers * model.patches * model.vision_hidden
    tensor = gather_seconds(3 * 2 * 2 * passed, mesh.tensor, 1, 3 * 2 * 2 * layers)
    return fsdp + data + tensor


def memory_gib(model: Model, mesh: MeshSize, rows: int, tokens: int) -> float:
    """GiB of one GPU: weights, adapters with gradient and two moments, and what one layer needs at a time.

    The layers' inputs lie in host memory (`use_gradient_checkpointing="unsloth"`).
    """
    share = mesh.fsdp * mesh.tensor
    weights = (model.language_weights + model.vision_weights) * NF4_BYTES + 2 * 2 * model.head
    adapters = 16 * model.adapters
    layer = 2 * sum(i * o for i, o in model.layer_shapes) / mesh.tensor
    # What the backward pass of one layer holds where it holds most: gate, up and three gradients as wide, and
    # about nine arrays of the hidden width.
    activations = 2 * rows * tokens * (5 * model.intermediate / mesh.tensor + 9 * model.hidden)
    # Scores of one chunk and their gradient, in 16 bit.
    logits = 4 * min(CHUNK_SIZE, rows * tokens) * model.vocab / mesh.tensor
    return ((weights + adapters) / share + layer + max(activations, logits)) / GIB


LAYOUTS = {
    "data": lambda gpus: MeshSize(data=gpus),
    "fsdp": lambda gpus: MeshSize(fsdp=gpus),
    "fsdp in a node × data": lambda gpus: MeshSize(data=gpus // 8, fsdp=8),
    "tensor in a node × data": lambda gpus: MeshSize(data=gpus // 8, tensor=8),
    "tensor in a node × fsdp": lambda gpus: MeshSize(fsdp=gpus // 8, tensor=8),
}
"""Ways to spread a model over a number of GPUs that is a multiple of 8."""
GPUS = tuple(2**n for n in range(3, 10))
ROWS, TOKENS = 4, 2048


def plot(file: Path) -> None:
    """Tokens a second and GPU, and memory, over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(MODELS), figsize=(13, 7), sharex=True, layout="constrained")
    for column, model in enumerate(MODELS):
        speed, memory = axes[:, column]
        for (name, mesh), style in zip(LAYOUTS.items(), ("o-", "s-", "^-", "v--", "d--"), strict=True):
            # The GPUs of a tensor group share rows: as many a GPU as elsewhere.
            steps = [estimate(model, mesh(n), ROWS * mesh(n).tensor, TOKENS) for n in GPUS]
            speed.plot(GPUS, [step.tokens_per_second for step in steps], style, label=name)
            memory.plot(GPUS, [step.memory_gib for step in steps], style, label=name)
        speed.set_title(model.name)
        speed.set_ylim(bottom=0)
        memory.axhline(MEMORY_GIB, color="grey", linestyle=":")
        memory.set_ylim(bottom=0)
        memory.set_xscale("log", base=2)
        memory.set_xticks(GPUS, [str(n) for n in GPUS])
        memory.set_xlabel("H100 GPUs, 8 a node")
    axes[0, 0].set_ylabel("tokens a second and GPU")
    axes[1, 0].set_ylabel("GiB a GPU (dotted: what there is)")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"On paper: QLoRA, NF4, r = {RANK}, {ROWS} rows × {TOKENS} tokens a GPU, no overlap")
    figure.savefig(file, dpi=110)


def table() -> str:
    """The estimates as Markdown."""
    lines = ["| model | mesh | GPUs | compute, s | communication, s | tokens/s a GPU | GiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for name, mesh in LAYOUTS.items():
            for gpus in (8, 64, 512):
                step = estimate(model, mesh(gpus), ROWS * mesh(gpus).tensor, TOKENS)
                lines.append(
                    f"| {model.name} | {name} | {gpus} | {step.compute:.2f} | {step.communication:.2f} "
                    f"| {_rounded(step.tokens_per_second):,} | {step.memory_gib:.0f} |"
                )
    return "\n".join(lines)


def _rounded(value: float) -> int:
    """To three digits."""
    return int(round(value, 2 - math.floor(math.log10(value))))


if __name__ == "__main__":
    plot(ROOT / "docs" / "cost_model.png")
    print(f"efficiency of the measured step: {efficiency():.1%}")
    print(table())

"""Where the time of a step goes: a profiler trace, summed by kind of work, pass and part of the model.

JAX's profiler writes what ran on every device as an ``.xplane.pb`` file
(https://docs.jax.dev/en/latest/profiling.html), which `jax.profiler.ProfileData` reads. A kernel bears the
name of the instruction that it computes; the compiled program says which line of Python that came from.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

CLASSES = (
    ("copy D2H", r"memcpyd2h"),
    ("copy H2D", r"memcpyh2d"),
    ("copy D2D", r"memcpyd2d|memcpyp2p|memset"),
    ("collective", r"nccl|all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"),
    ("decode", r"dequantize|nf4|fp4|int8"),
    ("attention", r"fmha|sdpa|flash|cudnn_generated"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|(^|[ _])dot|convolution"),
    ("slice, update", r"dynamic.(update.)?slice|^(loop_|input_|wrapped_)?(copy|transpose|concatenate|slice)"),
)
"""Kinds of work and what their kernels' names look like, the first that fits; the rest is elementwise."""
ELEMENTWISE = "elementwise, reduction"
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")


class Instruction(NamedTuple):
    """What the compiled program says of one instruction.

    Attributes:
        opcode: of HLO; of a custom call its target.
        phase: ``forward``, ``recompute``, ``backward`` or ``update``; ``other`` if the compiler made it.
        part: ``vision``, ``language``, ``loss``, ``optimizer`` or ``other``.
        source: the innermost line of the library that made it.
    """

    opcode: str
    phase: str
    part: str
    source: str


class Event(NamedTuple):
    """One kernel or copy.

    Attributes:
        device: on which it ran.
        name: of the kernel.
        op: of the HLO instruction; empty for one that belongs to none.
        start, end: in nanoseconds.
    """

    device: str
    name: str
    op: str
    start: float
    end: float


def trace_steps(run: Callable[[], Any]) -> list[Event]:
    """Call `run` under the profiler, wait for what it returns, and give every event of every device."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (file,) = Path(directory).rglob("*.xplane.pb")
        return list(read_events(jax.profiler.ProfileData.from_file(str(file))))


def read_events(profile: Any) -> Iterable[Event]:
    """Kernels and copies of a profile: of GPUs all that their streams did, of a CPU the instructions."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    on_gpu = bool(planes)
    for plane in planes or [plane for plane in profile.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # The others sum these up.
            for event in line.events:
                stats = {name: value for name, value in event.stats if name in ("hlo_op", "device_ordinal")}
                op = str(stats.get("hlo_op", ""))
                if not on_gpu and not op:
                    continue
                device = plane.name if on_gpu else f"CPU {stats.get('device_ordinal', 0)}"
                yield Event(device, event.name, op, event.start_ns, event.start_ns + event.duration_ns)


def read_program(hlo: str) -> dict[str, Instruction]:
    """Name → what is known of it, for every instruction of a compiled program's text."""
    frames = _StackFrames(hlo)
    found = {}
    for match in re.finditer(r"^ +(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)$", hlo, re.M):
        name, opcode, rest = match.groups()
        op_name = _search(r'op_name="([^"]*)"', rest)
        if opcode == "custom-call":
            opcode = _search(r'custom_call_target="([^"]*)"', rest) or opcode
        frame = _search(r"stack_frame_id=(\d+)", rest)
        part, source = frames.locate(int(frame) if frame else 0)
        phase = _phase(op_name)
        if phase == "update":
            part = "optimizer"
        found[name] = Instruction(f"{opcode} {op_name.rpartition('/')[0]}", phase, part, source)
    return found


def _phase(op_name: str) -> str:
    if not op_name:
        return "other"
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


class _StackFrames:
    """The tables of Python frames at the head of a program's text."""

    def __init__(self, hlo: str):
        head = hlo[: hlo.find("\n%") if "\n%" in hlo else len(hlo)]
        sections = re.split(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$", head, flags=re.M)
        tables = dict(zip(sections[1::2], sections[2::2], strict=False))

        def names(table: str) -> dict[int, str]:
            return {int(n): name for n, name in re.findall(r'^(\d+) "(.*)"$', tables.get(table, ""), re.M)}

        self._files, self._functions = names("FileNames"), names("FunctionNames")
        locations = re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
            tables.get("FileLocations", ""),
            re.M,
        )
        self._locations = {int(n): (int(file), int(function), line) for n, file, function, line in locations}
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", tables.get("StackFrames", ""), re.M
        )
        # A program's text counts parents from one more than it counts frames; the first frame has none.
        offset = int(frames[0][2]) if frames else 0
        self._frames = {int(n): (int(location), int(parent) - offset) for n, location, parent in frames}

    def locate(self, frame: int) -> tuple[str, str]:
        """Part of the model and line of the library."""
        part, source = "other", ""
        while frame in self._frames:
            location, parent = self._frames[frame]
            file, function, line = self._locations[location]
            path, name = self._files[file], self._functions[function]
            library = path.rpartition("/vlmlora/")[2] if "/vlmlora/" in path else ""
            source = source or (f"{library}:{line} {name}" if library else "")
            if part == "other":
                part = _part(name)
            frame = parent
        return part, source


def _part(function: str) -> str:
    owner = function.partition(".")[0]
    if "Vision" in owner or owner.startswith(("Patch", "Merger")):
        return "vision"
    if owner.startswith(("Text", "Decoder", "CrossAttention", "Language")) or function == "Tail.__call__":
        return "language"
    return "loss" if "cross_entropy" in owner else "other"


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def with_instructions(events: Iterable[Event], program: dict[str, Instruction]) -> list[Event]:
    """The same events, those without an instruction given the one whose name their kernel bears.

    A fusion's kernel is named after it, with an underscore for the dot.
    """
    named = []
    for event in events:
        dotted = re.sub(r"_(\d+)$", r".\1", event.name)
        op = next((name for name in (event.op, event.name, dotted) if name in program), event.op)
        named.append(event._replace(op=op))
    return named


def kind_of(event: Event, program: dict[str, Instruction]) -> str:
    """The kind of work, by the kernel's own name and by its instruction."""
    opcode = program[event.op].opcode if event.op in program else ""
    label = f"{event.name} {event.op} {opcode}".lower()
    return next((kind for kind, pattern in CLASSES if re.search(pattern, label)), ELEMENTWISE)


@dataclass(frozen=True)
class Summary:
    """Milliseconds a step, averaged over the devices.

    Attributes:
        step: from the first kernel of the traced steps to the end of the last.
        idle: of it, when a device does nothing.
        kinds: of every kind of work: the sum of its kernels, and how much of it nothing else overlaps.
        phases: sums by pass.
        parts: sums by part of the model.
        top: the kernels that take most, with how often they run.
    """

    step: float
    idle: float
    kinds: dict[str, dict[str, float]]
    phases: dict[str, float]
    parts: dict[str, float]
    top: list[dict[str, Any]]

    def table(self) -> str:
        """As text."""
        lines = [
            f"{self.step:.1f} ms a step",
            f"{'kind':24}{'ms':>9}{'share':>8}{'exposed':>10}{'kernels':>9}",
        ]
        for kind, row in sorted(self.kinds.items(), key=lambda item: -item[1]["ms"]):
            share = row["ms"] / self.step
            lines.append(f"{kind:24}{row['ms']:9.2f}{share:8.1%}{row['exposed_ms']:10.2f}{row['count']:9.0f}")
        lines.append(f"{'idle':24}{self.idle:9.2f}{self.idle / self.step:8.1%}")
        for title, sums in (("pass", self.phases), ("part", self.parts)):
            entries = sorted(sums.items(), key=lambda item: -item[1])
            lines.append(f"by {title}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in entries))
        lines.append(f"{'ms':>8}{'times':>7}{'µs each':>9}  kernel")
        for row in self.top:
            each = 1000 * row["ms"] / row["count"]
            where = f"{row['kind']}; {row['part']} {row['phase']}; {row['source']}"
            lines.append(f"{row['ms']:8.2f}{row['count']:7.0f}{each:9.1f}  {row['name'][:70]} [{where}]")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON record."""
        return {
            "step_ms": round(self.step, 2),
            "idle_ms": round(self.idle, 2),
            "kinds": {kind: {k: round(v, 3) for k, v in row.items()} for kind, row in self.kinds.items()},
            "phases_ms": {name: round(ms, 2) for name, ms in self.phases.items()},
            "parts_ms": {name: round(ms, 2) for name, ms in self.parts.items()},
            "top": [{**row, "ms": round(row["ms"], 3)} for row in self.top],
        }


def summarize(events: Sequence[Event], steps: int, program: dict[str, Instruction], top: int = 40) -> Summary:
    """Sum the events of so many steps.

    Args:
        events: from `trace_steps`.
        steps: how many of them ran.
        program: from `read_program`.
        top: how many kernels to name.

    Raises:
        ValueError: there are no events.
    """
    events = [e for e in with_instructions(events, program) if not _is_container(e, program)]
    if not events:
        raise ValueError("the trace has no kernel of any device; is the profiler's GPU plugin installed?")
    by_device = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    scale = 1e-6 / steps / len(by_device)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"ms": 0.0, "exposed_ms": 0.0, "count": 0.0})
    phases: dict[str, float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    span = idle = 0.0
    for found in by_device.values():
        labelled = [(event, kind_of(event, program)) for event in found]
        busy = _covered(found)
        span += (whole := max(e.end for e in found) - min(e.start for e in found)) * scale
        idle += (whole - busy) * scale
        for kind in {kind for _, kind in labelled}:
            kinds[kind]["exposed_ms"] += (busy - _covered([e for e, k in labelled if k != kind])) * scale
        for event, kind in labelled:
            seconds = (event.end - event.start) * scale
            where = program.get(event.op, Instruction("", "other", "other", ""))
            kinds[kind]["ms"] += seconds
            kinds[kind]["count"] += 1 / steps / len(by_device)
            phases[where.phase] += seconds
            parts[where.part] += seconds
            # A fusion is known by its number; kernels of a library by what they are.
            name = event.op if event.op in program else re.sub(r"[._]\d+$", "", event.name)
            entry = kernels[name, kind, where.part, where.phase, where.source]
            entry[0] += seconds
            entry[1] += 1 / steps / len(by_device)
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])[:top]
    keys = ("name", "kind", "part", "phase", "source")
    rows = [{**dict(zip(keys, key, strict=True)), "ms": ms, "count": n} for key, (ms, n) in ranked]
    return Summary(span, idle, dict(kinds), dict(phases), dict(parts), rows)


def _is_container(event: Event, program: dict[str, Instruction]) -> bool:
    """Whether an event only spans those of the instructions within it, as a CPU's trace has them."""
    return event.op in program and program[event.op].opcode.partition(" ")[0] in _CONTAINERS


def _covered(events: Iterable[Event]) -> float:
    """Nanoseconds during which at least one event goes on."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, end))
        end = max(end, event.end)
    return total

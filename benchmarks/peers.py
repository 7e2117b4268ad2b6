"""Unsloth, transformers + PEFT + bitsandbytes and vlmlora side by side: the same steps on one GPU.

    python -m benchmarks.random_checkpoint DIRECTORY
    python -m benchmarks.peers --checkpoint DIRECTORY --work 4x1024 2x8192 8x2048 --policy unsloth auto

Each has a process of its own, one after the other, which loads the checkpoint and takes steps on the very
same batches; vlmlora's is `benchmarks.train_step`, once for each policy, the others' `benchmarks.torch_step`.
The first six losses are recorded. They start alike and fall differently: adapters are drawn at random, and
PyTorch adds their product to a result that is rounded to bfloat16 already, in which a small update drowns.
Peak memory is that of the allocator, with loading. A peer whose packages are missing is skipped with a word.
With ``--add`` the rows of earlier runs stay, those that this one measures again excepted. Figures mean
something on an NVIDIA GPU; without one a small checkpoint (``--shrink``) and ``--peer ours hf --quant none``
show that it runs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import environment, write
from benchmarks.torch_step import NAMES, NEEDED

OURS = "vlmlora"
PEERS = ("ours", "unsloth", "hf")
TORCH_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # vlmlora's batches are made with NumPy; JAX must leave the GPU's memory alone.
    "JAX_PLATFORMS": "cpu",
}
Row = dict[str, Any]


def run_ours(arguments: argparse.Namespace, policy: str) -> Iterator[Row]:
    """The rows of `benchmarks.train_step` with one policy."""
    with tempfile.TemporaryDirectory() as directory:
        options = ["--policy", policy, "--out", str(Path(directory) / "result.json")]
        yield from _run("benchmarks.train_step", arguments, options, {})


def run_torch(arguments: argparse.Namespace, peer: str) -> Iterator[Row]:
    """The rows of a peer."""
    with tempfile.TemporaryDirectory() as directory:
        # Unsloth writes the modules that it compiles.
        environment = {**TORCH_ENVIRONMENT, "UNSLOTH_COMPILE_LOCATION": directory}
        yield from _run("benchmarks.torch_step", arguments, [], environment, peer)


def _run(
    module: str,
    arguments: argparse.Namespace,
    options: Sequence[str],
    environment: dict[str, str],
    *positional: str,
) -> Iterator[Row]:
    """What a process prints in JSON, line by line; an error last if it fails."""
    command = [sys.executable, "-m", module, *positional, "--checkpoint", str(arguments.checkpoint)]
    command += ["--quant", arguments.quant, "--r", str(arguments.r), "--steps", str(arguments.steps)]
    command += ["--work", *arguments.work, *options]
    if arguments.generate:
        command += ["--generate", str(arguments.generate), "--prompt", *arguments.prompt]
    tail = ""
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                tail = line.strip() or tail
    if process.returncode:
        yield {"error": f"exit status {process.returncode}", "last_line": tail}


def device_name() -> str:
    """Of the first NVIDIA GPU, or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "cpu"


def missing(peer: str) -> list[str]:
    """Packages that a peer needs and this machine lacks."""
    return [name for name in NEEDED.get(peer, ()) if importlib.util.find_spec(name) is None]


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of everything that was asked for, each with who measured it."""
    for peer in arguments.peer:
        if names := missing(peer):
            print(f"skipped {NAMES[peer]}: {', '.join(names)} not installed", flush=True)
            continue
        for policy in arguments.policy if peer == "ours" else [None]:
            start = time.perf_counter()
            about = {"peer": OURS if peer == "ours" else NAMES[peer], "quantization": arguments.quant}
            if policy is not None:
                about["policy"] = policy
            about["r"] = arguments.r
            rows = run_ours(arguments, policy) if peer == "ours" else run_torch(arguments, peer)
            for row in rows:
                if "load_seconds" in row:  # The head of a process's output, true of its rows.
                    about |= {name: row[name] for name in ("load_seconds", "loaded_gib") if name in row}
                    if "versions" in row:
                        about["versions"] = row["versions"]
                else:
                    yield {**about, **row}
            print(f"{about['peer']}: {time.perf_counter() - start:.0f} s", flush=True)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, by work, with their speed against Unsloth's, or the first's if it is not there."""
    lines = [f"{'work':>8} {'quant':>5} {'':38}{'step s':>8}{'tokens/s':>10}{'speed':>7}{'GiB':>7}  losses"]
    training = [row for row in rows if "tokens" in row]
    works = dict.fromkeys((row["rows"], row["tokens"], row["quantization"]) for row in training)
    for work in works:
        of_work = [row for row in training if (row["rows"], row["tokens"], row["quantization"]) == work]
        timed = [row for row in of_work if "step_seconds" in row]
        base = next((row for row in timed if row["peer"] == NAMES["unsloth"]), timed[0] if timed else None)
        for row in of_work:
            who = " ".join(str(part) for part in (row["peer"], row.get("policy")) if part is not None)
            line = f"{work[0]}x{work[1]}".rjust(8) + f" {work[2]:>5} {who:38}"
            if "step_seconds" not in row:
                lines.append(line + row.get("out_of_memory", "failed")[:60])
                continue
            speed = base["step_seconds"] / row["step_seconds"]
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            bound = "≤" if row.get("peak_is_bound") else ""
            lines.append(
                line
                + f"{row['step_seconds']:8.3f}{row['tokens_per_second']:10,}{speed:6.2f}×{bound + peak:>7}  "
                + " ".join(f"{loss:.3f}" for loss in row["losses"])
            )
    lines += [f"failed: {row}" for row in rows if "error" in row]
    return "\n".join(lines)


def key(row: Row) -> tuple[Any, ...]:
    """What a row measures."""
    names = ("peer", "policy", "quantization", "rows", "tokens", "prompt_tokens", "new_tokens")
    return tuple(row.get(name) for name in names)


def main() -> None:
    """Read the arguments, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--policy", nargs="+", default=["unsloth"], help="of vlmlora's checkpointing")
    parser.add_argument("--work", nargs="*", default=["4x1024"], help="rows x tokens")
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="that are timed, after two")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate, 2 or more; 0 for none")
    parser.add_argument("--prompt", nargs="+", default=["1x512"], help="rows x tokens of the prompts")
    parser.add_argument("--add", action="store_true", help="to the rows that the file has")
    parser.add_argument("--out", type=Path, help="benchmarks/results/peers_<model>.json if left out")
    arguments = parser.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    model = {"mllama": "llama-3.2-11b-vision", "qwen2_5_vl": "qwen2_5_vl-7b"}[config["model_type"]]
    out = arguments.out or Path(f"benchmarks/results/peers_{model}.json")
    about = {"model": model, **environment(device_name())}
    rows: dict[tuple[Any, ...], Row] = {}
    if arguments.add and out.exists():
        kept = json.loads(out.read_text())["rows"]
        rows = {key(row): row for row in kept if "error" not in row}
    for row in measure(arguments):
        rows[key(row)] = row
        write(out, {**about, "rows": list(rows.values())})
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()

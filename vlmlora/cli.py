"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import vlmlora

app = typer.Typer(
    help=vlmlora.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False
)


def _print_version(value: bool) -> bool:
    if value:
        print(vlmlora.__version__)
        raise typer.Exit
    return value


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA and QLoRA fine-tuning of vision-language models in JAX."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report, pictures and adapter go.")] = Path(
        "vlmlora-demo"
    ),
) -> None:
    """Teach the bundled model to read handwritten digits through LoRA, and show it."""
    from vlmlora.demo import run

    with _errors_in_one_line("demo"):
        run(out)


@app.command(name="inspect")
def inspect_command(
    path: Annotated[str, typer.Argument(help="A model's directory, or its repository on the hub.")],
    target_modules: Annotated[
        str | None,
        typer.Option(help='Names with commas between them, "all-linear", or a regular expression.'),
    ] = None,
    r: Annotated[int, typer.Option("--r", help="Rank.")] = 16,
    lora_alpha: Annotated[float, typer.Option(help="Scale of the adapters, times r.")] = 16,
    finetune_vision_layers: Annotated[bool, typer.Option(help="Adapt the vision tower.")] = True,
    finetune_language_layers: Annotated[bool, typer.Option(help="Adapt the language model.")] = True,
    finetune_attention_modules: Annotated[bool, typer.Option(help="Adapt attention projections.")] = True,
    finetune_mlp_modules: Annotated[bool, typer.Option(help="Adapt feed-forward projections.")] = True,
    finetune_projector: Annotated[bool, typer.Option(help="Adapt the projector.")] = False,
    finetune_last_n_layers: Annotated[
        int | None, typer.Option(help="Of the language model's layers only the last n.")
    ] = None,
    layers_to_transform: Annotated[
        str | None, typer.Option(metavar="0,1,4-7", help="Only layers with these numbers.")
    ] = None,
    layers_pattern: Annotated[
        str | None, typer.Option(help="The list of modules that layers_to_transform counts in.")
    ] = None,
    exclude_modules: Annotated[
        str | None, typer.Option(help="Never these; names or a regular expression.")
    ] = None,
    rank_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=R", help="A rank of their own. May be repeated.")
    ] = None,
    alpha_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=ALPHA", help="An alpha of their own.")
    ] = None,
    bias: Annotated[str, typer.Option(help='Biases to train: "none", "all" or "lora_only".')] = "none",
    modules_to_save: Annotated[str | None, typer.Option(help="Modules to train in full; names.")] = None,
    trainable_token_indices: Annotated[
        str | None, typer.Option(metavar="0,1,4-7", help="Tokens whose embeddings train.")
    ] = None,
    use_dora: Annotated[bool, typer.Option(help="Train magnitudes too (DoRA).")] = False,
    lora_bias: Annotated[bool, typer.Option(help="Give B a bias.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows of the batch in the memory plan's totals.")] = 2,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of each row.")] = 2048,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what get_peft_model would train and the memory it takes, from config.json alone.

    The options are the arguments of FastVisionModel.get_peft_model.
    """
    arguments = locals()
    options = ("path", "batch_size", "max_seq_length", "revision", "as_json")
    with _errors_in_one_line("inspect"):
        from vlmlora.inspection import inspect_model

        chosen = {name: value for name, value in arguments.items() if name not in options}
        for name in ("target_modules", "exclude_modules"):
            chosen[name] = _names_or_regex(chosen[name])
        for name in ("layers_to_transform", "trainable_token_indices"):
            chosen[name] = _numbers(name, chosen[name])
        for name, number in (("rank_pattern", int), ("alpha_pattern", float)):
            chosen[name] = _pattern(name, chosen[name], number)
        chosen["modules_to_save"] = None if modules_to_save is None else modules_to_save.split(",")
        found = inspect_model(
            path, batch_size=batch_size, max_seq_length=max_seq_length, revision=revision, **chosen
        )
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        from rich.console import Console

        Console().print(found.report())


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter's directory, or its repository on the hub.")],
    out: Annotated[Path, typer.Argument(help="Where the merged checkpoint goes.")],
    base: Annotated[
        str | None, typer.Option(help="Merge into this model instead of the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; else the 16-bit type of the base.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Size of a file beyond which another is begun.")
    ] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter.")] = None,
) -> None:
    """Merge an adapter into its base: a 16-bit checkpoint of transformers, written tensor by tensor.

    A quantised base is decoded. Given a quantised model without an adapter, this alone is done.
    """
    with _errors_in_one_line("merge"):
        from vlmlora.merging import merge_checkpoint

        if dtype not in (None, "bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={dtype!r}: it must be bfloat16, float16 or float32")
        merge_checkpoint(
            adapter, out, base=base, dtype=dtype, max_shard_size=max_shard_size, revision=revision
        )
    typer.echo(f"{out} holds the merged model")


@contextmanager
def _errors_in_one_line(command: str) -> Iterator[None]:
    """Print what the library refuses, without a traceback, and exit with 1."""
    try:
        yield
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        typer.secho(f"vlmlora {command}: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(1) from error


def _names_or_regex(text: str | None) -> str | list[str] | None:
    if text is None or text == "all-linear" or not re.fullmatch(r"[\w.,]+", text):
        return text
    return text.split(",")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """``0,1,4-7`` as a list."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None:
            raise ValueError(f"{option}={text!r}: needed numbers and ranges, such as 0,1,4-7")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def _pattern(option: str, entries: list[str] | None, number: type) -> dict[str, int | float]:
    pattern = {}
    for entry in entries or []:
        name, equals, value = entry.rpartition("=")
        try:
            pattern[name] = number(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{option}={entry!r}: needed a pattern, an equals sign and a number")
    return pattern

"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

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

    try:
        run(out)
    except (OSError, ValueError) as error:
        typer.secho(f"vlmlora demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from error

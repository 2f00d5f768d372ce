"""The Typer application; the modules beside this one add their commands to it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmflow.errors import InterruptedByUserError


class _Commands(TyperGroup):
    """The commands; one that is interrupted says so, where Typer would end it without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort) as error:
            if isinstance(error, typer.Abort):
                typer.echo(err=True)  # ends the line of the question that it came at
            raise InterruptedByUserError("interrupted", remedy="Run the same command again.") from None


app = typer.Typer(
    cls=_Commands,
    name="vlmflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Enrich an image catalog with captions, moderation labels, match scores and embeddings.

Images come from a folder, a bucket, a manifest or tar shards; results go to Delta tables. Run the same command again
and only what is due is done.

Try it without any set-up or network: `vlmflow demo`
""",
)


def _tell_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"vlmflow {version('vlmflow')}")
        raise typer.Exit


@app.callback()
def _before_commands(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version; doctor prints all."),
    ] = False,
) -> None: ...

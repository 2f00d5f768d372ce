"""The terminal that commands print to. Names, captions and messages come from outside, and are shown as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from vlmflow.views_search import printable

Result = TypeVar("Result", bound=BaseModel)


class Screen(Console):
    """A terminal on which no text draws: control characters are spelled out, and ``:dog:`` stays what it is."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, emoji=False)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Prints; see :meth:`rich.console.Console.print`.

        Lines of text are folded to the width of a terminal, and to nothing in a file or a pipe: what ``grep`` looks for
        is not torn apart, and a path stays one. Tables keep their width.
        """
        if soft_wrap is None:
            soft_wrap = not self.is_terminal and all(isinstance(thing, str | Text) for thing in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def on_broken_pipe(self) -> None:
        """Drops the rest where whoever read it has seen enough: Rich would end the command with `verify`'s exit code.

        What it has done is done, and its exit code says so.
        """
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self.stderr else sys.stdout).fileno())

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders every string that is printed or put into a table, lines apart; see :class:`rich.console.Console`."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def tell(message: str, colour: str) -> None:
    """Writes one line to standard error, coloured on a terminal unless NO_COLOR is set (https://no-color.org).

    A dumb terminal would show the codes of colours, the one that ends them too.
    """
    line = printable(" ".join(message.split()))
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    typer.echo(line if is_plain else typer.style(line, fg=colour), err=True)


def emit(text: str, *, end: str = "\n") -> None:
    """Writes data that programs read to standard output: UTF-8, whatever the locale, and every letter as it is."""
    text += end
    # What takes text alone, such as an io.StringIO that output is redirected to, has no encoding that could change it.
    typer.echo(text.encode() if hasattr(sys.stdout, "buffer") else text, nl=False)


def show_result(result: Result, view: Callable[[Result, Screen], None], *, as_json: bool) -> None:
    """Prints what a command found: as JSON, for machines, or as its view shows it."""
    if as_json:
        emit(result.model_dump_json())
    else:
        view(result, Screen())

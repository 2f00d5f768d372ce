"""The command line: thin commands over the Python API.

Exit codes: 0 done (bad rows included), 1 `verify` found errors or `gate check` a regression, 2 bad input or
configuration, 3 unreconciled, over the error budget or not finished, 4 store lost or catalog changed while it was read,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading

import typer

from vlmflow.cli import (
    changes,
    convert,
    evaluate,
    explain,
    gate,
    known,
    policy,
    remoderate,
    report,
    review,
    run,
    search,
    serve,
    upkeep,
    view,
)
from vlmflow.cli.app import app
from vlmflow.cli.screen import tell
from vlmflow.errors import VlmflowError
from vlmflow.storage import MORE_OPEN_FILES
from vlmflow.threads import check_can_start

__all__ = [
    "app",
    "changes",
    "convert",
    "evaluate",
    "explain",
    "gate",
    "known",
    "main",
    "policy",
    "remoderate",
    "report",
    "review",
    "run",
    "search",
    "serve",
    "upkeep",
    "view",
]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors become one line on standard error and an exit code."""
    if threading.current_thread() is threading.main_thread():
        # What stops a job, a pod or a service sends this: the run is to be recorded as interrupted, as by Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_streams()
    if os.environ.get("COLUMNS", "").strip() == "0":  # not known, as of a terminal without a size; Rich prints nothing
        del os.environ["COLUMNS"]
    own = sys.__stdout__
    if sys.stdout is own and isinstance(own, io.TextIOWrapper) and isinstance(own.buffer, io.RawIOBase):
        # PYTHONUNBUFFERED: of what a disk takes a part of before it is full, Python drops the rest without an error.
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(own.buffer), encoding=own.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what people read; data goes past it, see vlmflow.cli.screen.emit
            stream.reconfigure(errors="backslashreplace")
    try:
        check_can_start()
        app(args=arguments)
    except VlmflowError as error:
        if "--json" in (sys.argv[1:] if arguments is None else arguments):
            told = {"event": "error", "class": type(error).__name__, "message": str(error), "remedy": error.remedy}
            typer.echo(json.dumps(told))
        message = f"vlmflow: {error}" + (f" - {error.remedy}" if error.remedy else "")
        tell(message, "red")
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        remedy = "Allow more: `ulimit -u`, in a container `--pids-limit`; then run the command again."
        tell(f"vlmflow: the system lets this process have no more threads - {remedy}", "red")
        sys.exit(2)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            tell(f"vlmflow: {error.filename or 'this process'}: too many open files - {MORE_OPEN_FILES}", "red")
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = error.filename or "standard output, or a temporary file"
        tell(f"vlmflow: {place}: {error.strerror} - Make room there, then run the command again.", "red")
        with contextlib.suppress(OSError, ValueError):  # else what is not yet written fails once more as Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


def _open_streams() -> None:
    """Puts the null device in place of standard streams that are closed, as those of a daemon may be.

    Else the next files that are opened get their numbers, those of a catalog too, and libraries write messages there.
    """
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115

"""The command line of a flow: its parameters as options, with the help that Prefect's form shows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import httpx
from prefect import Flow, State, tags
from prefect.exceptions import ParameterTypeError
from prefect.settings import (
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

from pipelines.ending import INTERRUPTED, end_within, raise_when_told
from pipelines.home import is_usable
from pipelines.named_server import check_named_server
from pipelines.ray_jobs import without_user
from vlmflow.errors import ConfigError, VlmflowError

_SERVER_START_S = 120  # of a temporary server; Prefect gives it 20, which a busy machine exceeds
_END_S = 20  # Kubernetes kills after 30


def main(flow: Flow[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Runs a flow with the parameters of a command line.

    The flow run is recorded by the Prefect server that ``PREFECT_API_URL`` names, or by a temporary one. Errors become
    one line on standard error and an exit code, as those of `vlmflow`.
    """
    raise_when_told()
    try:
        given = {name: value for name, value in vars(_parser(flow).parse_args(arguments)).items() if value is not None}
        checked = _checked(flow, given)
        patience = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: _SERVER_START_S}
        with temporary_settings(set_defaults=patience), tags("vlmflow", _module(flow)):
            _start_server()
            state: State[Any] = cast(Any, flow)(**checked, return_state=True)
        ended = None if state.is_completed() else state.result(raise_on_failure=False)
    except VlmflowError as error:
        ended = error
    except KeyboardInterrupt:
        end_within(_END_S, INTERRUPTED)
        _leave(flow, "interrupted; a job on a Ray cluster goes on, and the same command follows it again", INTERRUPTED)
    except (RuntimeError, httpx.HTTPError) as error:  # of Prefect: what the flow itself raises is in its state
        _leave(flow, f"Prefect: {without_user(str(error))}", 2)
    if isinstance(ended, VlmflowError):
        _leave(flow, f"{ended}" + (f" - {ended.remedy}" if ended.remedy else ""), ended.exit_code)
    if ended is not None:
        _leave(flow, state.message or state.name or "failed", 1)
    print(f"{flow.name}: {state.message}")


def _start_server() -> None:
    """Sees that the server that is named answers, or starts the temporary one before Prefect does: out of reach of what
    ends the flow.

    Raises:
        ConfigError: the temporary one has no folder for its database.
        FlowServerError: the server does not start, does not answer or is none.
    """
    settings = get_current_settings()
    if settings.api.url:
        check_named_server(settings.api.url)
        return
    if not settings.server.ephemeral.enabled:
        return
    if not is_usable(settings.home):
        raise ConfigError(
            f"Prefect's folder {settings.home} cannot be written to",
            remedy="Set PREFECT_HOME to a folder that can, or PREFECT_API_URL to the address of a server.",
        )
    from pipelines.temporary_server import TemporaryServer  # takes seconds to import

    TemporaryServer().start(timeout=settings.server.ephemeral.startup_timeout_seconds)


def _leave(flow: Flow[..., Any], message: str, code: int) -> NoReturn:
    print(" ".join(f"{flow.name}: {message}".split()), file=sys.stderr)
    sys.exit(code)


def _module(flow: Flow[..., Any]) -> str:
    return Path(flow.fn.__code__.co_filename).stem


def _parser(flow: Flow[..., Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{_module(flow)}",
        description=(flow.description or "").partition("Args:")[0].strip(),
    )
    schema = flow.parameters.model_dump()
    for name, about in schema["properties"].items():
        option = f"--{name.replace('_', '-')}"
        text = about.get("description", "").replace("%", "%%")
        if about.get("type") == "boolean":
            parser.add_argument(option, dest=name, action="store_true", default=None, help=text)
            continue
        is_required = name in schema.get("required", ())
        kind = _kind(about)
        parse = _PARSERS.get(kind, str)
        if kind == "object":
            text += ' As JSON, such as \'{"uri": "golden/", "accepted": "accepted.json"}\'.'
        if kind == "array":
            text += " Separated by commas."
        if (default := about.get("default")) is not None:
            text += f" Default: {default:g}." if isinstance(default, int | float) else f" Default: {default}."
        parser.add_argument(option, dest=name, required=is_required, type=parse, metavar=kind.upper(), help=text)
    return parser


def _kind(about: Mapping[str, Any]) -> str:
    """What kind of value an option takes, in a word."""
    branches = [part for part in about.get("anyOf", [about]) if part.get("type") != "null"]
    found = branches[0] if branches else about
    if "$ref" in found:
        return "object"
    return str(found.get("format") or found.get("type") or "text")


def _object(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


_PARSERS: dict[str, Any] = {"object": _object, "array": _words}


def _checked(flow: Flow[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters with their types.

    Raises:
        ConfigError: a value does not fit.
    """
    try:
        return dict(flow.validate_parameters(given))
    except ParameterTypeError as error:
        said = " ".join(str(error).split()).partition("For further information")[0]
        raise ConfigError(f"options: {said[:500]}", remedy="`--help` says what each takes.") from error

"""The Prefect server that PREFECT_API_URL names: one that is none, or does not answer, is told of before a flow."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import prefect
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_RETRY_JITTER_FACTOR, temporary_settings

from pipelines import named_server
from pipelines.command_line import main
from pipelines.nightly import nightly_enrichment
from tests.answering import answering
from tests.processes import free_port
from vlmflow.errors import FlowServerError


class Answers(BaseHTTPRequestHandler):
    """As the address says: /STATUS,STATUS/BODY/api, of which the last status stays."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        _, statuses, body, *_ = unquote(self.path).split("/")
        self.send_response(int(statuses.split(",")[: len(self.asked)][-1]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    with answering(Answers) as port:
        yield f"127.0.0.1:{port}"


def check(url: str) -> None:
    Answers.asked.clear()
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_RETRY_JITTER_FACTOR: 0}):
        named_server.check_named_server(url)


@pytest.mark.parametrize(
    ("path", "said", "remedy"),
    [
        ("/401/no", "answers 401", "PREFECT_API_AUTH_STRING"),
        ("/403/no", "answers 403", "PREFECT_API_AUTH_STRING"),
        ("/404/no", "answers 404", "PREFECT_API_URL"),
        ("/200/<html>", "is no Prefect server", "with its"),
        ("/200/{}", "is no Prefect server", "with its"),
        ('/200/"2.20.1"', "is of version 2.20.1, too far from", f"of version {prefect.__version__}"),
        ('/200/"3.4.0"', "is of version 3.4.0, too far from", f"of version {prefect.__version__}"),
    ],
)
def test_a_server_that_cannot_serve_is_named_without_its_password(
    path: str, said: str, remedy: str, place: str
) -> None:
    with pytest.raises(FlowServerError, match=said) as told:
        check(f"http://ada:hunter2@{place}{path}/api")
    assert remedy in told.value.remedy
    assert place in str(told.value)
    assert "hunter2" not in f"{told.value}{told.value.remedy}"


def test_one_that_is_being_started_is_waited_for(place: str) -> None:
    check(f'http://{place}/503,200/"3.8.8"/api')
    assert len(Answers.asked) == 2


def test_but_not_for_ever(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_server, "_PATIENCE_S", 0)
    with pytest.raises(FlowServerError, match="answers 503"):
        check(f"http://{place}/503/soon/api")


@pytest.mark.parametrize(("begin", "said"), [("http://", "cannot be reached"), ("", "is no address")])
def test_a_flow_ends_in_one_line_where_none_is(begin: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{begin}127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SystemExit) as left:
        main(nightly_enrichment, ["--job-file", "job.yaml"])
    assert left.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("nightly-enrichment: ")
    assert said in line
    assert line.count("\n") == 1

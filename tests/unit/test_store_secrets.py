"""What stores say of keys and tokens, in the tracebacks of errors that it caused."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pyarrow as pa
import pytest

from tests.answering import answering
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, StorageConfig
from vlmflow.errors import StorageAccessError, VlmflowError
from vlmflow.storage import read_bytes
from vlmflow.store_secrets import hide_secrets, without_secrets

SECRET = "5ec7e7"
ANSWER = f"""<?xml version="1.0"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>They do not match.</Message><AWSAccessKeyId>{SECRET}</AWSAccessKeyId>
<CanonicalRequest>GET
host:localhost
x-amz-security-token:{SECRET}</CanonicalRequest><Token-0>{SECRET}</Token-0></Error>"""


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("content-length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER.encode())

    do_HEAD = do_PUT = do_GET  # noqa: N815 - names of methods of HTTP


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A store that refuses everybody, and says with what they came."""
    with answering(_Refusing) as port:
        yield f"http://127.0.0.1:{port}"


def told(call: Callable[[], object], kind: type[VlmflowError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return "".join(traceback.format_exception(caught.value))


def test_the_token_of_a_session_is_in_no_traceback(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    storage = StorageConfig(endpoint=endpoint, region="here", max_retries=0, timeout_s=10)
    catalog = CatalogConfig(uri="s3://bucket/catalog", storage=storage)
    calls = (
        lambda: read_bytes("s3://bucket/policy.yaml", storage),
        lambda: Catalog.open_or_create(catalog, pa.schema([])),
    )
    for call in calls:
        text = told(call, StorageAccessError)
        assert SECRET not in text
        assert "<Code>SignatureDoesNotMatch</Code><Message>They do not match.</Message>" in text


def test_the_errors_that_caused_an_error_lose_theirs_too_round_or_not() -> None:
    first, second = (
        OSError(f"GET https://me:{SECRET}@host/a?sv=1&sig={SECRET} (no)"),
        ValueError(f"<Token>{SECRET}</Token>", 3),
    )
    first.__cause__, second.__context__ = second, first
    hide_secrets(first)
    assert str(first) == "GET https://<hidden>@host/a?<hidden> (no)"
    assert second.args == ("<Token><hidden></Token>", 3)


def test_a_text_full_of_beginnings_takes_no_longer_than_others() -> None:
    """Looked through to its end from each of them, it would take hours."""
    text = "://a" * 500_000
    assert without_secrets(f"{text}?sig={SECRET}") == f"{text}?<hidden>"

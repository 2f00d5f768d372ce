"""Messengers that send a message elsewhere, or that never answer: nobody is told, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import requests
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MattermostWebhook, SlackWebhook

from pipelines import alerts, messengers
from tests.messenger import Messenger, running_messenger

NAME = "webhook/moderation"


@pytest.fixture(params=["custom", "mattermost"])
def messenger(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Messenger]:
    monkeypatch.setattr(alerts, "time", SimpleNamespace(sleep=lambda _: None))
    with running_messenger() as server:
        port = server.server_port
        block = (
            CustomWebhookNotificationBlock(name="moderation", url=f"http://127.0.0.1:{port}/", json_data={})
            if request.param == "custom"
            else MattermostWebhook(hostname="127.0.0.1", port=port, token="t0ps3cr3t-token-0123456789")
        )
        monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: block))
        yield server


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirected_message_is_not_sent_and_goes_nowhere_else(
    messenger: Messenger, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As to a page to log in: its 200 would count as sent."""
    with running_messenger() as other:
        messenger.status, messenger.location = status, f"http://127.0.0.1:{other.server_port}/login"
        assert not alerts.send(NAME, "many more", "Run r.")
    assert (len(messenger.received), other.received) == (3, [])
    assert "nobody was told of 'many more'" in caplog.text


def test_one_that_never_answers_does_not_hold_a_flow_up(
    messenger: Messenger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or gives a byte now and then, which is within the limits of the clients."""
    monkeypatch.setattr(messengers, "_ANSWER_S", 0.05)
    messenger.may_answer.clear()
    with caplog.at_level(logging.INFO, "vlmflow"):
        assert not alerts.send(NAME, "many more", "Run r.")
    messenger.may_answer.set()
    assert f"block {NAME} failed with TimeoutError: no answer came in time" in caplog.text


SECRET = "T0SECRET"
_TO_SLACK = f"url: /services/{SECRET}/x"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            requests.exceptions.SSLError(f"{_TO_SLACK} [SSL: CERTIFICATE_VERIFY_FAILED]"),
            "its certificate is not trusted",
        ),
        (requests.exceptions.ProxyError(f"{_TO_SLACK} Tunnel connection failed: 407"), "the proxy of HTTPS_PROXY"),
        (requests.exceptions.ConnectionError(f"{_TO_SLACK} NameResolutionError(...)"), "there is no host of that name"),
        (requests.exceptions.ConnectTimeout(_TO_SLACK), "no answer came in time"),
        (requests.exceptions.ConnectionError(f"{_TO_SLACK} Connection refused"), "the connection is refused"),
        (429, "it answered 429, it takes no more messages for a while"),
        (404, "it answered 404"),
    ],
)
@pytest.mark.parametrize("kind", ["slack", "custom"])
def test_why_a_message_was_not_sent_is_told_and_its_address_is_in_no_log(
    kind: str, error: Exception | int, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "_SEND_DELAYS_S", ())
    address = f"https://hooks.slack.com/services/{SECRET}99/{SECRET}99/{SECRET}{'x' * 16}"

    def answer(*_: object, **__: object) -> requests.Response:
        logging.getLogger("urllib3.connectionpool").debug("POST %s", address)
        if isinstance(error, Exception):
            raise error
        response = requests.Response()
        response.status_code = error
        return response

    def answer_httpx(*_: object, **__: object) -> httpx.Response:
        logging.getLogger("httpx").info("HTTP Request: POST %s", address)
        if isinstance(error, Exception):
            raise httpx.ConnectError(f"{type(error).__name__} {error}")
        return httpx.Response(error, request=httpx.Request("POST", address))

    monkeypatch.setattr(requests, "request", answer)
    monkeypatch.setattr(requests, "post", answer)
    monkeypatch.setattr(httpx.Client, "request", answer_httpx)
    block = SlackWebhook(url=address) if kind == "slack" else CustomWebhookNotificationBlock(name="m", url=address)
    monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: block))
    with caplog.at_level(logging.DEBUG):
        assert not alerts.send(NAME, "many more", "Run r.")
    (line,) = [line for line in caplog.messages if "nobody was told of 'many more'" in line]
    assert f": {told}" in line
    assert SECRET not in caplog.text

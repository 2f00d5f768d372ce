"""Messengers that send a message elsewhere, or that never answer: nobody is told, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MattermostWebhook

from pipelines import alerts
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
    monkeypatch.setattr(alerts, "_ANSWER_S", 0.05)
    messenger.may_answer.clear()
    with caplog.at_level(logging.INFO, "vlmflow"):
        assert not alerts.send(NAME, "many more", "Run r.")
    messenger.may_answer.set()
    assert f"nobody was told of 'many more': block {NAME} failed with TimeoutError" in caplog.text

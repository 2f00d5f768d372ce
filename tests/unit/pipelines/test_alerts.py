"""Who is told what: through real notification blocks to a server on this machine."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MattermostWebhook
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Crashed, Failed, Running

from pipelines import alerts
from pipelines.messengers import post
from pipelines.nightly import nightly_enrichment
from tests.catalog_samples import config_of, open_catalog
from tests.messenger import Messenger, running_messenger
from vlmflow.catalog import messages
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.messages import Message, MessageStore
from vlmflow.catalog.runs import RunInfo
from vlmflow.config import CatalogConfig
from vlmflow.engine import RunReport
from vlmflow.errors import ConfigError, UnsentError

TOKEN = "t0ps3cr3t-token-0123456789"


@pytest.fixture
def messenger() -> Iterator[Messenger]:
    with running_messenger() as server:
        yield server


def webhook(messenger: Messenger) -> Block:
    return CustomWebhookNotificationBlock(
        name="moderation",
        url=f"http://127.0.0.1:{messenger.server_port}/{{{{token}}}}",
        json_data={"title": "{{subject}}", "text": "{{body}}"},
        secrets={"token": TOKEN},
    )


def mattermost(messenger: Messenger) -> Block:
    return MattermostWebhook(hostname="127.0.0.1", port=messenger.server_port, token=TOKEN)


BLOCKS = {"custom-webhook/moderation": webhook, "mattermost-webhook/moderation": mattermost}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, messenger: Messenger, monkeypatch: pytest.MonkeyPatch) -> str:
    made = BLOCKS[request.param](messenger)
    monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: {request.param: made}[name]))
    return str(request.param)


def test_a_message_arrives(block: str, messenger: Messenger) -> None:
    assert alerts.send(block, "many more", "Run r flagged 50.0% of its images.")
    (message,) = messenger.received
    assert TOKEN in message["path"]
    assert "many more" in json.dumps(message)
    assert "Run r flagged 50.0% of its images." in message["text"]


@pytest.fixture(autouse=True)
def _without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_SEND_DELAYS_S", (0.0, 0.0))


def test_a_messenger_that_refuses_for_a_moment_is_told_all_the_same(
    block: str, messenger: Messenger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    messenger.status = 503
    waited: list[float] = []
    monkeypatch.setattr(alerts, "_SEND_DELAYS_S", (0.25, 0.5))

    def wait(delay_s: float) -> None:
        waited.append(delay_s)
        messenger.status = 503 if len(waited) < 2 else 200

    monkeypatch.setattr(alerts, "time", SimpleNamespace(sleep=wait))
    with caplog.at_level(logging.INFO, "vlmflow"):
        assert alerts.send(block, "many more", "Run r.")
    assert waited == [0.25, 0.5]
    assert len(messenger.received) == 3
    assert TOKEN not in caplog.text
    assert "nobody was told" not in caplog.text


@pytest.mark.parametrize("fault", ["refused", "no server"])
def test_a_message_that_cannot_be_sent_fails_nothing_and_tells_no_secret(
    block: str, messenger: Messenger, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    if fault == "refused":
        messenger.status = 500
    else:
        messenger.server_close()
    with caplog.at_level(logging.INFO, "vlmflow"):
        assert not alerts.send(block, "many more", "Run r.")
    assert f"nobody was told of 'many more': block {block} failed with " in caplog.text
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_block_that_is_absent_or_no_messenger_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: {"secret/x": Secret(value=TOKEN)}[name]))
    assert not alerts.send("secret/x", "many more", "Run r.")
    assert "secret/x is no notification block: nobody was told of: many more" in caplog.text
    alerts.send("slack-webhook/absent", "many more", "Run r.")
    assert "block slack-webhook/absent failed with KeyError" in caplog.text
    assert TOKEN not in caplog.text


def test_nobody_is_told_where_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: pytest.fail("a block was loaded")))
    assert alerts.send(None, "many more", "Run r.")


@pytest.fixture
def catalog(tmp_path: Path) -> CatalogConfig:
    open_catalog(tmp_path)
    return config_of(tmp_path)


def kept(catalog: CatalogConfig) -> list[str]:
    return [f"{one.message.subject}: {one.message.body}" for one in MessageStore(Folder(catalog)).left()]


@pytest.mark.parametrize("fault", ["refused", "no server", "no block"])
def test_a_message_that_cannot_be_sent_is_kept_and_sent_once_by_a_later_flow(
    block: str, messenger: Messenger, catalog: CatalogConfig, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    messenger.status = 500
    with caplog.at_level(logging.INFO, "vlmflow"):
        # Kept is as good as told: nobody is to tell it a second time.
        assert alerts.send("secret/absent" if fault == "no block" else block, "many more", "Run r.", catalog)
        assert kept(catalog) == ["many more: Run r."]
        assert "'many more' is kept in the catalog" in caplog.text
        alerts.send_kept(block, catalog)
        alerts.send_kept(None, catalog)
        assert caplog.text.count("1 messages of earlier flows are still undelivered") == 2
        messenger.status, messenger.received[:] = 200, []
        alerts.send_kept(block, catalog)
        alerts.send_kept(block, catalog)
    (message,) = messenger.received
    today = dt.datetime.now(dt.UTC).date()
    assert f"many more (of {today} " in json.dumps(message)
    assert f"This is of {today}" in message["text"]
    assert message["text"].rstrip().endswith("could not be sent then. Run r.")
    assert kept(catalog) == []
    files = "".join(path.read_text() for path in Path(catalog.uri).rglob("*.json"))
    assert TOKEN not in caplog.text + files


def test_a_messenger_that_is_back_is_told_what_it_refused_before_too(
    block: str, messenger: Messenger, catalog: CatalogConfig
) -> None:
    messenger.status = 500
    for number in range(3):
        assert alerts.send(block, f"first {number}", "Run r.", catalog)
    messenger.status, messenger.received[:] = 200, []
    assert alerts.send(block, "second", "Run s.", catalog)
    said = [json.dumps(message) for message in messenger.received]
    assert [next(name for name in ("second", "first 0", "first 1", "first 2") if name in one) for one in said] == [
        "second",
        "first 0",
        "first 1",
        "first 2",
    ]
    assert kept(catalog) == []


def test_a_message_that_a_messenger_never_takes_keeps_no_other(
    block: str, messenger: Messenger, catalog: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    messenger.status = 500
    for number in range(5):
        assert alerts.send(block, f"message {number}", "Run r.", catalog)
    messenger.status, messenger.received[:] = 200, []

    def refusing(block: Any, subject: str, body: str) -> None:
        if subject.startswith(refused):
            raise UnsentError("too long")
        post(block, subject, body)

    monkeypatch.setattr(alerts, "post", refusing)
    refused = ("message 1", "message 3", "message 4")
    alerts.send_kept(block, catalog)
    assert kept(catalog) == [f"{name}: Run r." for name in refused]
    assert len(messenger.received) == 2
    refused = ("message 1",)
    alerts.send_kept(block, catalog)
    assert kept(catalog) == ["message 1: Run r."]


def test_flows_at_once_send_each_message_once(
    block: str, messenger: Messenger, catalog: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    messenger.status = 500
    for number in range(3):
        assert alerts.send(block, f"message {number}", "Run r.", catalog)
    messenger.status, messenger.received[:] = 200, []
    sends = alerts._is_sent_late

    def beside(notify: str, message: Message) -> bool:
        monkeypatch.setattr(alerts, "_is_sent_late", sends)
        alerts.send_kept(None, catalog)
        alerts.send_kept(block, catalog)  # of another flow, while this one is at its first message
        assert kept(catalog) == ["message 0: Run r."]
        return sends(notify, message)

    monkeypatch.setattr(alerts, "_is_sent_late", beside)
    alerts.send_kept(block, catalog)
    said = [json.dumps(message) for message in messenger.received]
    assert [sum(f"message {number} (of" in one for one in said) for number in range(3)] == [1, 1, 1]
    assert list(Folder(catalog).list("messages")) == []


def test_a_message_of_a_flow_that_was_killed_as_it_sent_is_sent_by_a_later_one(
    block: str, messenger: Messenger, catalog: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    messenger.status = 500
    assert alerts.send(block, "many more", "Run r.", catalog)
    messenger.status, messenger.received[:] = 200, []
    (message,) = MessageStore(Folder(catalog)).left()
    assert Folder(catalog).create(f"{message.path}.sending")
    alerts.send_kept(block, catalog)
    assert messenger.received == []
    assert kept(catalog) == ["many more: Run r."]
    monkeypatch.setattr(messages, "CLAIMED_FOR", dt.timedelta())
    alerts.send_kept(block, catalog)
    assert len(messenger.received) == 1
    assert list(Folder(catalog).list("messages")) == []


def test_where_no_catalog_is_none_is_begun_for_a_message(
    block: str, messenger: Messenger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messenger.status = 500
    absent = CatalogConfig(uri=str(tmp_path / "absent"))
    assert not alerts.send(block, "many more", "Run r.", absent)
    alerts.send_kept(block, absent)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_text("")
    assert not alerts.send(block, "many more", "Run r.", CatalogConfig(uri=str(tmp_path / "file")))
    assert "'many more' could not be kept for later either" in caplog.text


@pytest.mark.parametrize("given", [{}, {"catalog": "CATALOG", "source": "elsewhere/", "profile": "starter"}])
def test_what_a_flow_failed_with_is_kept_by_the_catalog_of_its_job(
    block: str, messenger: Messenger, catalog: CatalogConfig, tmp_path: Path, given: dict[str, Any]
) -> None:
    messenger.status = 500
    job_file = tmp_path / "job.yaml"
    if given:
        given, text = given | {"catalog": catalog.uri}, "limit: 5\n"
    else:
        text = f"source: {{uri: photos/}}\ncatalog: {{uri: {catalog.uri}}}\nprofile: starter\n"
    job_file.write_text(text)
    flow: Any = SimpleNamespace(name="nightly-enrichment")
    flow_run: Any = SimpleNamespace(name="tonight", parameters={"notify": block, "job_file": str(job_file), **given})
    alerts.tell_failure(flow, flow_run, Failed(message=f"3 rows do not reconcile: {'mem://x, ' * 500}"))
    (message,) = kept(catalog)
    assert message.startswith("nightly-enrichment tonight Failed: 3 rows do not reconcile: mem://x, ")
    assert message.endswith(" mem://x,"), "part of an address would outlive an erasure"


def test_a_failed_flow_says_what_it_failed_with(block: str, messenger: Messenger) -> None:
    flow: Any = SimpleNamespace(name="nightly-enrichment")
    flow_run: Any = SimpleNamespace(name="nightly 2026-11-01", parameters={"notify": block})
    alerts.tell_failure(flow, flow_run, Failed(message=f"3 rows\n do not reconcile {'x' * 5000}"))
    (message,) = messenger.received
    assert "nightly-enrichment nightly 2026-11-01 Failed" in json.dumps(message)
    assert "3 rows do not reconcile" in message["text"]
    assert len(message["text"]) < 2000


def test_a_failed_flow_says_what_can_be_done(
    block: str, messenger: Messenger, caplog: pytest.LogCaptureFixture
) -> None:
    flow: Any = SimpleNamespace(name="nightly-enrichment")
    flow_run = FlowRun(flow_id=uuid4(), name="nightly 2026-11-01", parameters={"notify": block})
    error = ConfigError("config x.yaml: No such file", remedy="Name an existing YAML file.")
    alone = temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False})  # else a server would be started for the log
    with alone, caplog.at_level(logging.INFO, "prefect.flow_runs"):
        alerts.tell_failure(flow, flow_run, Failed(message=f"ConfigError: {error}", data=error))
    (message,) = messenger.received
    assert "ConfigError: config x.yaml: No such file - Name an existing YAML file." in message["text"]
    assert "What to do: Name an existing YAML file." in caplog.text


@pytest.mark.parametrize("given", [{}, {"report_foldr": "reports", "golden_set": None}])
def test_a_flow_that_crashed_says_which_parameters_it_does_not_have(
    given: dict[str, Any], block: str, messenger: Messenger, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"job_file": "job.yaml", "date": "2026-11-01", "notify": block}
    flow_run = FlowRun(flow_id=uuid4(), name="nightly 2026-11-01", parameters=known | given)
    alone = temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False})
    with alone, caplog.at_level(logging.INFO, "prefect.flow_runs"):
        alerts.tell_failure(nightly_enrichment, flow_run, Crashed(message="Process exited with status code: 1."))
    (message,) = messenger.received
    told = "The flow has no parameter report_foldr, golden_set: leave it out of the deployment"
    assert "Process exited with status code: 1." in message["text"]
    assert [told in message["text"], told in caplog.text] == [bool(given)] * 2


@pytest.mark.parametrize(
    ("notify", "is_told"), [("slack-webhook/absent", True), ("secret/x", True), ("good/one", False), (None, False)]
)
def test_a_messenger_that_could_send_nothing_is_told_at_the_start(
    notify: str | None, is_told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = {"secret/x": Secret(value=TOKEN), "good/one": MattermostWebhook(hostname="127.0.0.1", token=TOKEN)}
    monkeypatch.setattr(Block, "load", classmethod(lambda cls, name: blocks[name]))
    flow: Any = SimpleNamespace(name="nightly-enrichment")
    flow_run = FlowRun(flow_id=uuid4(), name="nightly 2026-11-01", parameters={"notify": notify})
    alone = temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False})
    with alone, caplog.at_level(logging.INFO, "prefect.flow_runs"):
        alerts.check_messenger(flow, flow_run, Running())
    assert (f"notify: '{notify}' is no notification block" in caplog.text) is is_told
    assert TOKEN not in caplog.text


def report(allowed: int, flagged: int, policy: str | None = "p 1") -> RunReport:
    return RunReport(run_id="now", status="done", source="s", catalog="c", profile="p", tasks=("embed",),
                     date=dt.date(2026, 11, 9), started_at=dt.datetime(2026, 11, 9, tzinfo=dt.UTC), policy=policy,
                     decisions={"allow": allowed, "review": flagged})  # fmt: skip


def run(
    number: int, allowed: int, flagged: int, *, policy: str = "p 1", source: str = "s", state: Any = "finished"
) -> RunInfo:
    record = {"policy": policy, "source": source, "decisions": {"allow": allowed, "block": flagged}}
    return RunInfo(f"run {number}", state, record, None)


TONIGHT = RunInfo("now", "finished", {"policy": "p 1", "source": "s", "decisions": {"allow": 70, "block": 30}}, None)


def test_a_jump_is_told_against_the_median_of_the_nights_before() -> None:
    usual = [run(number, 95, 5) for number in range(6)]
    assert alerts.flagged_jump(report(70, 30), [TONIGHT, *usual], 0.1) == (0.3, 0.05)
    assert alerts.flagged_jump(report(86, 14), [TONIGHT, *usual], 0.1) is None
    assert alerts.flagged_jump(report(70, 30), [TONIGHT, run(0, 0, 100), *usual], 0.1) == (0.3, 0.05)  # one bad night
    assert alerts.flagged_jump(report(70, 30), [TONIGHT, *usual, *[run(9, 0, 100)] * 9], 0.1) == (0.3, 0.05)  # long ago
    later = [run(8, 0, 100)] * 7  # such as over images that arrived during the night
    assert alerts.flagged_jump(report(70, 30), [*later, TONIGHT, *usual], 0.1) == (0.3, 0.05)


def test_of_two_sources_in_a_catalog_each_is_held_against_its_own_nights() -> None:
    """Else the nights of the one that has more flagged images would tell people every time."""
    nights = [run(number, 40, 60) if number % 2 else run(number, 95, 5, source="other") for number in range(20)]
    assert alerts.flagged_jump(report(40, 60), [TONIGHT, *nights], 0.1) is None
    assert alerts.flagged_jump(report(20, 80), [TONIGHT, *nights], 0.1) == (0.8, 0.6)


@pytest.mark.parametrize(("policy", "most"), [("p 1", 8), ("another", 201)])
def test_of_years_of_runs_the_last_ones_are_looked_at(policy: str, most: int) -> None:
    runs = iter([TONIGHT, *(run(number, 95, 5, policy=policy) for number in range(1000))])
    alerts.flagged_jump(report(70, 30), runs, 0.1)
    assert 1001 - len(list(runs)) <= most


@pytest.mark.parametrize(
    "before",
    [
        [],
        [run(0, 3, 1)],  # few rows say little
        [run(0, 95, 5, policy="p 2")],  # another policy flags another share
        [run(0, 95, 5, source="other")],  # so may another source
        [run(0, 95, 5, state="dead")],
        [RunInfo("vacuum", "finished", {"operation": "vacuum"}, None)],
    ],
)
def test_without_nights_to_compare_with_there_is_no_jump(before: list[RunInfo]) -> None:
    assert alerts.flagged_jump(report(10, 90), [TONIGHT, *before], 0.1) is None


def test_of_few_rows_no_share_is_taken() -> None:
    assert alerts.flagged_jump(report(0, 49), [TONIGHT, run(0, 95, 5)], 0.1) is None
    assert alerts.flagged_share({"allow": 25, "review": 15, "block": 10}) == 0.5

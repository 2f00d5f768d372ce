"""What a night does when a step goes wrong, against a real Prefect server; the steps themselves are given."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from pipelines import alerts, at_work, nightly
from tests.flows import Prefect
from tests.messenger import Messenger, running_messenger
from tests.processes import wait_for
from tests.report_samples import put_record, put_rows, record
from vlmflow.catalog import Catalog, Verification, runs
from vlmflow.catalog.verify import Finding
from vlmflow.checks import Check
from vlmflow.config import CatalogConfig
from vlmflow.engine import PlanSummary, RunReport
from vlmflow.errors import ConfigError, StorageAccessError, TransientError, UnreconciledError, VlmflowError

NIGHT = dt.date(2026, 3, 1)
NEXT = NIGHT + dt.timedelta(days=1)
TOKEN = "t0ps3cr3t-token"
PLAN = PlanSummary(
    num_listed=3,
    num_duplicates=0,
    num_new=3,
    num_unchanged=0,
    num_due=3,
    num_planned=3,
    num_exhausted=0,
    num_erased=0,
    num_policy_differs=0,
    due={"embed": {"new": 3}},
    policy=None,
)


class GivenSteps:
    """Steps that give what they are told to, or raise it."""

    def __init__(self, *outcomes: RunReport | VlmflowError, plan: PlanSummary = PLAN) -> None:
        self.outcomes = list(outcomes)
        self.planned = plan
        self.failures: list[Check] = []
        self.is_followed = False
        self.while_planning: Callable[[], None] = lambda: None

    def session(self, job: Any) -> Any:
        return nullcontext()

    def doctor(self, job: Any) -> list[Check]:
        return [self.failures.pop(0) if self.failures else Check("python", "ok", "3.11")]

    def follows(self, job: Any) -> bool:
        return self.is_followed

    def plan(self, job: Any) -> PlanSummary:
        self.while_planning()
        return self.planned

    def enrich(self, job: Any, progress: Any) -> RunReport:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, VlmflowError):
            raise outcome
        return outcome


@pytest.fixture
def config(tmp_path: Path) -> CatalogConfig:
    """A catalog after the nights before and the run of tonight."""
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a", "b", "c"], run="tonight", decision=["allow", "review", "block"])
    for number in range(3):
        given = {"date": f"2026-02-0{number + 1}", "started_at": f"2026-02-0{number + 1}T02:00:00Z"}
        for name, source in (("night", "photos/"), ("other", "/images")):
            put_record(config, f"{name}-{number}", source=source, decisions={"allow": 95, "review": 5}, **given)
    put_record(config, "tonight", decisions={"allow": 50, "block": 50})
    return config


@pytest.fixture
def messenger(prefect: Prefect) -> Iterator[Messenger]:
    with running_messenger() as server:
        block = CustomWebhookNotificationBlock(
            name="moderation",
            url=f"http://127.0.0.1:{server.server_port}/{{{{token}}}}",
            json_data={"title": "{{subject}}", "text": "{{body}}"},
            secrets={"token": TOKEN},
        )
        block.save("moderation", overwrite=True)
        yield server


@pytest.fixture
def night(
    prefect: Prefect, config: CatalogConfig, messenger: Messenger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a night over given steps and given verifications; without one the catalog is sound."""
    job_file = tmp_path / "job.yaml"
    job_file.write_text(f"source: {{uri: /images}}\ncatalog: {{uri: {config.uri}}}\nprofile: starter\n")

    def run(steps: GivenSteps, *found: Verification, **options: Any) -> Any:
        left = list(found)
        monkeypatch.setattr(nightly, "make_steps", lambda *_, **__: steps)
        monkeypatch.setattr(nightly, "verify_catalog", lambda *_, **__: left.pop(0) if left else Verification(3, 3))
        for step in ("check", "enrich_due", "publish"):
            monkeypatch.setattr(nightly, step, getattr(nightly, step).with_options(retry_delay_seconds=0))
        options = {"notify": "custom-webhook/moderation", "date": NIGHT} | options
        return nightly.nightly_enrichment(job_file, return_state=True, **options)

    return run


def tonight(**given: Any) -> RunReport:
    return RunReport.model_validate(record("tonight", **given))


def facts(prefect: Prefect, event: str, config: CatalogConfig) -> list[dict[str, Any]]:
    """What was said by the events about a catalog."""
    found = prefect.events(event)
    return [item["payload"] for item in found if item["resource"]["prefect.resource.name"] == config.uri]


def test_rows_that_do_not_reconcile_are_told_once(
    prefect: Prefect, night: Callable[..., Any], config: CatalogConfig, messenger: Messenger
) -> None:
    state = night(GivenSteps(UnreconciledError("2 images went in and did not come out")))
    assert state.is_failed()
    (message,) = messenger.received
    assert TOKEN in message["path"]
    assert message["title"] == "nightly-enrichment nightly 2026-03-01 Failed"
    assert "2 images went in and did not come out" in message["text"]
    wait_for(lambda: bool(facts(prefect, "vlmflow.rows.unreconciled", config)), seconds=30)
    run_id = prefect.runs("nightly-enrichment")[0]["id"]
    wait_for(lambda: "2 images went in" in prefect.log(run_id), seconds=30)
    log = prefect.log(run_id)
    assert TOKEN not in log
    assert "Traceback" not in log


def test_a_catalog_that_does_not_verify_is_told(
    prefect: Prefect, night: Callable[..., Any], config: CatalogConfig, messenger: Messenger
) -> None:
    found = Verification(3, 4, findings={"duplicate": Finding(1, ["a"])})
    report = tonight(decisions={"allow": 50, "block": 50}, source="/images", config={"date": str(NIGHT)})
    Catalog.open(config).runs.finish("tonight", report.model_dump(mode="json"))
    assert night(GivenSteps(report), found).is_failed()
    (jump, failure), messenger.received[:] = messenger.received, []
    assert jump["title"] == "vlmflow: many more images are flagged"
    assert "images with more than one row" in failure["text"]
    assert "not sound" in prefect.artifacts()["verify"]["description"]
    wait_for(lambda: bool(facts(prefect, "vlmflow.rows.unreconciled", config)), seconds=30)

    # The jump is known: the nights after it look at the same run for as long as they fail.
    assert night(GivenSteps(tonight(status="nothing_due", num_added=0)), found, date=NEXT).is_failed()
    assert [message["title"] for message in messenger.received] == ["nightly-enrichment nightly 2026-03-02 Failed"]


def test_a_jump_of_the_flagged_share_is_told_and_the_night_is_good(
    prefect: Prefect, night: Callable[..., Any], config: CatalogConfig, messenger: Messenger
) -> None:
    report = tonight(decisions={"allow": 50, "block": 50})
    state = night(GivenSteps(report), report_url="https://reports.example/nightly")
    assert state.is_completed(), state.message
    (message,) = messenger.received
    assert message["title"] == "vlmflow: many more images are flagged"
    assert "50.0% of its images; of the runs before, 5.0%" in message["text"]
    wait_for(lambda: bool(facts(prefect, "vlmflow.flagged-share.jumped", config)), seconds=30)
    assert facts(prefect, "vlmflow.flagged-share.jumped", config)[0]["share"] == 0.5

    # The report is linked, and what was flagged anew is shown as links and blurred pictures only.
    shown = prefect.artifacts()
    assert "(https://reports.example/nightly/2026-03-01-tonight.html)" in shown["report"]["data"]
    assert (Path(f"{config.uri}-reports") / "2026-03-01-tonight.html").is_file()
    assert "# 2 newly flagged" in shown["flagged"]["data"]
    assert "![" not in shown["flagged"]["data"]  # pictures that cannot be had


def test_images_that_arrive_during_the_night_are_reported_and_watched_too(
    prefect: Prefect, night: Callable[..., Any], config: CatalogConfig, messenger: Messenger
) -> None:
    put_rows(config, ["d", "e"], run="late", decision=["block", "allow"])
    given = {"decisions": {"allow": 10, "block": 90}, "num_added": 2, "started_at": "2026-03-01T03:00:00Z"}
    put_record(config, "late", **given)
    late = RunReport.model_validate(record("late", **given))
    arrived = Verification(5, 3, findings={"missing": Finding(2, ["d", "e"])})
    state = night(GivenSteps(tonight(decisions={"allow": 95, "block": 5}), late), arrived)
    assert state.message == "2026-03-01: 5 rows new, 0 replaced, 95 flagged, 2 with errors; runs tonight, late."
    (message,) = messenger.received
    assert "Run late of" in message["text"]
    assert {path.name for path in Path(f"{config.uri}-reports").iterdir()} == {
        "2026-03-01-tonight.html",
        "2026-03-01-late.html",
    }
    shown = prefect.artifacts()
    assert "# 2 newly flagged" in shown["flagged"]["data"]
    assert "# 1 newly flagged" in shown["flagged-late"]["data"]


@pytest.mark.parametrize("second", ["nothing_due", "done"])
def test_what_a_try_committed_before_it_failed_is_reported_and_watched(
    night: Callable[..., Any], config: CatalogConfig, messenger: Messenger, second: str
) -> None:
    put_rows(config, ["d"], run="lost", decision=["block"])
    given = {"source": "/images", "config": {"date": str(NIGHT)}, "decisions": {"allow": 10, "block": 90}}
    put_record(config, "lost", status="failed", num_added=100, started_at="2026-03-01T01:00:00Z", **given)
    again = tonight(status=second, num_added=0 if second == "nothing_due" else 3)
    state = night(GivenSteps(TransientError("busy"), again))
    assert state.is_completed(), state.message
    runs = ["lost"] if second == "nothing_due" else ["lost", "tonight"]
    assert state.message.endswith(f" {', '.join(runs)}.")
    assert state.message.startswith(f"2026-03-01: {100 + again.num_added} rows new")
    assert [message["text"].split()[1] for message in messenger.received] == ["lost"]
    assert {path.name for path in Path(f"{config.uri}-reports").iterdir()} == {f"2026-03-01-{run}.html" for run in runs}


def test_a_night_whose_images_others_did_does_not_say_that_nothing_was_due(night: Callable[..., Any]) -> None:
    state = night(GivenSteps(tonight(status="nothing_due", num_added=0)))
    assert state.message.startswith("2026-03-01: no run to report. 3 images were due when it was planned")


def test_a_night_with_nothing_due_still_looks_for_late_verdicts(night: Callable[..., Any]) -> None:
    nothing = PLAN.model_copy(update={"num_new": 0, "num_unchanged": 3, "num_due": 0, "num_planned": 0, "due": {}})
    report = {"status": "nothing_due", "num_added": 0, "num_listed": 3}
    steps = GivenSteps(tonight(**report), plan=nothing)
    state = night(steps)
    assert state.message == "Nothing was due on 2026-03-01: 3 images listed, all up to date."
    assert steps.outcomes == [], "what an ended run left behind is done by `enrich`"
    state = night(GivenSteps(tonight(**report, num_columns_updated=3), plan=nothing))
    assert state.message.endswith("3 images listed, all up to date, the caller's columns updated in 3 rows.")


def test_a_night_says_what_it_leaves_as_it_is(prefect: Prefect, night: Callable[..., Any]) -> None:
    left = {"num_policy_differs": 988, "num_exhausted": 2, "num_unwatched": 7}
    words = (
        "988 rows are under another policy: run the backfill, or name theirs in the job; 2 images failed three times "
        "and are not tried again; 7 images at http(s) urls without a version: no run sees that they have changed."
    )
    nothing = PLAN.model_copy(update={"num_new": 0, "num_due": 0, "num_planned": 0, "due": {}} | left)
    state = night(GivenSteps(tonight(status="nothing_due", num_added=0, num_listed=1000, **left), plan=nothing))
    assert state.message == f"Nothing was due on 2026-03-01: 1,000 images listed; {words}"
    told = f"0 of 3 images are due; {words.rstrip('.')}"
    wait_for(lambda: told in prefect.log(str(state.state_details.flow_run_id)), seconds=30)
    state = night(GivenSteps(tonight(), plan=PLAN.model_copy(update=left)))
    assert state.message.endswith(f"run tonight; {words}")


def test_a_folder_of_reports_out_of_reach_silences_no_alert(
    night: Callable[..., Any], messenger: Messenger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageAccessError("s3://reports refuses access")

    monkeypatch.setattr(nightly, "unreported", refuse)
    assert night(GivenSteps(tonight(decisions={"allow": 50, "block": 50}))).is_failed()
    jump, failure = messenger.received
    assert jump["title"] == "vlmflow: many more images are flagged"
    assert "s3://reports refuses access" in failure["text"]


def test_what_a_night_could_tell_nobody_the_next_tells(
    prefect: Prefect, night: Callable[..., Any], messenger: Messenger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_SEND_DELAYS_S", (0.0, 0.0))
    messenger.status = 503
    assert night(GivenSteps(UnreconciledError("2 images went in and did not come out"))).is_failed()
    jump = tonight(decisions={"allow": 50, "block": 50})
    assert night(GivenSteps(jump)).is_completed()
    messenger.status, messenger.received[:] = 200, []
    state = night(GivenSteps(tonight(status="nothing_due", num_added=0)), date=NEXT)
    assert state.is_completed()
    failure, flagged = messenger.received
    assert failure["title"].startswith("nightly-enrichment nightly 2026-03-01 Failed (of 20")
    assert "2 images went in and did not come out" in failure["text"]
    assert flagged["title"].startswith("vlmflow: many more images are flagged (of 20")
    wait_for(lambda: "was sent now" in prefect.log(str(state.state_details.flow_run_id)), seconds=30)
    assert night(GivenSteps(tonight(status="nothing_due", num_added=0)), date=NEXT).is_completed()
    assert len(messenger.received) == 2


def test_a_usual_night_tells_nobody(night: Callable[..., Any], messenger: Messenger) -> None:
    assert night(GivenSteps(tonight(decisions={"allow": 90, "block": 10}))).is_completed()
    assert messenger.received == []


def test_a_store_out_of_reach_is_tried_again_and_bad_input_is_not(
    prefect: Prefect, night: Callable[..., Any], messenger: Messenger
) -> None:
    steps = GivenSteps(TransientError("busy"), TransientError("busy"), tonight())
    assert night(steps).is_completed()
    assert steps.outcomes == []
    steps = GivenSteps(UnreconciledError("lost"), tonight())
    assert night(steps).is_failed()
    assert len(steps.outcomes) == 1


def test_a_store_that_throttles_while_doctor_looks_is_tried_again(night: Callable[..., Any]) -> None:
    steps = GivenSteps(tonight())
    steps.failures = [Check("source s3://shop", "fail", "is throttling", may_pass=True)] * 2
    assert night(steps).is_completed()
    assert steps.failures == []
    steps.failures = [Check("source s3://shop", "fail", "does not exist", "Check the name.")] * 2
    with pytest.raises(ConfigError, match="source s3://shop: does not exist") as caught:
        night(steps).result()
    assert caught.value.remedy == "Check the name."
    assert len(steps.failures) == 1, "it was not tried again"


@pytest.fixture
def other_night(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Begins another night over the same source, by the record that is given."""
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(at_work, "_POLL_S", 0.1)
    given = {"source": "/images", "config": {"date": str(NEXT)}, "status": "running"}
    catalog = Catalog.open(config)
    with ExitStack() as stack:

        def begin(begun: dict[str, Any] | None = None) -> None:
            store = catalog.flows if begun else catalog.runs
            store.start("other", begun or record("other", **given))
            stack.enter_context(store.keep_alive("other"))

        yield begin


@pytest.mark.parametrize("begins", ["before", "while it is planned", "at once, and a moment earlier"])
def test_while_another_night_is_at_work_nothing_is_done(
    night: Callable[..., Any], messenger: Messenger, other_night: Callable[..., None], begins: str
) -> None:
    steps = GivenSteps(tonight())
    if begins == "before":
        other_night()
    elif begins == "while it is planned":
        steps.while_planning = other_night
    else:
        on_its_way = {"operation": "night: /images", "started_at": "2026-03-01T02:00:00+00:00"}
        steps.while_planning = lambda: other_night(on_its_way)
    state = night(steps)
    assert (state.name, state.message) == (
        "Skipped",
        "2026-03-01: nothing was done, for another night is at work: run other.",
    )
    assert state.is_completed()
    assert len(steps.outcomes) == 1
    assert messenger.received == []


def test_a_flow_that_was_started_again_follows_its_own_job(
    night: Callable[..., Any], other_night: Callable[..., None]
) -> None:
    other_night()
    steps = GivenSteps(tonight())
    steps.is_followed = True
    assert night(steps).name == "Completed"
    assert steps.outcomes == []


def test_a_night_is_at_work_until_its_report_is_there(
    night: Callable[..., Any], config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one that begins meanwhile would find the run without a report, and tell of it as of its own."""
    made, seen = nightly.publish_report, []

    def publish_report(*given: Any) -> Any:
        seen.extend(run.record["operation"] for run in Catalog.open(config).flows.running())
        return made(*given)

    monkeypatch.setattr(nightly, "publish_report", publish_report)
    assert night(GivenSteps(tonight())).name == "Completed"
    assert seen == ["night: /images"]

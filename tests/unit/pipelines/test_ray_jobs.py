"""Commands as Ray jobs, over a Jobs API of a few lines: names, attempts, logs, deadlines, errors."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from pipelines import adhoc, ray_jobs
from pipelines.ray_jobs import Attempt, Command, RayJobs, read_files
from vlmflow.errors import ClusterError, ConfigError, DeadlineError, SubmittedJobError, VlmflowError

COMMAND = Command("enrich 2026-11-01", ("enrich", "--config", "job.yaml"), {"job.yaml": "source: {uri: /images}\n"})


class Api:
    """A Jobs API in this process. Jobs run until they are told how they end."""

    ahead_s = 0.0

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.logs: dict[str, list[str]] = {}
        self.submitted: list[str] = []
        self.before_submission: Callable[[str], None] = lambda _: None
        self.failures: list[Exception] = []

    def add(self, submission_id: str, status: str = "RUNNING", owner: str = "other", started_at: float = 1e12) -> None:
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status=status, metadata={ray_jobs.OWNER: owner}, start_time=started_at,
            driver_exit_code=None, message=None,
        )  # fmt: skip

    def list_jobs(self) -> list[Any]:
        if self.failures:
            raise self.failures.pop(0)
        return list(self.jobs.values())

    def get_job_info(self, submission_id: str) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        return self.jobs[submission_id]

    def get_job_logs(self, submission_id: str) -> str:
        """What there is so far; with the last part the job is over."""
        parts = self.logs[submission_id]
        if len(parts) > 1:
            return parts.pop(0)
        self.jobs[submission_id].status = "SUCCEEDED"
        return parts[0]

    def submit_job(self, *, submission_id: str, metadata: dict[str, str], **_: Any) -> None:
        self.before_submission(submission_id)
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: {submission_id} already exists")
        self.submitted.append(submission_id)
        self.add(submission_id, owner=metadata[ray_jobs.OWNER])

    def stop_job(self, submission_id: str) -> None:
        self.jobs[submission_id].status = "STOPPED"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(ray_jobs, "_Client", lambda _: made)
    monkeypatch.setattr(ray_jobs, "_POLL_S", 0.001)
    for variable in ray_jobs._OVERRIDING:
        monkeypatch.delenv(variable, raising=False)
    return made


@pytest.fixture
def jobs(api: Api) -> RayJobs:
    return RayJobs("http://head:8265")


def test_the_name_follows_from_what_is_done() -> None:
    assert COMMAND.name == Command(COMMAND.label, COMMAND.arguments, dict(COMMAND.files)).name
    assert COMMAND.name.startswith("vlmflow-enrich-2026-11-01-")
    others = [
        Command(COMMAND.label, (*COMMAND.arguments, "--json"), COMMAND.files),
        Command(COMMAND.label, COMMAND.arguments, {"job.yaml": "source: {uri: /other}\n"}),
        Command(COMMAND.label, COMMAND.arguments, {**COMMAND.files, "policy.yaml": ""}),
    ]
    assert len({command.name for command in [COMMAND, *others]}) == 4


@pytest.mark.parametrize("label", ["../../x; rm -rf /", "é" * 500, "", 'a"b\nc', "-" * 200])
def test_an_id_is_of_plain_characters_and_bounded(label: str) -> None:
    name = Command(label, ()).name
    assert ray_jobs._ID.fullmatch(f"{name}-7")
    assert len(name) < 130


def test_an_entrypoint_quotes_what_a_shell_would_take_for_its_own() -> None:
    assert Command("x", ("show", "a b; rm -rf $HOME")).entrypoint == "python -m vlmflow show 'a b; rm -rf $HOME'"


def test_attempts_are_numbered(jobs: RayJobs, api: Api) -> None:
    assert jobs.last(COMMAND) is None
    first = jobs.start(COMMAND, "run 1")
    assert (first.submission_id, first.number, first.owner) == (f"{COMMAND.name}-1", 1, "run 1")
    api.jobs[first.submission_id].status = "FAILED"
    for number in range(2, 12):
        again = jobs.start(COMMAND, "run 1")
        assert again.number == number
        api.jobs[again.submission_id].status = "STOPPED"
    assert jobs.start(COMMAND, "run 1").number == 12  # and not 10 after 9, as text would sort


def test_one_that_runs_is_followed_whoever_submitted_it(jobs: RayJobs, api: Api) -> None:
    first = jobs.start(COMMAND, "run 1")
    assert jobs.start(COMMAND, "run 2") == first
    assert api.submitted == [first.submission_id]


def test_one_that_is_over_is_done_again_unless_once_is_enough(jobs: RayJobs, api: Api) -> None:
    first = jobs.start(COMMAND, "run 1")
    api.jobs[first.submission_id].status = "SUCCEEDED"
    assert jobs.start(COMMAND, "run 1", once=True).submission_id == first.submission_id
    assert jobs.start(COMMAND, "run 2", once=True).number == 2
    api.jobs[f"{COMMAND.name}-2"].status = "SUCCEEDED"
    assert jobs.start(COMMAND, "run 2").number == 3


def test_of_two_who_submit_at_once_one_follows_the_other(jobs: RayJobs, api: Api) -> None:
    api.before_submission = lambda submission_id: api.add(submission_id, owner="the other")
    followed = jobs.start(COMMAND, "run 1")
    assert (followed.owner, followed.number) == ("the other", 1)
    assert api.submitted == []


def test_a_submission_whose_answer_is_lost_is_found(jobs: RayJobs, api: Api) -> None:
    def take_it_and_hang_up(submission_id: str) -> None:
        api.add(submission_id, owner="run 1")
        raise requests.exceptions.ConnectionError("Connection aborted.")

    api.before_submission = take_it_and_hang_up
    assert jobs.start(COMMAND, "run 1").owner == "run 1"
    assert len(api.jobs) == 1


def test_a_job_that_is_refused_is_named(jobs: RayJobs, api: Api) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("Request failed with status code 400: Traceback ...\n\nValueError: no such environment")

    api.before_submission = refuse
    with pytest.raises(SubmittedJobError, match=f"{COMMAND.name}-1: .* ValueError: no such environment"):
        jobs.start(COMMAND, "run 1")


def test_a_head_that_has_just_started_is_asked_again_by_the_task(jobs: RayJobs, api: Api) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("Request failed with status code 500: No available agent to submit job, try again later.")

    api.before_submission = refuse
    with pytest.raises(ClusterError, match="No available agent"):
        jobs.start(COMMAND, "run 1")


def test_ours_are_told_from_others(jobs: RayJobs, api: Api) -> None:
    api.add("raysubmit_x")
    api.add("vlmflow-enrich")
    api.jobs["none"] = SimpleNamespace(submission_id=None)
    assert jobs.last(COMMAND) is None
    assert jobs.start(COMMAND, "run 1").number == 1


def test_what_a_run_submitted_and_what_it_follows_is_stopped(jobs: RayJobs, api: Api) -> None:
    mine, followed, other, over = (Command(f"command {number}", ()) for number in range(4))
    for command, owner in ((mine, "run 1"), (followed, "run 2"), (other, "run 2"), (over, "run 1")):
        jobs.start(command, owner)
    api.jobs[f"{over.name}-1"].status = "SUCCEEDED"
    stopped = jobs.stop_all("run 1", {followed.name})
    assert {attempt.name for attempt in stopped} == {mine.name, followed.name}
    assert api.jobs[f"{other.name}-1"].status == "RUNNING"
    assert api.jobs[f"{over.name}-1"].status == "SUCCEEDED"


def test_one_that_cannot_be_stopped_keeps_no_other_from_it(
    jobs: RayJobs, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf, refused, last = (jobs.start(Command(f"command {number}", ()), "run 1") for number in range(3))
    told: list[str] = []
    stop = api.stop_job

    def stop_job(submission_id: str) -> None:
        assert api.jobs[deaf.submission_id].status == "RUNNING", "nobody waits for one before all are told"
        told.append(submission_id)
        if submission_id == refused.submission_id:
            raise RuntimeError("Request failed with status code 500")
        if submission_id != deaf.submission_id:
            stop(submission_id)

    monkeypatch.setattr(api, "stop_job", stop_job)
    monkeypatch.setattr(ray_jobs, "_STOP_WAIT_S", 0.01)
    with pytest.raises(ClusterError, match="status code 500"):
        jobs.stop_all("run 1", ())
    assert told == [attempt.submission_id for attempt in (deaf, refused, last)]
    assert api.jobs[last.submission_id].status == "STOPPED"


def test_a_job_that_does_not_stop_is_named(jobs: RayJobs, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = jobs.start(COMMAND, "run 1")
    monkeypatch.setattr(api, "stop_job", lambda _: None)
    monkeypatch.setattr(ray_jobs, "_STOP_WAIT_S", 0.01)
    with pytest.raises(SubmittedJobError, match="was told to stop and still runs"):
        jobs.stop(attempt)


def followed(jobs: RayJobs, attempt: Attempt, **options: Any) -> list[str]:
    lines: list[str] = []
    jobs.follow(attempt, lines.append, **options)
    return lines


def test_every_line_comes_once_and_whole(jobs: RayJobs, api: Api) -> None:
    attempt = jobs.start(COMMAND, "run 1")
    api.logs[attempt.submission_id] = ["", "one\ntw", "one\ntwo\n", "one\ntwo\nthree"]
    assert followed(jobs, attempt) == ["one", "two", "three"]


def test_a_line_ends_where_it_ends_and_not_within_a_name(jobs: RayJobs, api: Api) -> None:
    attempt = jobs.start(COMMAND, "run 1")
    lines = ["10%", "100%", json.dumps({"uri": "/a\u2028b\u2029c\x85d.jpg"}, ensure_ascii=False), "", "over"]
    api.logs[attempt.submission_id] = ["10%\r100%\n", "\r".join(lines[:2]) + "\n" + "\r\n".join(lines[2:]) + "\n"]
    assert followed(jobs, attempt) == lines


def test_a_cluster_that_fails_to_answer_for_a_while_is_waited_for(jobs: RayJobs, api: Api) -> None:
    attempt = jobs.start(COMMAND, "run 1")
    api.logs[attempt.submission_id] = ["one\n"]
    api.failures = [requests.exceptions.ConnectionError("refused"), RuntimeError("status code 500: busy")]
    assert followed(jobs, attempt) == ["one"]


def test_a_cluster_that_is_gone_is_named(jobs: RayJobs, api: Api) -> None:
    attempt = jobs.start(COMMAND, "run 1")
    api.failures = [requests.exceptions.ReadTimeout("no answer")] * 100_000
    with pytest.raises(ClusterError, match=r"Ray Jobs API http://head:8265: no answer"):
        followed(jobs, attempt, patience_s=0.01)


def test_past_the_deadline_it_is_stopped_whoever_started_it(jobs: RayJobs, api: Api) -> None:
    api.add(f"{COMMAND.name}-1", owner="run 1", started_at=1000)
    api.logs[f"{COMMAND.name}-1"] = ["one\n"] * 1000
    attempt = jobs.start(COMMAND, "run 2")
    with pytest.raises(DeadlineError, match="ran for more than 2 minutes and was stopped"):
        followed(jobs, attempt, deadline_s=120)
    assert api.jobs[attempt.submission_id].status == "STOPPED"


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_the_deadline_is_by_the_clock_of_the_cluster(jobs: RayJobs, api: Api, ahead_s: float) -> None:
    api.ahead_s = ahead_s
    begun_s = time.time() + ahead_s
    api.add(f"{COMMAND.name}-1", owner="run 1", started_at=1000 * (begun_s - 60))
    api.logs[f"{COMMAND.name}-1"] = ["one\n", "one\n"]
    followed(jobs, jobs.start(COMMAND, "run 1"), deadline_s=120)
    assert api.jobs[f"{COMMAND.name}-1"].status == "SUCCEEDED"
    api.add(f"{COMMAND.name}-1", owner="run 1", started_at=1000 * (begun_s - 180))
    api.logs[f"{COMMAND.name}-1"] = ["one\n"] * 1000
    with pytest.raises(DeadlineError):
        followed(jobs, jobs.start(COMMAND, "run 1"), deadline_s=120)


@pytest.mark.parametrize(
    ("date", "told_s"), [("Sun, 06 Nov 2044 08:49:37 GMT", 2_362_034_977), ("soon", None), (None, None)]
)
def test_the_clock_of_a_cluster_is_that_of_its_answers(
    date: str | None, told_s: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = requests.Response()
    answer.headers.update({} if date is None else {"Date": date})
    monkeypatch.setattr(ray_jobs.JobSubmissionClient, "_do_request", lambda *_, **__: answer)
    client = object.__new__(ray_jobs._Client)
    client._do_request("GET", "/api/version")
    assert client.ahead_s == pytest.approx(0.0 if told_s is None else told_s - time.time(), abs=60.0)


@pytest.mark.parametrize("url", ["head:8265", "ray://head:10001", "os://x", "auto", ""])
def test_only_web_addresses_are_taken(url: str) -> None:
    # Ray would import a module named after the scheme, or look for a cluster of its own choice.
    with pytest.raises(ConfigError, match="not a web address"):
        RayJobs(url).last(COMMAND)


@pytest.mark.parametrize("variable", ray_jobs._OVERRIDING)
def test_an_environment_that_leads_elsewhere_is_refused(
    jobs: RayJobs, api: Api, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://head:8265/")
    assert jobs.last(COMMAND) is None
    monkeypatch.setenv(variable, "http://production:8265")
    with pytest.raises(ConfigError, match=f"{variable} is set to http://production:8265"):
        RayJobs("http://head:8265").last(COMMAND)


def test_an_address_where_nothing_answers_is_named() -> None:
    with pytest.raises(ClusterError, match=r"Ray Jobs API http://127.0.0.1:9: Failed to connect"):
        RayJobs("http://127.0.0.1:9").last(COMMAND)


@pytest.mark.parametrize(
    "url", ["http://ada:s3cr3t@127.0.0.1:9", "http://ada:s3cr@3t@127.0.0.1:9/", "ftp://ada:s3cr3t@127.0.0.1:9"]
)
def test_a_password_in_the_address_is_told_to_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a flow goes to its state, its log and its messenger."""
    with pytest.raises(VlmflowError, match=r"Ray Jobs API \w+://127.0.0.1:9: ") as raised:
        RayJobs(url).last(COMMAND)
    assert "3t" not in str(raised.value) + raised.value.remedy
    given = {"job_file": "jobs/night.yaml", "ray_jobs_url": url.rstrip("/")}
    monkeypatch.setattr(adhoc, "runtime", SimpleNamespace(flow_run=SimpleNamespace(parameters=given)))
    assert re.fullmatch(r"night on \w+://127.0.0.1:9", adhoc._run_name())


def test_an_answer_that_repeats_the_address_is_told_without_the_password(api: Api) -> None:
    url = "http://ada:s3cr3t@head:8265"
    api.failures.append(requests.HTTPError(f"500 Server Error for url: {url}/api/jobs/"))
    with pytest.raises(ClusterError) as raised:
        RayJobs(url).last(COMMAND)
    assert str(raised.value) == "Ray Jobs API http://head:8265: 500 Server Error for url: http://head:8265/api/jobs/"


def test_a_dashboard_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_REQUEST_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError, match="timed out"):
        RayJobs(f"http://127.0.0.1:{silent.getsockname()[1]}").last(COMMAND)


def test_files_that_cannot_be_read_are_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml cannot be read"):
        read_files([tmp_path / "absent.yaml"])
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8")
    with pytest.raises(ConfigError, match=r"picture.yaml cannot be read"):
        read_files([tmp_path / "picture.yaml"])

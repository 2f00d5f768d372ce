"""Commands as jobs of a Ray cluster, through its Jobs API. Knows no Prefect.

A job has a name that follows from what it does, and an attempt number: Ray refuses an id that was used. So whoever asks
for a job finds the one that runs already, and two who ask at once end up with one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from vlmflow.errors import ClusterError, ConfigError, DeadlineError, SubmittedJobError, VlmflowError
from vlmflow.workspace import Workspace

logger = logging.getLogger("vlmflow")

_POLL_S = 2.0
# The Jobs API gives logs whole: the longer the log, the more seldom it is asked for, at most a megabyte a second.
_LOG_BYTES_PER_S = 1_000_000
_STOP_WAIT_S = 60.0
_REQUEST_S = 60.0
# Ray's client goes where these say, whatever address it is given.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Those of `requests`, by which it asks, are OSErrors.
_LIBRARY_ERRORS = (OSError, RuntimeError, ValueError, RayError)
OWNER = "vlmflow_flow_run"  # key in a job's metadata: the flow run that submitted it
_MAX_LABEL = 100
# Not where `splitlines` does: JSON leaves U+2028 and its like raw in a line, and file names may hold them.
_LINE_END = re.compile(r"\r\n|\r|\n")
_USER = re.compile(r"(?<=://)[^\s/?#]*@")  # in a web address, with a password
# The name of a command, and the number of an attempt at it.
_ID = re.compile(r"(vlmflow-[a-z0-9-]+-[0-9a-f]{12})-(\d+)")


@dataclass(frozen=True)
class Command:
    """What a job runs.

    Attributes:
        label: what it does, in a word or two; begins the job's name.
        arguments: of ``python -m vlmflow``, in a folder that holds ``files``.
        files: contents by name.
    """

    label: str
    arguments: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Equal for equal commands; a job's id is this and its attempt number."""
        content = json.dumps([self.arguments, dict(sorted(self.files.items()))])
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        label = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[:_MAX_LABEL] or "command"
        return f"vlmflow-{label}-{digest}"

    @property
    def entrypoint(self) -> str:
        """The shell command."""
        return shlex.join(["python", "-m", "vlmflow", *self.arguments])


@dataclass(frozen=True)
class Attempt:
    """One attempt at a command, as the cluster knows it."""

    submission_id: str
    name: str  # of the command
    number: int
    status: JobStatus
    owner: str | None
    started_at: float | None  # seconds since the epoch
    exit_code: int | None
    message: str

    @property
    def is_running(self) -> bool:
        """Waits or runs."""
        return bool(not self.status.is_terminal())

    @property
    def succeeded(self) -> bool:
        """Ended with exit code 0."""
        return self.status is JobStatus.SUCCEEDED


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which would wait for ever for a dashboard that hangs.

    Attributes:
        ahead_s: by so much the cluster's clock is ahead of ours, as its last answer says; 0 where it does not say.
    """

    ahead_s = 0.0

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        answer = super()._do_request(method, endpoint, **{"timeout": _REQUEST_S} | options)
        with suppress(KeyError, ValueError):
            self.ahead_s = parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
        return answer


class RayJobs:
    """The jobs of the cluster behind ``url``, such as ``http://127.0.0.1:8265``; not asked before it is needed.

    Every method raises :class:`ClusterError` if no Ray dashboard answers there.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._shown = without_user(self._url)

    def last(self, command: Command) -> Attempt | None:
        """The newest attempt at a command; None: there was none since the cluster started."""
        found = [attempt for attempt in self._attempts() if attempt.name == command.name]
        return max(found, key=lambda attempt: attempt.number, default=None)

    def start(self, command: Command, owner: str, *, once: bool = False) -> Attempt:
        """The attempt that ``owner`` is to wait for: one that runs, by whomever it was submitted, or a new one.

        Args:
            once: the owner wants the command done once: its own attempt that has succeeded is as good.

        Raises:
            SubmittedJobError: the cluster takes no such job.
        """
        while True:
            last = self.last(command)
            if last is not None and (last.is_running or (once and last.owner == owner and last.succeeded)):
                logger.info("following Ray job %s, which is there already", last.submission_id)
                return last
            number = 1 if last is None else last.number + 1
            started = self._submit(command, number, owner)
            if started is not None:
                return started
            # Another was first with this very attempt: look again, and follow it.

    def stop_all(self, owner: str, names: Collection[str]) -> list[Attempt]:
        """Stops what runs and was submitted by ``owner``, or is a command of one of the names.

        Returns:
            What was stopped.

        Raises:
            SubmittedJobError: one goes on for a minute. The others are stopped all the same.
        """
        found = [
            attempt
            for attempt in self._attempts()
            if attempt.is_running and (attempt.owner == owner or attempt.name in names)
        ]
        failures: list[VlmflowError] = []

        def each(step: Callable[[Attempt], Attempt], attempts: Sequence[Attempt]) -> list[Attempt]:
            done = []
            for attempt in attempts:
                try:
                    done.append(step(attempt))
                except VlmflowError as error:
                    failures.append(error)
            return done

        stopped = each(self._wait_for_end, each(self._tell_to_stop, found))  # all are told before one is waited for
        if failures:
            raise failures[0]
        return stopped

    def stop(self, attempt: Attempt) -> Attempt:
        """Stops an attempt and waits until it is over; one that is over already stays as it was.

        Raises:
            SubmittedJobError: it goes on for a minute.
        """
        return self._wait_for_end(self._tell_to_stop(attempt))

    def _tell_to_stop(self, attempt: Attempt) -> Attempt:
        with self._asking() as client:
            client.stop_job(attempt.submission_id)
        return attempt

    def _wait_for_end(self, attempt: Attempt) -> Attempt:
        until = time.monotonic() + _STOP_WAIT_S
        while (now := self._look(attempt)).is_running:
            if time.monotonic() > until:
                raise SubmittedJobError(
                    f"Ray job {attempt.submission_id} was told to stop and still runs",
                    remedy=f"`ray job stop --address {self._shown} {attempt.submission_id}` tries again.",
                )
            time.sleep(_POLL_S)
        return now

    def follow(
        self,
        attempt: Attempt,
        on_line: Callable[[str], None],
        *,
        deadline_s: float | None = None,
        patience_s: float = 300.0,
    ) -> Attempt:
        """Waits for the end of an attempt, giving out its log line by line from the first one.

        Args:
            deadline_s: after its start the attempt is stopped. The start is the cluster's: who follows may change.
            patience_s: for how long the cluster may fail to answer.

        Raises:
            DeadlineError: the attempt was stopped because it ran past its deadline.
            ClusterError: the cluster did not answer for too long. The job may go on.
        """
        seen, answered_at = 0, time.monotonic()
        while True:
            try:
                now = self._look(attempt)  # before the log: what is over has its whole log
                with self._asking() as client:
                    log = client.get_job_logs(attempt.submission_id)
                answered_at = time.monotonic()
            except ClusterError:
                if time.monotonic() - answered_at > patience_s:
                    raise
                time.sleep(_POLL_S)
                continue
            end = len(log) if not now.is_running else log.rfind("\n") + 1
            for line in _LINE_END.split(log[seen:end].removesuffix("\n")) if end > seen else ():
                on_line(line)
            seen = max(seen, end)
            if not now.is_running:
                return now
            cluster_s = time.time() + client.ahead_s  # the start is told by its clock
            if deadline_s is not None and now.started_at is not None and cluster_s - now.started_at > deadline_s:
                self.stop(now)
                raise DeadlineError(
                    f"Ray job {attempt.submission_id} ran for more than {deadline_s / 60:g} minutes and was stopped",
                    remedy="What it committed stays; run it again to go on, or give it more time.",
                )
            time.sleep(max(_POLL_S, len(log) / _LOG_BYTES_PER_S))

    @cached_property
    def _client(self) -> _Client:
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(
                f"Ray Jobs API {self._shown}: not a web address",
                remedy="Give the address of the cluster's dashboard, such as http://ray-head:8265.",
            )
        for variable in _OVERRIDING:
            value = os.environ.get(variable, "").rstrip("/")
            if value not in ("", self._url):
                raise ConfigError(
                    f"Ray Jobs API {self._shown}: {variable} is set to {without_user(value)}, "
                    "and Ray would go there instead",
                    remedy=f"Unset {variable} where the flow runs.",
                )
        return _Client(self._url)

    @contextmanager
    def _asking(self) -> Iterator[_Client]:
        """The client, its errors in our words."""
        try:
            yield self._client
        except _LIBRARY_ERRORS as error:
            raise ClusterError(
                f"Ray Jobs API {self._shown}: {without_user(_first_line(error))}",
                remedy="See whether the cluster's head runs, and whether this is the address of its dashboard.",
            ) from error

    def _attempts(self) -> list[Attempt]:
        """Every attempt at a command of ours that the cluster remembers."""
        with self._asking() as client:
            jobs = client.list_jobs()
        return [attempt for job in jobs if (attempt := _attempt(job)) is not None]

    def _look(self, attempt: Attempt) -> Attempt:
        with self._asking() as client:
            return _attempt(client.get_job_info(attempt.submission_id)) or attempt

    def _submit(self, command: Command, number: int, owner: str) -> Attempt | None:
        """Submits an attempt; None: there is one of that number."""
        submission_id = f"{command.name}-{number}"
        with Workspace() as workspace:
            for name, content in command.files.items():
                (workspace.path / name).write_text(content, encoding="utf-8")
            try:
                with self._asking() as client:
                    client.submit_job(
                        entrypoint=command.entrypoint,
                        submission_id=submission_id,
                        runtime_env={"working_dir": str(workspace.path)} if command.files else {},
                        metadata={OWNER: owner},
                    )
            except ClusterError as error:
                # The number is taken: by another, or by this very request, whose answer was lost.
                last = self.last(command)
                if last is not None and last.number >= number:
                    return None
                if "status code 4" not in str(error.__cause__):
                    raise  # a head that has just started says 500, and to come back later
                raise SubmittedJobError(
                    f"Ray refused job {submission_id}: {error}", remedy="Look at the cluster's dashboard."
                ) from error
        logger.info("submitted Ray job %s: %s", submission_id, command.entrypoint)
        return self.last(command)


def without_user(text: str) -> str:
    """A text without the users and passwords in its web addresses: a dashboard's may have them, for a proxy before it,
    and what is said of it goes to logs and messengers.
    """
    return _USER.sub("", text)


def read_files(paths: Sequence[Path]) -> dict[str, str]:
    """The texts of files that travel with a job, by the last part of their path.

    Raises:
        ConfigError: one cannot be read.
    """
    texts = {}
    for path in paths:
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {_first_line(error)}", remedy="Name a text file.") from error
    return texts


def _attempt(job: JobDetails) -> Attempt | None:
    """What the cluster says of a job; None: it is no attempt at a command of ours."""
    named = _ID.fullmatch(job.submission_id or "")
    if named is None:
        return None
    return Attempt(
        submission_id=named[0],
        name=named[1],
        number=int(named[2]),
        status=JobStatus(job.status),
        owner=(job.metadata or {}).get(OWNER),
        started_at=None if job.start_time is None else job.start_time / 1000,
        exit_code=job.driver_exit_code,
        message=job.message or "",
    )


def _first_line(error: Exception) -> str:
    """What a library said, in one line of bearable length; of a traceback, that is the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if "Traceback" in lines[0] else lines[0])[:300]

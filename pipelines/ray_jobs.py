"""Commands as jobs of a Ray cluster, through its Jobs API. Knows no Prefect.

A job has a name that follows from what it does, and an attempt number: Ray refuses an id that was used. So whoever asks
for a job finds the one that runs already, and two who ask at once end up with one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient

from vlmflow.errors import ClusterError, ConfigError, DeadlineError, SubmittedJobError

logger = logging.getLogger("vlmflow")

_POLL_S = 2.0
# The Jobs API gives logs whole: the longer the log, the more seldom it is asked for, at most a megabyte a second.
_LOG_BYTES_PER_S = 1_000_000
_STOP_WAIT_S = 60.0
OWNER = "vlmflow_flow_run"  # key in a job's metadata: the flow run that submitted it
_MAX_NAME = 100


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
        label = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[:_MAX_NAME]
        return f"vlmflow-{label}-{digest}"

    @property
    def entrypoint(self) -> str:
        """The shell command."""
        return shlex.join(["python", "-m", "vlmflow", *self.arguments])


@dataclass(frozen=True)
class Attempt:
    """One attempt at a command, as the cluster knows it."""

    submission_id: str
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


class RayJobs:
    """The jobs of the cluster behind ``url``, such as ``http://127.0.0.1:8265``.

    Raises:
        ClusterError: no Ray dashboard answers there.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._client = JobSubmissionClient(url)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"Ray Jobs API {url}: {_first_line(error)}",
                remedy="Give the address of the cluster's dashboard, such as http://ray-head:8265.",
            ) from error

    def last(self, command: Command) -> Attempt | None:
        """The newest attempt at a command; None: there was none since the cluster started.

        Raises:
            ClusterError: the cluster does not answer.
        """
        pattern = re.compile(re.escape(command.name) + r"-(\d+)")
        try:
            jobs = self._client.list_jobs()
        except (ConnectionError, RuntimeError) as error:
            raise self._unreachable(error) from error
        found = [(int(match[1]), job) for job in jobs if (match := pattern.fullmatch(job.submission_id or ""))]
        return _attempt(*max(found, key=lambda item: item[0])) if found else None

    def start(self, command: Command, owner: str) -> Attempt:
        """The attempt that ``owner`` is to wait for: one that runs, its own that has ended, or a new one.

        Raises:
            ClusterError: the cluster does not answer.
            SubmittedJobError: it refuses the job.
        """
        while True:
            last = self.last(command)
            if last is not None and (last.is_running or (last.owner == owner and last.succeeded)):
                logger.info("following Ray job %s, which is there already", last.submission_id)
                return last
            number = 1 if last is None else last.number + 1
            started = self._submit(command, number, owner)
            if started is not None:
                return started
            # Another was first with this very attempt: look again, and follow it.

    def stop(self, attempt: Attempt) -> Attempt:
        """Stops an attempt and waits until it is over; one that is over already stays as it was.

        Raises:
            SubmittedJobError: it goes on for a minute.
        """
        try:
            self._client.stop_job(attempt.submission_id)
        except (ConnectionError, RuntimeError) as error:
            raise self._unreachable(error) from error
        until = time.monotonic() + _STOP_WAIT_S
        while (now := self._look(attempt)).is_running:
            if time.monotonic() > until:
                raise SubmittedJobError(
                    f"Ray job {attempt.submission_id} was told to stop and still runs",
                    remedy=f"`ray job stop --address {self._url} {attempt.submission_id}` tries again.",
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
                log = self._client.get_job_logs(attempt.submission_id)
                answered_at = time.monotonic()
            except (ConnectionError, RuntimeError) as error:
                if time.monotonic() - answered_at > patience_s:
                    raise self._unreachable(error) from error
                time.sleep(_POLL_S)
                continue
            end = len(log) if not now.is_running else log.rfind("\n") + 1
            for line in log[seen:end].splitlines():
                on_line(line)
            seen = max(seen, end)
            if not now.is_running:
                return now
            if deadline_s is not None and now.started_at is not None and time.time() - now.started_at > deadline_s:
                self.stop(now)
                raise DeadlineError(
                    f"Ray job {attempt.submission_id} ran for more than {deadline_s / 60:g} minutes and was stopped",
                    remedy="What it committed stays; run it again to go on, or give it more time.",
                )
            time.sleep(max(_POLL_S, len(log) / _LOG_BYTES_PER_S))

    def _look(self, attempt: Attempt) -> Attempt:
        return _attempt(attempt.number, self._client.get_job_info(attempt.submission_id))

    def _submit(self, command: Command, number: int, owner: str) -> Attempt | None:
        """Submits an attempt; None: there is one of that number."""
        submission_id = f"{command.name}-{number}"
        with tempfile.TemporaryDirectory(prefix="vlmflow-job-") as folder:
            for name, content in command.files.items():
                (Path(folder) / name).write_text(content, encoding="utf-8")
            runtime_env: dict[str, Any] = {"working_dir": folder} if command.files else {}
            try:
                self._client.submit_job(
                    entrypoint=command.entrypoint,
                    submission_id=submission_id,
                    runtime_env=runtime_env,
                    metadata={OWNER: owner},
                )
            except (ConnectionError, RuntimeError) as error:
                last = self.last(command)
                if last is not None and last.number >= number:
                    return None
                raise SubmittedJobError(
                    f"Ray refused job {submission_id}: {_first_line(error)}", remedy="Look at the cluster's dashboard."
                ) from error
        logger.info("submitted Ray job %s: %s", submission_id, command.entrypoint)
        return _attempt(number, self._client.get_job_info(submission_id))

    def _unreachable(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"Ray Jobs API {self._url}: {_first_line(error)}", remedy="See whether the cluster's head runs."
        )


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


def _attempt(number: int, job: JobDetails) -> Attempt:
    return Attempt(
        submission_id=job.submission_id or "",
        number=number,
        status=JobStatus(job.status),
        owner=(job.metadata or {}).get(OWNER),
        started_at=None if job.start_time is None else job.start_time / 1000,
        exit_code=job.driver_exit_code,
        message=job.message or "",
    )


def _first_line(error: Exception) -> str:
    """What a library said, in one line of bearable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

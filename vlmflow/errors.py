"""Every error class of vlmflow. A user meets one line that names the thing, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

REMEDY_NOTE = "remedy: "  # begins the line of a traceback that says what the user can do


class VlmflowError(Exception):
    """The root of all errors of vlmflow.

    Args:
        message: names the thing and its value.
        remedy: what the user can do about it, a full sentence.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)  # pickle rebuilds an error from this argument alone, and adds the attributes then
        self.remedy = remedy


@contextmanager
def remedy_noted() -> Iterator[None]:
    """Has the traceback of an error of ours say the remedy, for who is left with the text of it alone."""
    try:
        yield
    except VlmflowError as error:
        if error.remedy:
            error.add_note(f"{REMEDY_NOTE}{error.remedy}")
        raise


class ConfigError(VlmflowError):
    """A job, profile or option that cannot be used as it stands."""


class ConditionError(ConfigError):
    """A condition in SQL that cannot be used: no condition, too long, or over columns that are not there."""


class FamilyError(ConfigError):
    """A family of one's own that cannot be used: its module, its class, the entry in it, or what it loads."""


class SourceError(VlmflowError):
    """The source does not exist, cannot be read, or does not hold what was said of it."""


class EmptySourceError(SourceError):
    """The source lists no image and ``allow_empty`` was not given."""


class StorageAccessError(VlmflowError):
    """The store refused the credentials, or the bucket does not exist."""


class StoreLostError(StorageAccessError):
    """The store went away or withdrew access in the middle of a run; what was committed stays."""

    exit_code = 4


class TransientError(VlmflowError):
    """The store is throttling or out of reach after all retries."""

    exit_code = 4


class ReviewError(VlmflowError):
    """Verdicts that cannot be read, or a queue that cannot be written."""


class ServeError(VlmflowError):
    """The app cannot be started: its port is taken, its token too short, a package absent."""


class TooLargeError(VlmflowError):
    """A request to the app with more bytes than it takes."""


class ExplainError(VlmflowError):
    """A decision that cannot be explained: the image is not there, has changed, or was scored by another model."""


class KnownImagesError(VlmflowError):
    """A list of known images that cannot be used."""


class DetectorError(VlmflowError):
    """A policy names a detector that cannot run here, or that is another than its thresholds were set for."""


class WeightsError(VlmflowError):
    """Weights that are absent, unsafe to load, or that do not fit the architecture."""


class QuestionError(VlmflowError):
    """A question that the model cannot take."""


class PolicyError(VlmflowError):
    """A moderation policy that cannot be used."""


class UnboundPolicyError(PolicyError):
    """The policy's thresholds were not set for this model and these prompts."""


class CalibrationError(PolicyError):
    """Verdicts that cannot be used, or that do not suffice to set thresholds."""


class WorkspaceError(VlmflowError):
    """The temporary folder is full, or cannot be written to."""


class SearchError(VlmflowError):
    """The catalog holds no embeddings that the query can be compared with."""


class CatalogError(VlmflowError):
    """The catalog cannot be opened, or holds what this version does not understand."""


class UnsupportedTableError(CatalogError):
    """Another program has made of a table of the catalog what vlmflow cannot read, or cannot write to."""


class CatalogChangedError(CatalogError):
    """A file of the version being read is gone, and the newest version does without it: an erasure came in between."""

    exit_code = 4


class CommitError(CatalogError):
    """A commit that could not be made whole; nothing of it is in the table."""


class ColumnsError(CatalogError):
    """The caller's columns of some rows could not be updated; what a run has computed is committed before."""


class BackfillError(CatalogError):
    """A backfill cannot begin: another one, to another policy, is at work on the catalog."""


class RunRevokedError(CommitError):
    """The run was taken for dead by a vacuum; what it had not committed is gone."""

    exit_code = 3


class UnreconciledError(VlmflowError):
    """Images went into the run and did not come out as rows."""

    exit_code = 3


class ErrorBudgetError(VlmflowError):
    """Too many bad rows early in the run; nothing was committed."""

    exit_code = 3


class ClusterError(VlmflowError):
    """The Ray cluster cannot be reached or lacks what the job needs."""


class ModelsKilledError(VlmflowError):
    """The process that loads a pool's models is killed each time it does, as by a kernel that is out of memory."""


class ModelMemoryError(VlmflowError):
    """A device has no memory left for a model."""

    REMEDY = (
        "Give it more: fewer tasks in its pool, a larger share of a GPU (gpus) or fewer actors (max_actors), no other "
        "work beside it (on a GPU, `nvidia-smi` tells of it). Or take a smaller model."
    )


# Errors of what may be there again in a while, or is another now: worth another try, where bad input is not.
MAY_PASS = (TransientError, StoreLostError, CatalogChangedError, ClusterError)


class GateError(VlmflowError):
    """The golden set, or the accepted values of it, cannot be used."""


class RegressionError(GateError):
    """What the models make of the golden set is no longer what was accepted; the table was not touched."""

    exit_code = 1


class EvaluationError(VlmflowError):
    """Evaluation data that cannot be read, or that do not hold what the task is measured by."""


class VerificationError(VlmflowError):
    """After a run the catalog does not hold what its source lists, or its own logs name."""

    exit_code = 1


class SubmittedJobError(VlmflowError):
    """A job that was submitted to a Ray cluster failed, was stopped, or cannot be followed."""

    exit_code = 3


class DeadlineError(SubmittedJobError):
    """A submitted job was stopped because it ran past its deadline; what it committed stays."""


class FlowServerError(VlmflowError):
    """The Prefect server that a flow run is to be recorded by does not start, does not answer, or is none."""


class UnsentError(VlmflowError):
    """A message to people that was not sent: it says why, and nothing of the address."""


class InterruptedByUserError(VlmflowError):
    """Ctrl-C, or what a job, a pod or a service is stopped with."""

    exit_code = 130


class RowErrorClass(StrEnum):
    """The closed set of classes under which a row records what went wrong with its image."""

    MISSING = "missing"  # listed, but gone when read
    ACCESS_DENIED = "access_denied"  # this one object was refused
    READ_FAILED = "read_failed"  # the store failed after all retries
    READ_TIMEOUT = "read_timeout"
    ADDRESS_REFUSED = "address_refused"  # a private, loopback or link-local address
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_STATUS = "http_status"
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image, but none of the formats we decode (SVG, PSD, ...)
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TASK_FAILED = "task_failed"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_DIED = "worker_died"
    FRAMES_UNSEEN = "frames_unseen"
    TIMED_OUT = "timed_out"
    ENDPOINT_UNREACHABLE = "endpoint_unreachable"
    ENDPOINT_TIMEOUT = "endpoint_timeout"
    ENDPOINT_BUSY = "endpoint_busy"  # 429 to the last retry
    ENDPOINT_FAILED = "endpoint_failed"  # 5xx to the last retry
    ENDPOINT_REFUSED = "endpoint_refused"  # 4xx: the key, the model or the request
    BAD_ANSWER = "bad_answer"  # empty, malformed, refused, or larger than can be


class ImageError(VlmflowError):
    """One image that cannot be read or decoded; it costs its own row and no other.

    Subclass-free on purpose: the class that a row records is ``error_class``, from a closed set.
    """

    def __init__(self, message: str, *, error_class: RowErrorClass = RowErrorClass.CORRUPT, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.error_class = error_class


class AnswerError(VlmflowError):
    """A model that is asked in words wrote nothing about an image; it costs the row of this image and no other."""


class EndpointError(VlmflowError):
    """One request to an endpoint that brought no answer; it costs the row of its image and no other.

    The message holds no key and nothing that a server has said.
    """

    def __init__(
        self, message: str, *, error_class: RowErrorClass = RowErrorClass.ENDPOINT_FAILED, remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.error_class = error_class

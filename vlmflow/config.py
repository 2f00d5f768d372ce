"""The job: one tree of frozen models, loaded from YAML and checked once.

YAML holds data and no class names, but for the family of a model of one's own.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vlmflow.errors import ConfigError
from vlmflow.families import FAMILIES, Role, is_own
from vlmflow.validation import describe_validation, merged, missing_keys, read_yaml

TaskName = Literal["embed", "detect", "moderate", "caption", "match", "answer"]
TASKS_TO_ASK_FOR = "embed, moderate, caption, match, answer (detect comes with a policy that has detectors)"
RetriedStatus = Literal["failed", "partial", "missing", "unreadable"]
ViewName = Literal["squash", "center", "tiles", "black", "frames"]
Dtype = Literal["auto", "float32", "bfloat16"]
DecodePlace = Literal["auto", "cpu", "pool"]
SourceKind = Literal["auto", "prefix", "manifest", "webdataset", "parquet"]

MIB = 1024 * 1024
# What sets timers takes no more than some decades; nothing of a run is worth waiting a day for.
Seconds = Annotated[float, Field(gt=0, le=86_400)]
# Within this a batch has had its answers from an endpoint, or has given up waiting for them.
ENDPOINT_TIMEOUT_S = 600.0


def _known_tasks(value: object) -> object:
    """Refuses what is no task in one sentence; anything but a list of words is left to the check of types."""
    if isinstance(value, (list, tuple)):
        unknown = [name for name in value if isinstance(name, str) and name not in get_args(TaskName)]
        if unknown:
            raise ValueError(f"no task is called {', '.join(unknown)}; there are {TASKS_TO_ASK_FOR}")
        if not value:
            raise ValueError(f"names none; there are {TASKS_TO_ASK_FOR}")
    return value


def _known_family(name: str) -> str:
    known = [family for family, facts in FAMILIES.items() if not facts.is_packaged]
    if name not in known and not is_own(name):
        raise ValueError(f"no family is called {name}; there are {', '.join(known)}, and your own as module:Class")
    return name


def _in_one_order(views: tuple[ViewName, ...]) -> tuple[ViewName, ...]:
    """However they are listed: what is computed, and the fingerprint of it, are the same."""
    return tuple(view for view in get_args(ViewName) if view in views)


Tasks = Annotated[tuple[TaskName, ...], BeforeValidator(_known_tasks), Field(min_length=1)]


def _plain_url(url: str) -> str:
    """Refuses what a url could hold of secrets: the job is kept in the record of its run."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError("is not a url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must hold no user, password or query: keep the key in an environment variable")
    return url.rstrip("/")


def _at_home(path: Path) -> Path:
    """With the user's home for a ``~``, as in a shell, which job files do not pass through."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where there is no such user)


PlainUrl = Annotated[str, AfterValidator(_plain_url)]
HomePath = Annotated[str, AfterValidator(os.path.expanduser)]


class Frozen(BaseModel):
    """A part of a job: immutable, and an unknown key is an error."""

    # Of values that do not fit, what is raised repeats none: a url may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class StorageConfig(Frozen):
    """How to reach an object store. Credentials come from the environment or the machine's role, never from here."""

    # Of an S3-compatible store, such as http://127.0.0.1:9000, or of Azurite: http://127.0.0.1:10000/devstoreaccount1
    endpoint: PlainUrl | None = None
    region: str | None = None
    anonymous: bool = False  # unsigned requests, for public buckets
    # Of one request. A store that has fallen silent is given up after two, and a worker must live to say so.
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    max_retries: Annotated[int, Field(ge=0)] = 8


class HttpConfig(Frozen):
    """Limits on http(s) urls, which anyone may have put into a manifest."""

    # A worker reads 64 images in four rounds, all of which must end within half an hour.
    timeout_s: Annotated[float, Field(gt=0, le=400)] = 20.0
    max_redirects: Annotated[int, Field(ge=0)] = 5
    allow_private_addresses: bool = False  # loopback, private and link-local hosts
    # Images whose source tells no version are read again when they were last read so long ago; 0: in every run. None:
    # never, and what comes to lie behind an url that has its row is not noticed. Where the bytes of a row came with a
    # strong ETag, or without any and with an old enough Last-Modified, the server is asked whether it still has them
    # (If-None-Match, If-Modified-Since), and its word is taken: a wrong 304 hides that another picture lies there.
    recheck_days: Annotated[float, Field(ge=0, le=3650)] | None = None


class SourceConfig(Frozen):
    """Where images come from."""

    uri: str
    kind: SourceKind = "auto"  # told from the uri: .csv, .jsonl, .parquet, .tar, else a prefix
    uri_column: str = "uri"  # of a manifest
    key_column: str | None = None  # tells rows with the same uri apart
    text_column: str | None = None  # the caller's text that `match` scores
    questions_column: str | None = None  # questions to the image, one or a list, that `answer` asks besides the job's
    regions_column: str | None = None  # of a Parquet file: regions of a detector of yours; see vlmflow.sources.regions
    # Text that was found in the image, for its alternative text. Two jobs over one catalog should name the same column:
    # of two that differ, each makes the alternative texts anew that the other has made.
    found_text_column: str | None = None
    bytes_column: str = "image"  # of a Parquet file of image bytes
    # The caller's columns that rows keep; null: all. One that differs every night, as a time of export does, rewrites
    # every row every night.
    columns: tuple[str, ...] | None = None
    storage: StorageConfig = StorageConfig()
    http: HttpConfig = HttpConfig()
    allow_empty: bool = False

    @model_validator(mode="after")
    def _keeps_what_it_quotes(self) -> Self:
        quoted = self.found_text_column
        if quoted is not None and self.columns is not None and quoted not in self.columns:
            raise ValueError(f"alternative texts quote found_text_column {quoted}: add it to columns")
        return self


class CatalogConfig(Frozen):
    """Where the tables are kept."""

    uri: str
    storage: StorageConfig = StorageConfig()


class ImageLimits(Frozen):
    """Caps checked before an image is decoded, and the time that decoding may take."""

    max_bytes: Annotated[int, Field(gt=0)] = 64 * MIB
    max_pixels: Annotated[int, Field(gt=0)] = 100_000_000  # width x height, from the header
    max_seconds: Seconds = 60.0  # of decoding; what takes longer is taken to hang


class EndpointConfig(Frozen):
    """An OpenAI-compatible server of a vision-language model. The key never stands here, only where it is kept."""

    url: PlainUrl  # of the API, such as https://api.example.com/v1
    model: str
    api_key_env: str | None = None  # the environment variable of the workers that holds the key; None: none is sent
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 8  # requests at once, per actor
    timeout_s: Seconds = 60.0  # of one request
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4  # after 429, 5xx, and connections that fail
    max_side_px: Annotated[int, Field(ge=64, le=2048)] = 512  # of the square that is sent
    input_price: Annotated[float, Field(ge=0)] | None = None  # of a million tokens; None: costs are not counted
    output_price: Annotated[float, Field(ge=0)] | None = None


class ModelConfig(Frozen):
    """Weights of one task: a local folder, a repository of the hub at a pinned revision, or an endpoint."""

    family: Annotated[str, AfterValidator(_known_family)]  # of `vlmflow.families`, or your own: module:Class
    path: HomePath | None = None  # a local folder
    repo: str | None = None  # a hub repository; needs `revision`
    revision: str | None = None  # a commit hash
    architecture: str | None = None  # open_clip's name, where the folder holds no open_clip_config.json
    endpoint: EndpointConfig | None = None  # of the family endpoint
    prompt: str | None = None  # of families that take one; for `answer` with {question} in it. None: ours
    max_answer_tokens: Annotated[int, Field(ge=1, le=512)] = 32  # of families that take a prompt

    @model_validator(mode="after")
    def _family_fits(self) -> Self:
        if (self.family == "endpoint") != (self.endpoint is not None):
            raise ValueError("the family endpoint needs `endpoint`, and no other takes it")
        prompted = [name for name, family in FAMILIES.items() if family.takes_prompt]
        may_take = self.family in prompted or is_own(self.family)  # of one's own the entry says it, once it is imported
        if self.prompt is not None and not (may_take and self.prompt.strip()):
            raise ValueError(f"a prompt is for {', '.join(prompted)}, and must say something")
        if self.architecture is not None and is_own(self.family):
            raise ValueError("architecture is a name of open_clip's, and no family of your own takes it")
        return self


class PoolConfig(Frozen):
    """A group of equal actors that hold the models of one or more tasks."""

    tasks: Tasks
    gpus: Annotated[float, Field(ge=0)] = 0.0  # per actor
    cpus: Annotated[float, Field(gt=0)] = 1.0  # per actor
    min_actors: Annotated[int, Field(ge=1)] = 1
    max_actors: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    # Of one task on one batch, beside another at captions; what takes longer is taken to hang.
    timeout_s: Seconds = ENDPOINT_TIMEOUT_S

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} exceeds max_actors {self.max_actors}")
        return self


class CommitConfig(Frozen):
    """How often finished rows become visible. A killed run loses at most this much work.

    But a run of 1,000 images that count for ``max_error_fraction``, or more, commits nothing before 1,000 of them are
    finished, whatever stands here; with a ``max_error_fraction`` of 1 it does not wait.
    """

    max_rows: Annotated[int, Field(ge=1)] = 5_000
    max_seconds: Annotated[float, Field(gt=0)] = 60.0


class QuarantineConfig(Frozen):
    """Images that took their worker down are run once more, each alone."""

    timeout_s: Seconds = 120.0  # per stage of one image
    max_memory_bytes: Annotated[int, Field(gt=0)] = 4096 * MIB  # beyond what the models need; not limited on GPUs
    # Where many are lost small blocks are tried first; if more than these remain, something else is wrong.
    max_images: Annotated[int, Field(ge=0)] = 2_000


class RayConfig(Frozen):
    """The Ray cluster: an embedded one unless an address is given."""

    address: Annotated[str, Field(min_length=1)] | None = None
    num_cpus: Annotated[int, Field(ge=1)] | None = None  # of the embedded cluster
    object_store_bytes: Annotated[int, Field(gt=0)] | None = None


class Job(Frozen):
    """Everything a run needs to know."""

    source: SourceConfig
    catalog: CatalogConfig
    profile: str
    tasks: Tasks = ("embed", "moderate", "caption", "match")
    models: dict[Role, ModelConfig] = {}  # instead of the profile's
    # Where profiles look for weights; default: $VLMFLOW_MODELS, else ~/.cache/vlmflow/models
    models_dir: Annotated[Path, AfterValidator(_at_home)] | None = None
    questions: tuple[str, ...] = ()  # that `answer` asks of every image
    policy: HomePath | None = None  # a policy file, or the name of one that ships; needed by `moderate`
    accept_unbound: bool = False  # moderate although the policy has no binding for the model: everything is `review`
    date: dt.date | None = None  # logical date; default: today, UTC
    retry: tuple[RetriedStatus, ...] = ()  # rows of these statuses are due again, however often they were tried
    # At most this many images, for a trial. Rows of others listed get the caller's columns all the same.
    limit: Annotated[int, Field(ge=1)] | None = None
    reuse: bool = True  # copy results that the catalog holds for equal bytes, instead of computing them again
    pools: tuple[PoolConfig, ...] = ()  # default: one pool with all tasks
    # Try the pools on some images first, and set batch sizes and numbers of actors by that where `pools` does not.
    preflight: bool = False
    # What moderation and embeddings are made of, where these differ: the whole image, its centre, the length of long
    # ones, transparent ones on black, the frames of animations.
    views: Annotated[tuple[ViewName, ...], AfterValidator(_in_one_order)] = get_args(ViewName)
    max_caption_tokens: Annotated[int, Field(ge=1, le=512)] = 20
    # Of a caption: 1 takes the most probable token at every step; more search for the best caption among so many at a
    # time, and take about as many times longer for the words (not for the image).
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1
    # Images between the start of reading and the end of the last pool: of those a kill loses all that no commit holds.
    # Default: as many as keep every actor at work.
    read_ahead: Annotated[int, Field(ge=1)] | None = None
    # Where JPEGs are decoded: by processors before the pools, or in the first pool on its device (nvJPEG on a GPU);
    # auto: there if it has a GPU. Other formats, and JPEGs that are damaged or of which decoders differ, always by
    # processors.
    decode: DecodePlace = "auto"
    # What the models multiply in; auto: bfloat16 on GPUs with instructions for it, else float32. Processors that have
    # them do about twice as much in it. Detectors, whose scores must not move, always as with auto.
    dtype: Dtype = "auto"
    limits: ImageLimits = ImageLimits()
    commit: CommitConfig = CommitConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    ray: RayConfig = RayConfig()
    # Of the first 1,000 rows, those left out that failed the last time too; 1 turns it off.
    max_error_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks name one twice: {', '.join(self.tasks)}")
        if "moderate" in self.tasks and "embed" not in self.tasks:
            raise ValueError("moderate reads the embeddings: add embed to tasks")
        if "detect" in self.tasks and "moderate" not in self.tasks:
            raise ValueError("detect runs the detectors of a moderation policy: add moderate to tasks, or leave it out")
        if "match" in self.tasks and "caption" not in self.tasks and self.source.text_column is None:
            raise ValueError("match has nothing to score: add caption to tasks, or name source.text_column")
        if "answer" in self.tasks and not self.questions and self.source.questions_column is None:
            raise ValueError("answer has nothing to ask: give questions, or name source.questions_column")
        if any(not question.strip() for question in self.questions):
            raise ValueError("one of the questions is blank: leave it out")
        if "squash" not in self.views:
            raise ValueError("views must include squash, the only one that shows the whole image")
        self._check_pools()
        return self

    def _check_pools(self) -> None:
        if not self.pools:
            return
        pooled = [task for pool in self.pools for task in pool.tasks]
        missing, doubled = set(self.tasks) - set(pooled), len(pooled) != len(set(pooled))
        if missing or doubled:
            raise ValueError(f"every task runs in exactly one pool; missing: {', '.join(sorted(missing)) or 'none'}")
        remote = {role for role, model in self.models.items() if model.family == "endpoint"}
        for pool in self.pools:
            if remote & set(pool.tasks) and pool.timeout_s < ENDPOINT_TIMEOUT_S:
                raise ValueError(f"a pool with an endpoint needs a timeout_s of at least {ENDPOINT_TIMEOUT_S:g}")
        # A pool sees what the pools before it wrote.
        order = {task: index for index, task in enumerate(pooled)}
        for reader, read in (("moderate", "embed"), ("moderate", "detect"), ("match", "caption")):
            if reader in order and read in order and order[reader] < order[read]:
                raise ValueError(f"{reader} reads {read}: list {read} first in pools")


# By keys that are missing: what to do where the command line could have said it.
_REMEDIES = {
    ("profile",): "Name a set of models with --profile or in the job file: `vlmflow profiles` lists them.",
    ("source", "source.uri"): "Name SOURCE, or source: {uri: ...} in the job file.",
    ("catalog", "catalog.uri"): "Name CATALOG, or catalog: {uri: ...} in the job file.",
}


def load_job(
    path: str | Path | None,
    overrides: dict[str, Any] | None = None,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict.copy,
) -> Job:
    """Builds a job from a YAML file and from what the command line says, which wins.

    Args:
        path: a YAML file; None: the overrides alone.
        overrides: a nested mapping with the shape of :class:`Job`; None values are left out. None: the file alone.
        defaults: makes of what the file says what it is taken to say of keys that it lacks or leaves empty.

    Raises:
        ConfigError: the file is absent or not YAML, a key is unknown, or a value does not fit.
    """
    data: Any = {}
    if path is not None:
        try:
            data = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"config {path}: {error.strerror}", remedy="Name an existing YAML file.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a date that there is not
            raise ConfigError(
                f"config {path} is not YAML: {' '.join(str(error).split())[:200]}", remedy="Fix the line named."
            ) from error
        if not isinstance(data, dict):
            raise ConfigError(f"config {path} holds a {type(data).__name__}", remedy="Write `key: value` lines.")
    filled = data | {key: value for key, value in defaults(data).items() if data.get(key) is None}
    try:
        return Job.model_validate(merged(filled, overrides or {}))
    except ValidationError as error:
        message = describe_validation(error, what=str(path or "job"), of=Job)
        missing = missing_keys(error)
        remedies = [remedy for keys, remedy in _REMEDIES.items() if missing & set(keys)]
        raise ConfigError(message, remedy=" ".join(remedies)) from error


def read_secret(variable: str) -> str:
    """The value of an environment variable that a job names, such as the key of an endpoint.

    Raises:
        ConfigError: it is not set on this machine, or can be no key; the message does not hold the value of anything.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"environment variable {variable} is not set on a machine that needs it",
            remedy="Set it where the workers run, or name another with api_key_env.",
        )
    if not (value.isascii() and value.isprintable()):  # a header could not hold it, and the error would show it
        raise ConfigError(
            f"environment variable {variable} holds characters that no key has", remedy="Set it anew, on one line."
        )
    return value


def default_models_dir() -> Path:
    """The folder under which profiles look for weights: ``$VLMFLOW_MODELS``, else ``~/.cache/vlmflow/models``."""
    return _at_home(Path(os.environ.get("VLMFLOW_MODELS") or "~/.cache/vlmflow/models"))

"""The parts of a job: frozen models, each checked when it is made.

What stands below a key is its description: `vlmflow job` and the schema for editors print it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vlmflow.families import FAMILIES, is_own

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


_OTHER_THAN_URL = re.compile(r'[^!-~]|["<>\\^`{|}]')
_KNOWN_FAMILIES = [family for family, facts in FAMILIES.items() if not facts.is_packaged]
_FAMILIES_OF_TASKS = [family for family, facts in FAMILIES.items() if facts.roles]  # others are detectors of policies


def _known_family(name: str) -> str:
    if name not in _KNOWN_FAMILIES and not is_own(name):
        known = ", ".join(_KNOWN_FAMILIES)
        raise ValueError(f"no family is called {name}; there are {known}, and your own as module:Class")
    return name


def in_one_order(views: tuple[ViewName, ...]) -> tuple[ViewName, ...]:
    """However they are listed: what is computed, and the fingerprint of it, are the same."""
    return tuple(view for view in get_args(ViewName) if view in views)


Tasks = Annotated[tuple[TaskName, ...], BeforeValidator(_known_tasks), Field(min_length=1)]


def plain_url(url: str) -> str:
    """Refuses what no server can be asked by, and what a url could hold of secrets: jobs are kept in records of runs.

    Raises:
        ValueError: it is no such url. The message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        is_url = parts.port != 0 and _OTHER_THAN_URL.search(url) is None
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError("is not a url")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and a host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must hold no user, password or query: keep the key in an environment variable")
    return url.rstrip("/")


def _variable(name: str) -> str:
    """Refuses what may be by mistake the secret itself, which records of runs would keep."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) is None:
        raise ValueError(
            "must be the name of an environment variable, such as HTTPS_PROXY; what that holds never stands here"
        )
    return name


def at_home(path: Path) -> Path:
    """With the user's home for a ``~``, as in a shell, which job files do not pass through."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where there is no such user)


Variable = Annotated[str, AfterValidator(_variable)]
PlainUrl = Annotated[str, AfterValidator(plain_url)]
HomePath = Annotated[str, AfterValidator(os.path.expanduser)]


class Frozen(BaseModel):
    """A part of a job: immutable, and an unknown key is an error."""

    # Of values that do not fit, what is raised repeats none: a url may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Described(Frozen):
    """One whose keys have descriptions: what stands below each."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class StorageConfig(Described):
    """How to reach an object store. Credentials come from the environment or the machine's role, never from here."""

    endpoint: PlainUrl | None = None
    """Of an S3-compatible store, such as http://127.0.0.1:9000, or of Azurite: http://127.0.0.1:10000/devstoreaccount1."""
    region: Annotated[str, Field(pattern=r"^[!-~]+$")] | None = None
    """Of the bucket, where the environment does not say it."""
    anonymous: bool = False
    """Unsigned requests, for public buckets."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Of one request. A store that has fallen silent is given up after two, and a worker must live to say so."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """Of a request that failed in passing, with growing delays."""


class HttpConfig(Described):
    """Limits on http(s) urls, which anyone may have put into a manifest."""

    timeout_s: Annotated[float, Field(gt=0, le=400)] = 20.0
    """Of one request. A worker reads 64 images in four rounds, all of which must end within half an hour."""
    max_redirects: Annotated[int, Field(ge=0)] = 5
    """That are followed for one image."""
    allow_private_addresses: bool = False
    """Loopback, private and link-local hosts too."""
    proxy_env: Variable | None = None
    """The environment variable of the workers that holds the url of an HTTP proxy, such as HTTPS_PROXY; default: none
    is used. What a name leads to is then for the proxy to refuse: only addresses written as numbers are checked here.
    """
    recheck_days: Annotated[float, Field(ge=0, le=3650)] | None = None
    """Images whose source tells no version are read again when they were last read so long ago; 0: in every run.
    Default: never, and what comes to lie behind an url that has its row is not noticed. Where the bytes of a row came
    with a strong ETag, or without any and with an old enough Last-Modified, the server is asked whether it still has
    them (If-None-Match, If-Modified-Since), and its word is taken: a wrong 304 hides that another picture lies there.
    """


class SourceConfig(Described):
    """Where images come from."""

    uri: str
    """A folder, an s3://, gs:// or az:// prefix, a manifest, tar shards, or a Parquet file of image bytes."""
    kind: SourceKind = "auto"
    """auto: told from the uri: .csv, .jsonl, .parquet, .tar, else a prefix of images. manifest: the uri may also be a
    folder of such files, or a Delta table."""
    uri_column: str = "uri"
    """Of a manifest."""
    key_column: str | None = None
    """Tells rows with the same uri apart."""
    text_column: str | None = None
    """The caller's text that `match` scores."""
    questions_column: str | None = None
    """Questions to the image, one or a list, that `answer` asks besides the job's."""
    regions_column: str | None = None
    """Of a Parquet file: regions of a detector of yours; see vlmflow/sources/regions.py."""
    found_text_column: str | None = None
    """Text that was found in the image, for its alternative text. Two jobs over one catalog should name the same
    column: of two that differ, each makes the alternative texts anew that the other has made."""
    bytes_column: str = "image"
    """Of a Parquet file of image bytes."""
    columns: tuple[str, ...] | None = None
    """The caller's columns that rows keep; default: all. One that differs every night, as a time of export does,
    rewrites every row every night."""
    storage: StorageConfig = StorageConfig()
    """How the store of the images is reached."""
    http: HttpConfig = HttpConfig()
    """Of images behind http(s) urls."""
    allow_empty: bool = False
    """A source without images is no error."""

    @model_validator(mode="after")
    def _keeps_what_it_quotes(self) -> Self:
        quoted = self.found_text_column
        if quoted is not None and self.columns is not None and quoted not in self.columns:
            raise ValueError(f"alternative texts quote found_text_column {quoted}: add it to columns")
        return self


class CatalogConfig(Described):
    """Where the tables are kept."""

    uri: str
    """A folder, or an s3://, gs:// or az:// prefix."""
    storage: StorageConfig = StorageConfig()
    """How the store of the catalog is reached."""


class ImageLimits(Described):
    """Caps checked before an image is decoded, and the time that decoding may take."""

    max_bytes: Annotated[int, Field(gt=0)] = 64 * MIB
    """Of the file."""
    max_pixels: Annotated[int, Field(gt=0)] = 100_000_000
    """Width x height, from the header."""
    max_seconds: Seconds = 60.0
    """Of decoding; what takes longer is taken to hang."""


class EndpointConfig(Described):
    """An OpenAI-compatible server of a vision-language model. The key never stands here, only where it is kept."""

    url: PlainUrl
    """Of the API, such as https://api.example.com/v1."""
    model: str
    """Its name there."""
    api_key_env: Variable | None = None
    """The environment variable of the workers that holds the key; default: none is sent."""
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests at once, per actor."""
    timeout_s: Seconds = 60.0
    """Of one request."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """After 429, 5xx, and connections that fail."""
    max_side_px: Annotated[int, Field(ge=64, le=2048)] = 512
    """Of the square that is sent."""
    input_price: Annotated[float, Field(ge=0)] | None = None
    """Of a million tokens; default: costs are not counted."""
    output_price: Annotated[float, Field(ge=0)] | None = None
    """The same of what the model writes."""


class ModelConfig(Described):
    """Weights of one task: a local folder, a repository of the hub at a pinned revision, or an endpoint."""

    family: Annotated[str, AfterValidator(_known_family), Field(examples=_FAMILIES_OF_TASKS)]
    """The kind of model, or a class of your own as module:Class; see vlmflow/models/README.md."""
    path: HomePath | None = None
    """A local folder with the weights."""
    repo: str | None = None
    """A hub repository instead; needs `revision`."""
    revision: str | None = None
    """A commit hash."""
    architecture: str | None = None
    """open_clip's name, where the folder holds no open_clip_config.json."""
    endpoint: EndpointConfig | None = None
    """Of the family endpoint."""
    prompt: str | None = None
    """Of families that take one; for `answer` with {question} in it. Default: ours."""
    max_answer_tokens: Annotated[int, Field(ge=1, le=512)] = 32
    """Of families that take a prompt."""

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


class PoolConfig(Described):
    """A group of equal actors that hold the models of one or more tasks."""

    tasks: Tasks
    """What its actors compute."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Per actor; a part of one, and of its memory, too."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Per actor."""
    min_actors: Annotated[int, Field(ge=1)] = 1
    """That are there from the start."""
    max_actors: Annotated[int, Field(ge=1)] = 1
    """That it may grow to."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images that a model is given at once."""
    timeout_s: Seconds = ENDPOINT_TIMEOUT_S
    """Of one task on one batch, beside another at captions; what takes longer is taken to hang."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} exceeds max_actors {self.max_actors}")
        return self


class CommitConfig(Described):
    """How often finished rows become visible. A killed run loses at most this much work.

    But a run of 1,000 images that count for ``max_error_fraction``, or more, commits nothing before 1,000 of them are
    finished, whatever stands here; with a ``max_error_fraction`` of 1 it does not wait.
    """

    max_rows: Annotated[int, Field(ge=1)] = 5_000
    """After so many finished rows."""
    max_seconds: Annotated[float, Field(gt=0)] = 60.0
    """After so long, though there are fewer."""


class QuarantineConfig(Described):
    """Images that took their worker down are run once more, each alone."""

    timeout_s: Seconds = 120.0
    """Per stage of one image."""
    max_memory_bytes: Annotated[int, Field(gt=0)] = 4096 * MIB
    """Beyond what the models need; not limited on GPUs."""
    max_images: Annotated[int, Field(ge=0)] = 2_000
    """Where many are lost small blocks are tried first; if more than these remain, something else is wrong."""


class RayConfig(Described):
    """The Ray cluster: an embedded one unless an address is given."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """Of an existing cluster: host:port, or auto for RAY_ADDRESS, else that of this machine. Default: one inside the
    process."""
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    """Of the embedded cluster; default: what the machine has, or this process may use of it."""
    object_store_bytes: Annotated[int, Field(gt=0)] | None = None
    """Of the embedded cluster; default: Ray's."""

"""The job: one tree of frozen models, loaded from YAML and checked once.

YAML holds data and no class names, but for the family of a model of one's own.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from vlmflow.config_parts import (
    ENDPOINT_TIMEOUT_S,
    MIB,
    TASKS_TO_ASK_FOR,
    CatalogConfig,
    CommitConfig,
    DecodePlace,
    Described,
    Dtype,
    EndpointConfig,
    Frozen,
    HomePath,
    HttpConfig,
    ImageLimits,
    ModelConfig,
    PoolConfig,
    QuarantineConfig,
    RayConfig,
    RetriedStatus,
    SourceConfig,
    SourceKind,
    StorageConfig,
    TaskName,
    Tasks,
    ViewName,
    at_home,
    in_one_order,
)
from vlmflow.errors import ConfigError
from vlmflow.families import Role
from vlmflow.validation import describe_validation, merged, missing_keys, read_yaml

__all__ = [
    "ENDPOINT_TIMEOUT_S",
    "MIB",
    "TASKS_TO_ASK_FOR",
    "CatalogConfig",
    "CommitConfig",
    "Dtype",
    "EndpointConfig",
    "Frozen",
    "HttpConfig",
    "ImageLimits",
    "Job",
    "ModelConfig",
    "PoolConfig",
    "QuarantineConfig",
    "RayConfig",
    "SourceConfig",
    "SourceKind",
    "StorageConfig",
    "TaskName",
    "default_models_dir",
    "load_job",
    "read_secret",
]


class Job(Described):
    """Everything a run needs to know."""

    source: SourceConfig
    catalog: CatalogConfig
    profile: str
    """A named set of models; `vlmflow profiles` lists them."""
    tasks: Tasks = ("embed", "moderate", "caption", "match")
    """What is computed. `match` scores the caption, and the caller's text; `answer` needs questions; `detect` comes
    with a policy that has detectors."""
    models: dict[Role, ModelConfig] = {}
    """By task, instead of the profile's."""
    models_dir: Annotated[Path, AfterValidator(at_home)] | None = None
    """Where profiles look for weights; default: $VLMFLOW_MODELS, else ~/.cache/vlmflow/models."""
    questions: tuple[str, ...] = ()
    """That `answer` asks of every image."""
    policy: HomePath | None = None
    """A policy file, or the name of one that ships, that `moderate` decides by. Default: marketplace; demo with the
    profile starter."""
    accept_unbound: bool = False
    """Moderate although the policy has no binding for the model: every decision is `review`."""
    date: dt.date | None = None
    """Logical date; default: today, UTC."""
    retry: tuple[RetriedStatus, ...] = ()
    """Rows of these statuses are due again, however often they were tried."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many images, for a trial. Rows of others listed get the caller's columns all the same."""
    reuse: bool = True
    """Copy results that the catalog holds for equal bytes, instead of computing them again."""
    pools: tuple[PoolConfig, ...] = ()
    """Default: one with all tasks, on every GPU that is there or may come, else on the processors."""
    preflight: bool = False
    """Try the pools on some images first, and set batch sizes and numbers of actors by that where `pools` does not."""
    views: Annotated[tuple[ViewName, ...], AfterValidator(in_one_order)] = get_args(ViewName)
    """What moderation and embeddings are made of, where these differ: the whole image, its centre, the length of long
    ones, transparent ones on black, the frames of animations. `squash`, the whole image, is always among them."""
    max_caption_tokens: Annotated[int, Field(ge=1, le=512)] = 20
    """Of a caption."""
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1
    """Of a caption: 1 takes the most probable token at every step; more search for the best caption among so many at a
    time, and take about as many times longer for the words (not for the image). vllm and endpoint take 1 alone."""
    read_ahead: Annotated[int, Field(ge=1)] | None = None
    """Images between the start of reading and the end of the last pool: of those a kill loses all that no commit holds.
    Default: as many as keep every actor at work."""
    decode: DecodePlace = "auto"
    """Where JPEGs are decoded: by processors before the pools, or in the first pool on its device (nvJPEG on a GPU);
    auto: there if it has a GPU. Other formats, and JPEGs that are damaged, of which decoders differ, or whose colour
    profile is not one of usual screens or cameras (sRGB, Display P3, Adobe RGB), always by processors."""
    dtype: Dtype = "auto"
    """What the models multiply in; auto: bfloat16 on GPUs with instructions for it, else float32. Processors that have
    them do about twice as much in it. Detectors, whose scores must not move, always as with auto."""
    limits: ImageLimits = ImageLimits()
    commit: CommitConfig = CommitConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    ray: RayConfig = RayConfig()
    max_error_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A run stops before its first commit if more than this part of its first 1,000 images is bad: a wrong prefix, say.
    Those that failed the last time too do not count, and runs of fewer go on. 1 turns it off."""

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
        in_none, in_two = set(self.tasks) - set(pooled), {task for task in pooled if pooled.count(task) > 1}
        if in_none or in_two:
            wrong = [("none", in_none), ("two", in_two)]
            found = [f"in {count}: {', '.join(sorted(tasks))}" for count, tasks in wrong if tasks]
            raise ValueError(f"every task runs in exactly one pool; {'; '.join(found)}")
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
        except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a date that there is not
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
        if any(item["type"] == "extra_forbidden" for item in error.errors(include_url=False, include_input=False)):
            remedies.append("`vlmflow job` prints all keys, and what they mean.")
        raise ConfigError(message, remedy=" ".join(remedies)) from error


def read_secret(variable: str, key: str) -> str:
    """The value of an environment variable that a job names.

    Args:
        key: of the job, that names it.

    Raises:
        ConfigError: it is not set on this machine, or can be no key; the message does not hold the value of anything.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"environment variable {variable} is not set on a machine that needs it",
            remedy=f"Set it where the workers run, or name another with {key}.",
        )
    if not (value.isascii() and value.isprintable()):  # a header could not hold it, and the error would show it
        raise ConfigError(
            f"environment variable {variable} holds characters that do not belong there",
            remedy="Set it anew, on one line.",
        )
    return value


def default_models_dir() -> Path:
    """The folder under which profiles look for weights: ``$VLMFLOW_MODELS``, else ``~/.cache/vlmflow/models``."""
    return at_home(Path(os.environ.get("VLMFLOW_MODELS") or "~/.cache/vlmflow/models"))

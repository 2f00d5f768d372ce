"""One image, here and now: its embedding, labels, decision and caption, without a cluster and without a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict

from vlmflow import schema
from vlmflow.config import Frozen, Job
from vlmflow.imaging import merge_requests
from vlmflow.search.query import decode_image
from vlmflow.tasks.pixels import pixel_columns
from vlmflow.tasks.setup import check_unchanged, load_task, prepare_prompts, prepare_tasks, with_policy

_TASKS = ("embed", "moderate", "caption")


class ImageDescription(Frozen):
    """What vlmflow says of one image.

    Attributes:
        content_hash: sha256 of the bytes, hexadecimal.
        width: in pixels as displayed, as is ``height``.
        vectors: by view, unit vectors of D float32 numbers; empty: the job does not embed.
        caption: None: the job does not caption.
        labels: as in the images table; None: the job does not moderate.
        decision: allow, review or block; `review` (``unscored``) where the job does not moderate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    content_hash: str
    format: str
    width: int
    height: int
    vectors: dict[str, tuple[float, ...]] = {}
    labels: tuple[dict[str, Any], ...] | None = None
    decision: str = "review"
    decision_reason: str | None = "unscored"
    caption: str | None = None

    def vector(self, view: str = "squash") -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """(D,) float32, of unit length."""
        return np.array(self.vectors[view], np.float32)


class ImageDescriber:
    """Loads the models of a job once, on the CPU, and describes images one by one.

    Args:
        job: profile, policy, models and limits count; of its tasks, embed, moderate and caption are run.

    Raises:
        ConfigError: the profile is unknown.
        WeightsError: weights are absent or do not fit.
        ModelMemoryError: there is no memory left for a model.
        PolicyError: the policy cannot be used, or was not set for the model.
    """

    def __init__(self, job: Job) -> None:
        tasks = tuple(task for task in _TASKS if task in job.tasks)
        setup = prepare_tasks(with_policy(job.model_copy(update={"tasks": tasks})))
        prompts = prepare_prompts(setup)
        if setup.detectors:
            tasks = tuple(name for task in tasks for name in (("detect", task) if task == "moderate" else (task,)))
        shown = [setup.requests[role] for role in ("embed", "caption") if role in setup.requests]
        self._requests = merge_requests([*shown, *(detector.request for detector in setup.detectors)])
        self._tasks = [load_task(task, setup, prompts, "cpu") for task in tasks]
        check_unchanged(setup)
        self._limits = job.limits

    def describe(self, image: str | Path | bytes) -> ImageDescription:
        """Describes one image.

        Args:
            image: a file, or the bytes of one.

        Raises:
            ImageError: it cannot be decoded, or exceeds the limits.
            ConfigError: the file cannot be read.
        """
        decoded = decode_image(image, self._requests, self._limits)
        columns: dict[str, pa.Array[Any]] = {}
        for request in self._requests:
            pixels, views = pixel_columns(request)
            pairs = decoded.pixels[request.key]
            columns[pixels] = pa.array([[np.ascontiguousarray(p).tobytes() for _, p in pairs]], pa.list_(pa.binary()))
            columns[views] = pa.array([[view for view, _ in pairs]], pa.list_(pa.string()))
        unseen = [{"stage": "frames", "class": "frames_unseen", "message": decoded.unseen}] if decoded.unseen else []
        batch = pa.table({**columns, "errors": pa.array([unseen], schema.ERRORS)})
        found: dict[str, Any] = {}
        for task in self._tasks:
            made = task(batch)
            for name, values in made.items():
                batch = batch.append_column(name, values)
                found[name] = values[0].as_py()
        facts = decoded.facts
        vectors = dict(zip(found.pop("vector_views", []), map(tuple, found.pop("vectors", [])), strict=True))
        labels = found.pop("labels", None)
        found.pop("detections", None)
        return ImageDescription(
            content_hash=facts.content_hash,
            format=facts.format,
            width=facts.width,
            height=facts.height,
            vectors=vectors,
            labels=None if labels is None else tuple(labels),
            **found,
        )


def describe_image(image: str | Path | bytes, job: Job) -> ImageDescription:
    """Describes one image, on the CPU; see :class:`ImageDescriber`, which is faster for more than one.

    Args:
        image: a file, or the bytes of one.
        job: profile, policy, models and limits count; source and catalog are not looked at.

    Raises:
        ImageError: the image cannot be decoded, or exceeds the limits.
        ConfigError: the file cannot be read, or the profile is unknown.
        WeightsError, ModelMemoryError, PolicyError: as :class:`ImageDescriber`.
    """
    return ImageDescriber(job).describe(image)

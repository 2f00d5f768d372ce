"""Runs a job over evaluation data into a scratch or a kept catalog, and reads back what came out.

It is the engine that enriches catalogs: distributed over Ray, every image with its row, and a kept catalog goes on
where it was interrupted.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.catalog.file_info import FileInfo
from vlmflow.catalog.files import UNKNOWN_RUN_AGE
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import by_model
from vlmflow.catalog.keys import index_of, to_binary, to_words
from vlmflow.catalog.runs import new_run_id
from vlmflow.config import CatalogConfig, Job, ModelConfig, SourceConfig
from vlmflow.engine import enrich
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.faults import get
from vlmflow.engine.garbage import collected_once
from vlmflow.engine.prepare import Prepared, prepare
from vlmflow.engine.progress import ProgressDisplay
from vlmflow.errors import ConfigError, EvaluationError
from vlmflow.evaluation.dataset import Dataset, EvaluationTask
from vlmflow.models import pixel_request, resolve_models
from vlmflow.moderation.policy import Policy
from vlmflow.schema import fingerprint_column
from vlmflow.sources.uris import image_ids
from vlmflow.storage import parse_address
from vlmflow.validation import describe_validation
from vlmflow.workspace import Workspace

logger = logging.getLogger("vlmflow")

VIEW = "squash"  # the whole image: what benchmarks measure
_TEXTS_AT_LEAST = 256  # per Ray task: fewer would load the model for nothing

# Of each task: what runs, and the column that holds its result.
_RUNS: dict[EvaluationTask, tuple[tuple[str, ...], str]] = {
    "retrieval": (("embed",), "embed"),
    "zeroshot": (("embed",), "embed"),
    "caption": (("caption",), "caption"),
    "match": (("match",), "match"),
    "moderate": (("embed", "moderate"), "moderate"),
    "answer": (("answer",), "answer"),
}
_WHOLE_IMAGE: tuple[EvaluationTask, ...] = ("retrieval", "zeroshot")
# Of `moderate`, what it also takes to know the policy, and what the models decide where people or lists have.
_OF_MODERATION = ("policy_digest", "decision", "decision_reason", "verdict")


@contextlib.contextmanager
def scratch_catalog(job: Job, scratch: str | None, prefix: str) -> Iterator[CatalogConfig]:
    """A place for a catalog, removed afterwards with all that was written to it.

    So is, before, what others left there that were killed a day ago or more.

    Args:
        scratch: where it is made, in a folder of its own; None: a temporary folder of this machine.
    """
    if scratch is None:
        with Workspace() as workspace:
            yield CatalogConfig(uri=str(workspace.path / "catalog"))
        return
    place = CatalogConfig(uri=scratch.rstrip("/"), storage=job.catalog.storage)
    for name in Folder(place).folders():
        left = _inside(place, name)
        if re.fullmatch(rf"{prefix}-\d{{8}}T\d{{6}}-[0-9a-f]{{8}}", name) and _is_forsaken(left):
            _remove(left)
    config = _inside(place, f"{prefix}-{new_run_id()}")
    try:
        yield config
    finally:
        _remove(config)


def _inside(place: CatalogConfig, name: str) -> CatalogConfig:
    return CatalogConfig(uri=f"{place.uri}/{name}", storage=place.storage)


def _files(config: CatalogConfig) -> list[FileInfo]:
    folder = Folder(config)
    return [*folder.list(""), *folder.unfinished("")]


def _is_forsaken(config: CatalogConfig) -> bool:
    """Whether nothing was written to a scratch catalog for a day: who works on one gives signs of life there."""
    since = dt.datetime.now(dt.UTC) - UNKNOWN_RUN_AGE
    files = _files(config)
    return bool(files) and all(info.modified_at < since for info in files)


def _remove(config: CatalogConfig) -> None:
    left = Folder(config).delete_all([info.path for info in _files(config)])
    if left:
        logger.warning("%d files of the scratch catalog %s could not be removed", len(left), config.uri)
    elif (place := parse_address(config.uri)).is_local:
        shutil.rmtree(place.path, ignore_errors=True)  # a disk keeps empty folders


def trial_job(job: Job, what: str, **changes: Any) -> Job:
    """The job with other parts, checked anew.

    Raises:
        ConfigError: they do not fit.
    """
    try:
        return Job.model_validate(job.model_dump() | changes)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, what=what)) from error


class Run:
    """What the models make of a data set; N: its rows, in their order.

    Args:
        job: profile, models, pools and cluster count; source, tasks and catalog are put in their place.
        keep: the catalog; it is kept, and only what is due is done.
    """

    def __init__(self, job: Job, data: Dataset, keep: CatalogConfig, progress: ProgressDisplay | None) -> None:
        self._data = data
        self._job = _job_for(job, data, keep)
        with Workspace() as workspace:
            manifest = workspace.path / "data.parquet"
            columns = _manifest(data)
            pq.write_table(columns, manifest)
            source = self._job.source.model_dump() | {"uri": str(manifest)}
            enrich(self._job.model_copy(update={"source": SourceConfig(**source)}), progress=progress)
        self.prepared: Prepared = prepare(self._job)
        keys = columns["key"].to_pylist() if "key" in columns.column_names else None
        self._ids = image_ids(columns["uri"].to_pylist(), keys)
        self._index = index_of(to_binary(pa.array(self._ids, pa.string())))
        if len(self._index) != len(set(self._ids)):
            raise EvaluationError(f"{data.name} lists an image twice", remedy="List it once, with all that is true.")
        self._catalog = Catalog.open(keep)

    def column(self, *names: str) -> pa.Table:
        """(N,) rows of the images table, in the order of the data; null where there is none of these models.

        Decisions are those of the models, whatever people or lists of known images have decided instead.
        """
        task = _RUNS[self._data.task][1]
        mark = fingerprint_column(task)
        wanted = self.prepared.fingerprints[task]
        policy = self.prepared.setup.policy if task == "moderate" else None
        read = dict.fromkeys(("image_id", mark, *names, *(_OF_MODERATION if task == "moderate" else ())))
        parts, places = [], []
        for batch in map(by_model, self._catalog.image_batches(list(read))):
            at = self._index.find(*to_words(to_binary(batch["image_id"])))
            # Values of another model may stand in a kept catalog, where this one failed on the image.
            kept = (at >= 0) & pc.fill_null(pc.equal(batch[mark], wanted), False).to_numpy()
            if policy is not None:
                self._check_policy(batch["policy_digest"].filter(pa.array(kept)), policy)
            parts.append(batch.select(list(names)).filter(pa.array(kept)))
            places.append(at[kept])
        table = pa.concat_tables(parts)
        where = np.full(len(self._ids), -1)
        where[np.concatenate(places)] = np.arange(table.num_rows)
        return table.take(pa.array(where, mask=where < 0))

    def _check_policy(self, digests: pa.ChunkedArray, policy: Policy) -> None:
        """The fingerprint leaves the policy out, and a kept catalog keeps its decisions."""
        if pc.all(pc.equal(digests, policy.digest)).as_py() is False:
            raise EvaluationError(
                f"catalog {self._job.catalog.uri} holds decisions of another policy than {policy.name}",
                remedy="Put it under this one with `vlmflow remoderate`, or name another --catalog.",
            )

    def vectors(self) -> NDArray[np.float32]:
        """(N, D) the embeddings of the whole images; a row of nan where there is none."""
        found: NDArray[np.float32] | None = None
        wanted = self.prepared.fingerprints["embed"]
        columns = ["image_id", "view", "vector", "embed_fingerprint"]
        for batch in self._catalog.embedding_batches(columns, of=self._index):
            at = self._index.find(*to_words(to_binary(batch["image_id"])))
            own = pc.and_(pc.equal(batch["view"], VIEW), pc.equal(batch["embed_fingerprint"], wanted))
            kept = (at >= 0) & pc.fill_null(own, False).to_numpy()
            if not kept.any():
                continue
            rows = pc.list_flatten(batch["vector"].filter(pa.array(kept))).to_numpy()
            vectors = rows.reshape(int(kept.sum()), -1)
            if found is None:
                found = np.full((len(self._ids), vectors.shape[1]), np.nan, np.float32)
            found[at[kept]] = vectors
        if found is None:
            raise self.nothing()
        return found

    def nothing(self) -> EvaluationError:
        """The error for data of which no image came to anything, with what the first one's row says."""
        told = ""
        for batch in self._catalog.image_batches(["image_id", "uri", "errors"]):
            at = self._index.find(*to_words(to_binary(batch["image_id"])))
            rows = batch.filter(pa.array(at >= 0)).slice(0, 1).to_pylist()
            if rows:
                reasons = [f"{error['class']}: {error['message']}" for error in rows[0]["errors"] or ()]
                told = f"; {rows[0]['uri']}: {', '.join(reasons) or 'no result'}"
                break
        return EvaluationError(
            f"none of the {len(self._ids):,} images of {self._data.name} has a result{told}",
            remedy="Check --images: are they where the data file says?",
        )

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(M, D) unit vectors of texts, computed on the cluster, a part a Ray task."""
        config = self.prepared.setup.models["embed"]
        gpus = max((pool.gpus for pool in self._job.pools if "embed" in pool.tasks), default=0.0)
        with ray_cluster(self._job.ray) as cluster:
            share = max(_TEXTS_AT_LEAST, -(-len(texts) // max(1, int(cluster.cpus))))
            encode = ray.remote(num_cpus=1, num_gpus=gpus)(_encode)
            parts = [
                encode.remote(config, list(texts[start : start + share]), "cuda" if gpus else "cpu")
                for start in range(0, len(texts), share)
            ]
            return np.concatenate([get(part) for part in parts])


@collected_once()
def _encode(config: ModelConfig, texts: list[str], device: str) -> NDArray[np.float32]:
    from vlmflow.models import load_embedder

    return load_embedder(config, device).embed_texts(texts)


def _job_for(job: Job, data: Dataset, catalog: CatalogConfig) -> Job:
    """The job that computes what the task is measured by."""
    tasks, _ = _RUNS[data.task]
    source: dict[str, Any] = {"uri": "data.parquet", "kind": "manifest", "storage": job.source.storage.model_dump()}
    source |= {"http": job.source.http.model_dump()}
    if data.task == "match":
        source |= {"text_column": "text", "key_column": "key"}
    if data.task == "answer":
        source |= {"questions_column": "questions"}
    changes: dict[str, Any] = {
        "source": source,
        "catalog": catalog.model_dump(),
        "tasks": tasks,
        "limit": None,
        "retry": (),
        "pools": _pools(job, tasks),
        "questions": (),  # the data's own alone
        "max_error_fraction": 1.0,  # what cannot be read counts as wrong
    }
    if data.task in _WHOLE_IMAGE:
        changes["views"] = (VIEW,)
    trial = trial_job(job, f"evaluate {data.task}", **changes)
    for role, config in resolve_models(trial).items():
        if pixel_request(role, config, trial.views) is None:
            raise EvaluationError(
                f"evaluate {data.task}: models.{role} reads regions from a column of the source, and {data.name} is "
                "evaluated without",
                remedy="Evaluate a model that finds its regions itself, or one of pixels.",
            )
    return trial


def _pools(job: Job, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """The job's pools with these tasks alone; one that holds none of them is left out.

    Whether `detect` belongs to `moderate` only the policy says: where the job has a place for it, it keeps that.
    """
    wanted = {*tasks, "detect"} if "moderate" in tasks else set(tasks)
    pools = []
    for pool in job.pools:
        own = tuple(task for task in pool.tasks if task in wanted)
        if own:
            pools.append(pool.model_dump() | {"tasks": own})
    pooled = {task for pool in pools for task in pool["tasks"]}
    return pools if pooled - {"detect"} == set(tasks) else []


def _manifest(data: Dataset) -> pa.Table:
    """What goes in: the images, and the texts or questions that the task needs; never the truth."""
    rows = data.rows
    if data.task == "match":
        return rows.select(["uri", "key", "text"])
    if data.task == "answer":
        questions = [[question["question"] for question in several] for several in rows["questions"].to_pylist()]
        return pa.table({"uri": rows["uri"], "questions": pa.array(questions, pa.list_(pa.string()))})
    return rows.select(["uri"])

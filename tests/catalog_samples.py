"""Rows for tests of the catalog: references, planned rows with results, and a small catalog."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest

from vlmflow import schema
from vlmflow.catalog import Catalog, CommitResult, PlanRequest, RunConstants
from vlmflow.catalog.detections import Detection
from vlmflow.catalog.keys import digest_of
from vlmflow.config import CatalogConfig, Job

TASKS = ("embed", "moderate", "caption", "match")
DATE = dt.date(2026, 3, 1)
DIM = 4

# What a store might do otherwise than a disk is always tried on both.
on_both_stores = pytest.mark.parametrize("config", ["local", "s3"], indirect=True)


def fingerprints(tasks: Sequence[str] = TASKS, **other: str) -> dict[str, str]:
    return {task: other.get(task, f"{task}-1") for task in tasks}


def request(
    tasks: Sequence[str] = TASKS, *, date: dt.date = DATE, limit: int | None = None, **given: Any
) -> PlanRequest:
    return PlanRequest(
        tasks=tuple(tasks),
        fingerprints=given.get("fingerprints") or fingerprints(tasks),
        policy_digest=given.get("policy", "policy-1"),
        decoder=given.get("decoder", "decoder-1"),
        date=date,
        limit=limit,
        retry=given.get("retry", ()),
        detections=given.get("detections", ()),
        read_before=given.get("read_before"),
        found_text_column=given.get("found_text_column"),
    )


def constants(run_id: str, asked: PlanRequest) -> RunConstants:
    return RunConstants(
        run_id=run_id,
        tasks=asked.tasks,
        fingerprints=asked.fingerprints,
        models={"embed": "clip@1", "caption": "blip@1", "match": "itm@1"},
        policy_name="demo",
        policy_version="1",
        policy_digest=asked.policy_digest,
        decoder=asked.decoder,
        found_text_column=asked.found_text_column,
    )


def image_id(name: str, *key: str) -> str:
    return digest_of(f"mem://{name}", *key)


def references(
    names: Iterable[str],
    *key: str,
    version: str | Mapping[str, str | None] | None = "v1",
    text: str | None = None,
    questions: Sequence[str] | None = None,
    source: Sequence[Mapping[str, Any]] | None = None,
    source_type: pa.DataType | None = None,
) -> pa.RecordBatch:
    names = list(names)
    versions = [version[name] if isinstance(version, Mapping) else version for name in names]
    columns: dict[str, Any] = {
        "image_id": [image_id(name, *key) for name in names],
        "uri": [f"mem://{name}" for name in names],
        "key": [*key] * len(names),
        "object_version": versions,
        "size_bytes": [10] * len(names),
        "locator": names,
        "offset": None,
        "length": None,
        "row": None,
        "regions_row": None,
        "text": [text] * len(names),
        "questions": [questions] * len(names),
    }
    arrays = [pa.array(columns[f.name] or [None] * len(names), f.type) for f in schema.REFERENCE]
    fields = list(schema.REFERENCE)
    if source is not None:
        arrays.append(pa.array(source, source_type))
        fields.append(pa.field("source", arrays[-1].type))
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def error(stage: str, kind: str) -> dict[str, str]:
    return {"stage": stage, "class": kind, "message": f"{stage} {kind}"}


def finish(
    planned: pa.Table,
    *,
    content: str = "bytes",
    caption: str = "a cat",
    decision: str = "allow",
    failed: Sequence[str] = (),
    problem: tuple[str, str] | None = None,
    run: Sequence[str] | None = None,
    version: str | None = None,
    validator: str | None = None,
    unseen: bool = False,
    detections: Sequence[Detection] = (),
    phash: str | None = None,
) -> pa.Table:
    """What the pipeline would hand over for planned rows: all due tasks run, unless said otherwise.

    Args:
        content: the bytes of every image; its rows' content_hash.
        failed: tasks that fail on every row.
        problem: stage and class of an error of the whole image.
        run: tasks that ran; default: as planned.
        version: as read; default: as listed.
        validator: by which a server can be asked whether it has the bytes yet.
        unseen: some frames of every image were not looked at.
        detections: that `detect` stores of every image.
    """
    rows = planned.to_pylist()
    out = []
    for row in rows:
        content_hash = None if problem else f"{content}-{row['uri']}"
        due = row["due_if_same"] if row["replaces"] and content_hash == row["previous_hash"] else row["due"]
        ran = [] if problem else [task for task in (due if run is None else run) if task not in failed]
        missed = [] if problem else [task for task in due if task in failed]
        errors = [error(task, "task_failed") for task in missed]
        if problem:
            errors = [error(*problem)]
        if unseen:
            errors.append(error("frames", "frames_unseen"))
        row = dict(row, content_hash=content_hash, errors=errors, tasks_run=ran, tasks_failed=missed)
        row |= {"object_version": version or row["object_version"], "http_validator": validator}
        row |= {"format": None if problem else "png", "width": None if problem else 8, "height": None if problem else 8}
        row |= {"mode": None, "num_frames": None, "phash": None if problem else phash}
        row |= results(ran, caption, decision)
        if "detect" in ran:
            seen = {"score": 0.1, "view": "squash", "time_s": None}
            row["detections"] = [detection._asdict() | seen for detection in detections]
        out.append(row)
    read = [pa.field("http_validator", pa.string()), *schema.FACTS]
    columns = pa.schema([*planned.schema, *read, *schema.OUTCOME, *schema.WRITER_OPTIONAL])
    return pa.Table.from_pylist(out, schema=columns)


def results(ran: Sequence[str], caption: str, decision: str) -> dict[str, Any]:
    label = {"label": "cat", "category": "animal", "margin": 0.1, "score": 0.6, "decision": decision, "view": "squash"}
    out: dict[str, Any] = {}
    if "embed" in ran:
        out |= {"vectors": [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], "vector_views": ["squash", "center"]}
    if "moderate" in ran:
        out |= {"labels": [label], "decision": decision, "decision_reason": "cat"}
    if "caption" in ran:
        out["caption"] = caption
    if "match" in ran:
        out |= {"caption_itm": 0.9, "caption_itc": 0.4}
    return out


def config_of(folder: object) -> CatalogConfig:
    return CatalogConfig(uri=str(folder))


def open_catalog(folder: object, source: pa.Schema | None = None) -> Catalog:
    return Catalog.open_or_create(config_of(folder), source or pa.schema([]))


def write(
    catalog: Catalog, run_id: str, batches: Iterable[pa.RecordBatch], asked: PlanRequest | None = None, **given: Any
) -> pa.Table:
    """Plans and writes, without a commit; ``given`` goes to :func:`finish`. Returns the descriptors."""
    asked = asked or request()
    with catalog.plan(batches, asked) as plan:
        writer = catalog.writer(constants(run_id, asked), plan.version)
        tables = [writer.write(finish(planned, **given)) for planned in plan.batches()]
    return pa.concat_tables([schema.DESCRIPTOR.empty_table(), *tables])


def enrich(
    catalog: Catalog, run_id: str, batches: Iterable[pa.RecordBatch], asked: PlanRequest | None = None, **given: Any
) -> CommitResult:
    """Plans, writes and commits in one go."""
    return catalog.commit(run_id, write(catalog, run_id, batches, asked, **given))


def rows_of(job: Job) -> dict[str, dict[str, Any]]:
    """The live rows of a job's catalog by the last part of their address."""
    return {row["uri"].rsplit("/", 1)[-1]: row for row in Catalog.open(job.catalog).images().to_pylist()}


def rows_by_name(catalog: Catalog) -> dict[str, dict[str, Any]]:
    """The live rows by the name of their image; fails on a key that is there twice."""
    rows = catalog.images().to_pylist()
    found = {row["uri"].removeprefix("mem://"): row for row in rows}
    assert len(found) == len(rows), "a key is in the table twice"
    return found

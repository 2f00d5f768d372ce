"""A large catalog made of the demo: real rows many times over, each with an address, bytes and a vector of its own.

The demo is enriched once. Every night of the large catalog holds 5,000 rows drawn from its rows, committed as a run
commits them (a file of each table, the log's entries, a run record), whose images are hard links to the demo's files:
a listing has as many files as the catalog has rows, and they take no room.

- 3 of 100 rows keep the hash of the bytes that they are drawn from; all others have one of their own;
- 5 of 100 keep their looks (pHash) and nearly their vector (cosine 0.98); all others have looks of their own, and a
  cosine of 0.8 with it;
- margins and scores are up to 1% others. Decisions, captions and the caller's columns stay.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from benchmarks.planning import hexadecimal
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import flat
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.writer import write_file
from vlmflow.config import CatalogConfig
from vlmflow.sources.uris import ids_of_normalised

NIGHT_ROWS = 5_000
SAME_BYTES, SAME_LOOKS = 0.03, 0.05
NEAR, FAR = 0.2, 0.75  # length of what is added to a vector, by which its cosine with what it was becomes 0.98 or 0.8
FURTHER = 100
DEMO = Path(__file__).parents[1] / "vlmflow/starter/demo"
LAST_DAY = dt.date(2026, 3, 1)


def make_catalog(root: Path, num_rows: int) -> None:
    """Makes ``root/catalog`` of the images in ``root/pictures``.

    ``root/list.csv`` names each of them, ``root/more.csv`` 100 further ones beside, which are in ``root/further``.
    """
    demo, small = root / "demo", root / "small"
    shutil.copytree(DEMO, demo)
    command = [sys.executable, "-m", "vlmflow", "enrich", str(demo / "manifest.csv"), str(small)]
    subprocess.run([*command, "--profile", "starter", "--text-column", "title"], check=True)
    drawn_from = Catalog.open(CatalogConfig(uri=str(small)))
    rows, vectors = drawn_from.images().combine_chunks(), drawn_from.embeddings().combine_chunks()
    large = Large(root, drawn_from.runs.list()[0].record, pa.schema(list(rows.schema.field("source").type)))
    shutil.copytree(small / "policies", root / "catalog/policies")
    listed = []
    for night in range(-(-num_rows // NIGHT_ROWS)):
        count = min(NIGHT_ROWS, num_rows - night * NIGHT_ROWS)
        drawn = np.random.default_rng((night, 3)).integers(0, rows.num_rows, count)
        date = LAST_DAY - dt.timedelta(days=night)
        listed.append(large.add_night(night, date, rows.take(pa.array(drawn)), vectors))
    csv.write_csv(pa.concat_tables(listed), root / "list.csv")
    csv.write_csv(pa.concat_tables([*listed, _further(root)]), root / "more.csv")


class Large:
    """The catalog that is being made."""

    def __init__(self, root: Path, record: dict[str, Any], columns: pa.Schema) -> None:
        self._root, self._record = root, record
        config = CatalogConfig(uri=str(root / "catalog"))
        self._catalog = Catalog.open_or_create(config, columns)
        self._folder = Folder(config)
        self._logs = [TableLog.open(self._folder, "embeddings"), TableLog.open(self._folder, "images")]

    def add_night(self, night: int, date: dt.date, drawn: pa.Table, vectors: pa.Table) -> pa.Table:
        """Adds rows as a run does; returns what a manifest says of them.

        Args:
            drawn: rows of the demo, one for each new row.
            vectors: of the demo.
        """
        run_id, count = f"{date:%Y%m%d}T020000-{night:08x}", drawn.num_rows
        random = np.random.default_rng((night, 4))
        is_near = random.random(count) < SAME_LOOKS
        uris = self._linked(night, drawn["uri"].to_pylist())
        ids = pa.array(ids_of_normalised(uris, None))
        when = pa.scalar(dt.datetime.combine(date, dt.time(2), dt.UTC), schema.TIMESTAMP)
        keeps_bytes = pa.array(random.random(count) < SAME_BYTES)
        looks = pc.utf8_slice_codeunits(hexadecimal((night, 6), count), 0, 16)
        drawn_hash, drawn_looks = drawn["content_hash"], drawn["phash"]
        given: dict[str, Any] = {
            "image_id": ids,
            "uri": pa.array(uris),
            "content_hash": pc.if_else(pc.or_(keeps_bytes, pc.is_null(drawn_hash)), drawn_hash, _hashes(night, count)),
            "phash": pc.if_else(pc.or_(pa.array(is_near), pc.is_null(drawn_looks)), drawn_looks, looks),
            "labels": _changed_labels(flat(drawn["labels"]), random),
            "run_id": pa.repeat(run_id, count),
            "embed_run_id": pc.if_else(pc.is_null(drawn["embed_run_id"]), None, run_id),
            "ingest_date": pa.repeat(pa.scalar(date, pa.date32()), count),
            "updated_at": pa.repeat(when, count),
            "read_at": pa.repeat(when, count),
        }
        rows = drawn
        for name, values in given.items():
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), values)
        self._commit("embeddings", run_id, date, _vectors_of(rows, drawn["image_id"], vectors, is_near, random))
        self._commit("images", run_id, date, rows)
        record = {**self._record, "run_id": run_id, "date": date.isoformat(), "source": str(self._root / "list.csv")}
        times = {"started_at": f"{date}T02:00:00Z", "finished_at": f"{date}T02:10:00Z"}
        counts = {"num_listed": count, "num_due": count, "num_added": count}
        self._catalog.runs.start(run_id, record)
        self._catalog.runs.finish(run_id, {**record, **times, **counts, "catalog": str(self._root / "catalog")})
        return pa.table({"uri": uris, **{name: pc.struct_field(rows["source"], name) for name in ("id", "title")}})

    def _linked(self, night: int, uris: list[str]) -> list[str]:
        """Links to images, in a folder of the night; their addresses."""
        folder = self._root / f"pictures/{night:04d}"
        folder.mkdir(parents=True)
        names = [f"{folder}/{number:04d}-{Path(uri).name}" for number, uri in enumerate(uris)]
        for uri, name in zip(uris, names, strict=True):
            os.link(uri, name)
        return names

    def _commit(self, table: str, run_id: str, date: dt.date, rows: pa.Table) -> None:
        log = next(log for log in self._logs if log.name == table)
        file = write_file(self._folder, log.name, rows, date, run_id)
        request = CommitRequest(f"{run_id}-{table}", run_id, "enrich", log.refresh().version)
        commit(log, request, lambda _: Change(add=(file,)))


def _hashes(night: int, count: int) -> pa.Array:
    """Hashes of bytes that nobody has."""
    return pc.binary_join_element_wise(hexadecimal((night, 5), count), hexadecimal((night, 7), count), "")


def _changed_labels(labels: pa.ListArray, random: np.random.Generator) -> pa.ListArray:
    """The same labels with other margins and scores, by up to 1%."""
    items = labels.flatten()
    factor = pa.array(random.uniform(0.99, 1.0, len(items)).astype(np.float32))
    members = [
        pc.multiply(items.field(name), factor) if name in ("margin", "score") else items.field(name)
        for name in schema.LABEL.names
    ]
    lengths = pc.fill_null(pc.list_value_length(labels), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    values = pa.StructArray.from_arrays(members, fields=list(schema.LABEL))
    return pa.ListArray.from_arrays(offsets, values, mask=pc.is_null(labels))


def _vectors_of(
    rows: pa.Table,
    drawn: pa.ChunkedArray,
    vectors: pa.Table,
    is_near: npt.NDArray[np.bool_],
    random: np.random.Generator,
) -> pa.Table:
    """Vectors of the rows, of as many views as the images have that they are drawn from.

    Args:
        drawn: image_id of these, for each row.
    """
    numbers = pa.table({"drawn": drawn, "row": pa.array(np.arange(len(drawn)))})
    of_demo = pa.table({"drawn": vectors["image_id"], "at": pa.array(np.arange(vectors.num_rows))})
    pairs = numbers.join(of_demo, "drawn", join_type="inner").sort_by([("row", "ascending"), ("at", "ascending")])
    row, at = pairs["row"].to_numpy(), pairs["at"].to_numpy()
    dim = len(vectors["vector"][0])
    unit = flat(vectors["vector"]).flatten().to_numpy().reshape(-1, dim)[at]
    added = random.standard_normal((len(drawn), dim), np.float32)  # the same for all views of an image
    added *= (np.where(is_near, NEAR, FAR) / np.linalg.norm(added, axis=1))[:, None]
    unit = (unit + added[row]).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(len(row) + 1, dtype=np.int32) * dim), pa.array(unit.ravel()))
    given: dict[str, Any] = {"vector": lists}
    given |= {name: rows[name].take(pa.array(row)) for name in ("image_id", "embed_run_id", "ingest_date")}
    kept = vectors.take(pa.array(at))
    return pa.table([given.get(name, kept[name]) for name in vectors.schema.names], schema=vectors.schema)


def _further(root: Path) -> pa.Table:
    """Makes images with bytes that no other has."""
    folder = root / "further"
    folder.mkdir()
    files = [file for file in sorted((root / "demo").glob("sku-*")) if file.suffix in (".jpg", ".png")][:FURTHER]
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes() + b"further")
    names = [str(folder / file.name) for file in files]
    ids = [f"F{number}" for number in range(len(names))]
    return pa.table({"uri": names, "id": ids, "title": ["A bed"] * len(names)})

"""People's verdicts on labels of images: read from a file, and matched with what a catalog holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import flat
from vlmflow.catalog.judged import by_model
from vlmflow.catalog.keys import KeyIndex, index_of, to_binary, to_words
from vlmflow.errors import CalibrationError, SourceError
from vlmflow.moderation.scoring import Scorer
from vlmflow.moderation.verdict_tables import read_verdict_table
from vlmflow.sources.uris import normalise_uri

_VALUES = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
_OPTIONAL = ("weight", "content_hash")
NO_VALUE = "label without a value: write true or false"  # why a row of a file does not count

IMAGE_COLUMNS = ("image_id", "uri", "content_hash", "decision", "decision_reason", "verdict")
VECTOR_COLUMNS = ("image_id", "embed_fingerprint", "vector")


@dataclass(frozen=True)
class Verdict:
    """One person's word on one label of one image. ``image``: an image_id, or a normalised uri."""

    image: str
    label: str
    value: bool
    weight: float
    content_hash: str | None


@dataclass(frozen=True, eq=False)
class VerdictFile:
    """The verdicts of a file.

    Attributes:
        key: the column that names images, image_id or uri.
        is_weighted: some weight is not 1; if all are, they say nothing of how the images were drawn.
        left_out: rows that say nothing, by reason.
    """

    key: str
    verdicts: list[Verdict]
    is_weighted: bool
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class Matched:
    """Verdicts on images of the catalog. N: images, L: labels of the policy.

    Attributes:
        ids: image_id of each.
        values: (N, L) 1 the label holds, 0 it does not, -1 nobody said.
        weights: (N, L).
        left_out: verdicts that do not count, by reason.
        flagged: share of the labelled images, and of the catalog's, that the model does not allow at present.
    """

    ids: list[str]
    values: NDArray[np.int8]
    weights: NDArray[np.float64]
    is_weighted: bool
    left_out: Counter[str]
    flagged: tuple[float, float]


def read_verdicts(path: Path) -> VerdictFile:
    """Reads a Parquet or CSV file with the columns image_id or uri, label, value; weight and content_hash may be there.

    So a queue as `review export` writes it can be read: rows without a value are passed over, and counted where they
    name a label. A row without a weight has that of another on its image and bytes, as in :func:`reviewed`, else 1.

    Raises:
        CalibrationError: the file cannot be read, lacks a column, or holds a value that says neither yes nor no.
    """
    table = _read_table(path)
    key = next((name for name in ("image_id", "uri") if name in table.column_names), None)
    missing = [name for name in ("label", "value") if name not in table.column_names]
    if key is None or missing:
        named = ["image_id or uri"] if key is None else []
        raise CalibrationError(
            f"{path}: no column {' and '.join([*named, *missing])} among {', '.join(table.column_names)}",
            remedy="Give image_id or uri, label and value; weight and content_hash if you have them.",
        )
    wanted = [key, "label", "value", *(name for name in _OPTIONAL if name in table.column_names)]
    rows = table.select(wanted).to_pylist()
    weights = [_weight(path, number, row) for number, row in enumerate(rows, start=1)]
    drawn = [(row[key], row.get("content_hash") or None) for row in rows]
    of_image = {image: weight for image, weight in zip(drawn, weights, strict=True) if weight is not None}
    verdicts, left_out = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        if not _is_blank(row["value"]):
            weight = weights[number - 1] or of_image.get(drawn[number - 1], 1.0)
            verdicts.append(_verdict(path, number, row, key, weight))
        elif not _is_blank(row["label"]):
            left_out[NO_VALUE] += 1
    return VerdictFile(key, verdicts, any(verdict.weight != 1 for verdict in verdicts), left_out)


def reviewed(events: pa.Table) -> VerdictFile:
    """The verdicts on labels among those that a catalog keeps; of one person's on a label of the same bytes the newest.

    A weight belongs to the draw of the image, not to one word on it: whoever corrects or confirms what was said of
    these bytes, in the browser or elsewhere, need not repeat it.

    Args:
        events: as ``vlmflow.catalog.reviews.EVENT``, the oldest first. A label without a value was taken back.
    """
    weighted = events.filter(pc.is_valid(events["weight"])).select(["image_id", "content_hash", "weight"]).to_pylist()
    weights = {(row["image_id"], row["content_hash"]): row["weight"] for row in weighted}
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in events.filter(pc.is_valid(events["label"])).to_pylist():
        newest[row["image_id"], row["content_hash"], row["label"], row["reviewer"]] = row
    rows = [row for row in newest.values() if row["value"] is not None]
    given = [weights.get((row["image_id"], row["content_hash"])) for row in rows]
    verdicts = [
        Verdict(row["image_id"], row["label"], row["value"], weight or 1.0, row["content_hash"])
        for row, weight in zip(rows, given, strict=True)
    ]
    return VerdictFile("image_id", verdicts, any(verdict.weight != 1 for verdict in verdicts))


def _read_table(path: Path) -> pa.Table:
    if path.suffix not in (".parquet", ".csv"):
        raise CalibrationError(f"{path}: neither .parquet nor .csv", remedy="Name a Parquet or CSV file.")
    return read_verdict_table(path, ("image_id", "uri", "label", "value", "content_hash"), CalibrationError)


def _is_blank(value: object) -> bool:
    return value is None or not str(value).strip()


def _weight(path: Path, number: int, row: dict[str, Any]) -> float | None:
    weight = row.get("weight")
    if _is_blank(weight):
        return None
    try:
        found = float(str(weight))
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise CalibrationError(f"{path}, row {number}: weight {weight!r}", remedy="Write a number above 0, or nothing.")
    return found


def _verdict(path: Path, number: int, row: dict[str, Any], key: str, weight: float) -> Verdict:
    value = _VALUES.get(str(row["value"]).strip().lower())
    if value is None:
        raise CalibrationError(
            f"{path}, row {number}: value {row['value']!r}", remedy="Write true or false, 1 or 0, yes or no."
        )
    image, label = row[key], row["label"]
    if not image or not label:
        raise CalibrationError(f"{path}, row {number}: no {'label' if image else key}", remedy="Fill it in.")
    if key == "uri":
        try:
            image = normalise_uri(image)
        except SourceError as error:
            raise CalibrationError(f"{path}, row {number}: {error}", remedy=error.remedy) from error
    content_hash = row.get("content_hash") or None
    return Verdict(str(image), str(label).strip().rpartition("/")[2], value, weight, content_hash)


def match_verdicts(file: VerdictFile, images: Iterable[pa.Table], labels: tuple[str, ...]) -> Matched:
    """Finds the images of verdicts; two verdicts on one label of an image count once, or not at all if they differ.

    Of the weights of those that count once the greatest does: one may be left at 1 by who did not draw the image.

    Args:
        images: live rows of the catalog, with :data:`IMAGE_COLUMNS`.
        labels: of the policy, in its order.
    """
    wanted = pa.array(sorted({verdict.image for verdict in file.verdicts}), pa.string())
    found: dict[str, list[dict[str, Any]]] = {}
    counts = np.zeros(2)  # images, and those not allowed
    for batch in map(by_model, images):  # what reviewers decided says nothing of how they came to look
        counts += [batch.num_rows, pc.sum(pc.not_equal(batch["decision"], "allow")).as_py() or 0]
        for row in batch.filter(pc.is_in(batch[file.key], value_set=wanted)).to_pylist():
            found.setdefault(row[file.key], []).append(row)
    left_out = Counter(file.left_out)
    said: dict[tuple[str, int], list[Verdict]] = {}
    for verdict in file.verdicts:
        rows = found.get(verdict.image, [])
        reason = _reason_to_leave_out(verdict, rows, labels)
        if reason is not None:
            left_out[reason] += 1
        else:
            said.setdefault((rows[0]["image_id"], labels.index(verdict.label)), []).append(verdict)
    agreed = {}
    for at, verdicts in said.items():
        if len({verdict.value for verdict in verdicts}) > 1:
            left_out["contradicted by another verdict"] += len(verdicts)
        else:
            left_out["said before"] += len(verdicts) - 1
            agreed[at] = verdicts
    ids = sorted({image for image, _ in agreed})
    numbers = {image: number for number, image in enumerate(ids)}
    values = np.full((len(ids), len(labels)), -1, np.int8)
    weights = np.ones((len(ids), len(labels)))
    for (image, label), verdicts in agreed.items():
        values[numbers[image], label] = verdicts[0].value
        weights[numbers[image], label] = max(verdict.weight for verdict in verdicts)
    decisions = {row["image_id"]: row["decision"] for rows in found.values() for row in rows}
    flagged = float(np.mean([decisions[image] != "allow" for image in ids])) if ids else 0.0
    overall = float(counts[1] / counts[0]) if counts[0] else 0.0
    return Matched(ids, values, weights, file.is_weighted, +left_out, (flagged, overall))


def _reason_to_leave_out(verdict: Verdict, rows: list[dict[str, Any]], labels: tuple[str, ...]) -> str | None:
    if verdict.label not in labels:
        return f"label {verdict.label} is not in the policy"
    if not rows:
        return "image is not in the catalog"
    if len(rows) > 1:
        return "uri stands for several images"
    if verdict.content_hash is not None and verdict.content_hash != rows[0]["content_hash"]:
        return "image has changed since (content_hash differs)"
    return None


def worst_margins(
    ids: list[str], vectors: Iterable[pa.Table], embed_fingerprint: str, scorer: Scorer, num_labels: int
) -> NDArray[np.float32]:
    """The greatest margins over the views of images, as decisions take them.

    Args:
        vectors: the embeddings of the catalog, with :data:`VECTOR_COLUMNS`, in any order.

    Returns:
        (N, L), not a number where an image has no finite vector of this model.

    Raises:
        CalibrationError: the images have vectors, but none of this model.
    """
    index: KeyIndex = index_of(to_binary(pa.array(ids, pa.string())))
    worst = np.full((len(ids), num_labels), -np.inf, np.float32)
    others: set[str] = set()
    for batch in vectors:
        at = index.find(*to_words(to_binary(batch["image_id"])))
        batch, at = batch.filter(pa.array(at >= 0)), at[at >= 0]
        same = np.asarray(pc.equal(batch["embed_fingerprint"], embed_fingerprint))
        others.update(batch["embed_fingerprint"].filter(pa.array(~same)).unique().to_pylist())
        if same.any():
            values = np.asarray(pc.list_flatten(flat(batch["vector"].filter(pa.array(same)))), np.float32)
            margins = scorer.score(values.reshape(int(same.sum()), -1))
            np.maximum.at(worst, at[same], margins)  # a not-a-number prevails
    if others and np.isneginf(worst).all():
        raise CalibrationError(
            f"the profile's embedder (fingerprint {embed_fingerprint}) did not make the embeddings of the catalog "
            f"({', '.join(sorted(others))})",
            remedy="Give the --profile, and with --config the views, that the catalog was enriched with.",
        )
    return np.where(np.isneginf(worst), np.float32(np.nan), worst)

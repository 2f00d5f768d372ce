"""The verdicts that people gave on images: kept for good under ``reviews/``, and brought into the rows they are about.

What was said is never changed, and the newest verdict on an image and its bytes counts; many small files of verdicts
become one that holds what they held. Rows follow by rewriting the live files that hold them; a file that another writer
has moved meanwhile is looked at again in the newest version, by what is said then.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import judge, of_list
from vlmflow.catalog.keys import KeyIndex, index_of, to_binary, to_words
from vlmflow.catalog.known_images import KnownImages
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.masks import Mask, chosen, equal, is_valid
from vlmflow.catalog.read import read_each, read_rows
from vlmflow.catalog.rows import rows_of_image_errors
from vlmflow.catalog.small_files import SmallFiles
from vlmflow.catalog.tombstones import Erased, Tombstones
from vlmflow.catalog.writer import write_file
from vlmflow.errors import CatalogChangedError, CatalogError

REVIEWS = "reviews"
WITHDRAWN = "none"  # a decision that takes an earlier one back
_MAX_ROUNDS = 20
_LOOKED_AT = ("image_id", "content_hash", "phash", "verdict")

# One row per word on an image: a decision on the whole, or the value of one label, or both.
EVENT = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # of the bytes that were judged
        ("decision", pa.string()),  # allow, review, block, or `none`: taken back
        ("label", pa.string()),
        ("value", pa.bool_()),  # whether the label holds; null: what was said of it is taken back
        ("weight", pa.float64()),  # images that this one stands for, where it was drawn at random
        pa.field("reviewer", pa.string(), nullable=False),
        pa.field("at", schema.TIMESTAMP, nullable=False),
        ("reason", pa.string()),
    ]
)


@dataclass
class JudgeResult:
    """What verdicts did to rows.

    Attributes:
        num_changed: rows whose verdict is another now.
        num_waiting: verdicts on bytes that the catalog does not hold, or not any more.
        flips: rows by change of their decision.
    """

    num_changed: int = 0
    num_waiting: int = 0
    flips: dict[str, int] = field(default_factory=dict)


class ReviewStore:
    """Reads and adds verdicts."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files = SmallFiles(folder, REVIEWS, EVENT)

    def add(self, events: pa.Table) -> str:
        """Adds verdicts; returns the path of their file. The same once more change nothing.

        Args:
            events: as :data:`EVENT`.
        """
        events = conform(events, EVENT).sort_by(
            [("at", "ascending"), ("image_id", "ascending"), ("label", "ascending")]
        )
        digest = hashlib.sha256()
        for batch in events.combine_chunks().to_batches():
            digest.update(batch.serialize())
        return self._files.add(digest.hexdigest()[:32], events)

    def events(self) -> pa.Table:
        """All verdicts, the oldest first; equal ones that stand in two files once."""
        return distinct(self.files().values())

    def files(self) -> dict[str, pa.Table]:
        """The files of verdicts by path, each as :data:`EVENT`. What was read stays in memory."""
        return {path: rows for path, (_, rows) in self._files.look().items()}

    @property
    def merged(self) -> frozenset[str]:
        """Files whose verdicts stand in another too; see :attr:`SmallFiles.joined`."""
        return self._files.joined

    def merge(self, tombstones: Tombstones, now: dt.datetime) -> None:
        """Puts what many small files hold into one; see :class:`SmallFiles`.

        To be called with the lease of a run: an erasure of this time knows then that it has to be asked for again.

        Args:
            now: by the store's clock.
        """
        files = self._files.look()
        if some := self._files.to_join(files):
            erased = tombstones.erased()
            every = distinct(files[path][1] for path in some)
            rows = _without(every, erased)
            if rows.num_rows < every.num_rows:  # an erasure is about to remove these files itself
                some = [path for path in some if _without(files[path][1], erased).num_rows == files[path][1].num_rows]
            path = self._files.join(some, rows)
            # An erasure that looked through the folder before this file was there has not looked into it.
            if _without(rows, tombstones.erased()).num_rows < rows.num_rows:
                self._folder.delete(path)
        self._files.remove_joined(files, now)

    def newest(self) -> pa.Table:
        """The newest decision on each image and its bytes, those taken back included."""
        events = self.events()
        decided = events.filter(pc.is_valid(events["decision"]))
        position = pa.array(np.arange(decided.num_rows))
        last = (
            decided.append_column("position", position)
            .group_by(["image_id", "content_hash"], use_threads=False)
            .aggregate([("position", "max")])
        )
        return decided.take(last["position_max"])


def distinct(tables: Iterable[pa.Table]) -> pa.Table:
    """Their verdicts, each once, the oldest first."""
    every = pa.concat_tables([EVENT.empty_table(), *tables])
    return every.group_by(EVENT.names, use_threads=False).aggregate([]).select(EVENT.names).sort_by("at")


def _without(events: pa.Table, erased: Erased) -> pa.Table:
    return events.filter(pa.array(erased.ids.find(*to_words(to_binary(events["image_id"]))) < 0))


@dataclass(frozen=True)
class Said:
    """What people and lists say of images, as it was at one time.

    Attributes:
        newest: of :meth:`ReviewStore.newest`.
        known: says of images that nobody has judged whether a list has them.
    """

    newest: pa.Table
    known: KnownImages

    def equals(self, other: Said) -> bool:
        """Whether the same is said, in the same order."""
        return self.newest.equals(other.newest) and self.known.lists == other.known.lists

    @cached_property
    def images(self) -> KeyIndex:
        """The images that people have judged."""
        return index_of(to_binary(self.newest["image_id"]))

    @cached_property
    def keys(self) -> pa.Array:
        """Of each verdict the image and its bytes, as one text."""
        return _with_bytes(self.newest, "")

    def places(self, rows: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """For each row the verdict on it and its present bytes; -1: there is none.

        An image may have verdicts on several versions of its bytes: keys are looked up as often as there can be.
        """
        some = self.images.find(*to_words(to_binary(rows["image_id"]))) >= 0
        places = np.full(rows.num_rows, -1, dtype=np.int64)
        found = pc.index_in(_with_bytes(rows, "-").filter(pa.array(some)), value_set=self.keys)
        places[some] = np.asarray(pc.fill_null(found, -1), np.int64)
        return places


def apply_verdicts(
    folder: Folder,
    read: Callable[[], Said],
    lists_changed: bool,
    run_id: str,
    look: Callable[[], Snapshot],
    swap: Callable[[Sequence[tuple[DataFile, DataFile]]], list[DataFile]],
    first: Sequence[str] = (),
) -> JudgeResult:
    """Brings verdicts into the rows that they are about; those that are there already change nothing.

    Args:
        read: gives what is said now.
        lists_changed: looks at every row, not only at those that people have judged.
        look: gives the newest version of the images table.
        swap: puts rewritten files in place of live ones, and gives back those that were not live any more.
        first: paths of files that are likely to hold the images: they are looked at before others, and these no more
            once all images have been met.

    Raises:
        CatalogError: other writers are always first.
    """
    result = JudgeResult()
    images = look()
    said = read()
    asked = said.keys
    left, likely = set(said.newest["image_id"].to_pylist()), set(first)  # left: images not met yet
    seen: set[str] = set()
    matched: set[str] = set()  # of `asked`, and of what was said since
    for _ in range(_MAX_ROUNDS):
        columns = images.schema  # of this very version: another writer may have added some, and files that hold them
        files = [file for path, file in images.files.items() if path not in seen]
        files.sort(key=lambda file: file.path not in likely)
        if not files or not (left or lists_changed):
            result.num_waiting = pc.sum(pc.invert(pc.is_in(asked, pa.array(matched, pa.string())))).as_py() or 0
            return result
        if seen:  # always after the version: its rows may show what was said since the one before
            said = read()
        swaps: list[tuple[DataFile, DataFile, pa.Table]] = []
        moved = False
        try:
            for file, keys in read_each(folder, "images", files, _LOOKED_AT, ahead=4):
                seen.add(file.path)
                keys = conform(keys, pa.schema([columns.field(name) for name in _LOOKED_AT]))
                concerned = _concerned(keys, said, lists_changed)
                if not concerned.any():
                    continue
                left.difference_update(keys["image_id"].filter(pa.array(concerned)).to_pylist())
                rows = conform(read_rows(folder, "images", file), columns)
                judged, changed = _judged(rows, said, concerned, matched)
                if changed.any():
                    new = write_file(folder, "images", judged, file.ingest_date, run_id)
                    flips = pa.table({"before": rows["decision"], "after": judged["decision"]})
                    swaps.append((file, new, flips.filter(pa.array(changed))))
                if not (left or lists_changed):
                    break
        except CatalogChangedError:  # an erasure has put the rows of a file elsewhere
            moved = True
        late = {file.path for file in swap([(old, new) for old, new, _ in swaps])} if swaps else set()
        # Who has said more while we were at it may have looked before our files were there, and have found their
        # rows as they should be. Who says it from now on finds ours.
        stale = bool(swaps) and not read().equals(said)
        for old, new, flips in swaps:
            if old.path not in late:
                (likely if stale else seen).add(new.path)
                _count(result, flips)
        if late or stale or moved:  # rows elsewhere now, or that hold what was said before, have to be met again
            left = set(said.newest["image_id"].to_pylist())
        images = look()
    raise CatalogError(
        "verdicts: other writers are always first",
        remedy="Import the verdicts, or add the list, again when they are done.",
    )


def _concerned(keys: pa.Table, said: Said, lists_changed: bool) -> Mask:
    """Rows that somebody has judged; where lists have changed, those too that one knows now, or has judged."""
    concerned: Mask = said.images.find(*to_words(to_binary(keys["image_id"]))) >= 0
    if lists_changed:
        listed = said.known.verdicts(keys["content_hash"], keys["phash"])
        concerned |= is_valid(listed) | of_list(flat(keys["verdict"]))
    return concerned


def _judged(rows: pa.Table, by: Said, concerned: Mask, matched: set[str]) -> tuple[pa.Table, Mask]:
    """The rows under their verdicts, and which of them changed."""
    places = by.places(rows)
    matched.update(by.keys.take(pa.array(places[places >= 0])).to_pylist())
    said = by.newest.take(pa.array(places, mask=places < 0))
    given = is_valid(said["decision"])
    withdrawn = equal(said["decision"], WITHDRAWN)
    fields = {name: flat(said[name]) for name in ("decision", "content_hash", "reviewer", "at", "reason")}
    none = pa.nulls(rows.num_rows, pa.string())
    struct = pa.StructArray.from_arrays(
        [fields.get(field.name, none).cast(field.type) for field in schema.VERDICT],
        fields=list(schema.VERDICT),
        mask=pa.array(~given | withdrawn),
    )
    by_person = given & ~withdrawn
    struct = chosen(by_person, struct, by.known.verdicts(rows["content_hash"], rows["phash"]))
    held = flat(rows["verdict"])
    changed = concerned & (given | is_valid(struct) | of_list(held)) & ~_same(held, struct)
    image = rows_of_image_errors(rows["errors"])
    return judge(rows, struct, changed, image.unreadable | image.failed), changed


def _with_bytes(rows: pa.Table, unknown: str) -> pa.Array:
    """The image and its bytes of each row, as one text; ``unknown`` stands for bytes that were never read."""
    return flat(pc.binary_join_element_wise(rows["image_id"], pc.fill_null(rows["content_hash"], unknown), "/"))


def _same(held: pa.StructArray, given: pa.StructArray) -> Mask:
    """Rows that hold the very verdict already, or hold none and are given none."""
    same = ~is_valid(held) & ~is_valid(given)
    both = is_valid(held) & is_valid(given)
    for name in ("decision", "content_hash", "reviewer", "at", "reason"):
        left, right = pc.struct_field(held, name), pc.struct_field(given, name)
        alike = equal(left, right) | (~is_valid(left) & ~is_valid(right))
        both = both & alike
    return same | both


def _count(result: JudgeResult, flips: pa.Table) -> None:
    for entry in flips.group_by(["before", "after"]).aggregate([([], "count_all")]).to_pylist():
        result.num_changed += entry["count_all"]
        if entry["before"] != entry["after"]:
            name = f"{entry['before']} -> {entry['after']}"
            result.flips[name] = result.flips.get(name, 0) + entry["count_all"]

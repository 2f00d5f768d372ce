"""Which images were erased and must not come back: ids, hashes of addresses, and times; nothing else."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KEY_BYTES, KeyIndex, concat, from_bytes, index_of, to_binary, to_words
from vlmflow.catalog.masks import Mask, as_mask, is_valid
from vlmflow.catalog.small_files import SmallFiles
from vlmflow.sources.uris import SIGNED_SINCE, ids_of_normalised, spellings

TOMBSTONES = "tombstones"

# One row per image and erasure, or its lifting; an address that was erased whatever its images are is one too, and
# stands in both columns. Each erasure adds a file, which never changes; old ones lack the last column.
_EVENT = pa.schema(
    [
        ("image_id", schema.KEY),
        ("at", schema.TIMESTAMP),
        ("lifted", pa.bool_()),
        ("address", schema.KEY),  # by which the image was erased; null: by its id
    ]
)


def address_keys(uris: Iterable[str]) -> pa.FixedSizeBinaryArray:
    """What stands for normalised addresses, as ``schema.KEY``; it is the id of no image."""
    digests = [blake2b(uri.encode("utf-8"), digest_size=KEY_BYTES, person=b"address").digest() for uri in uris]
    return from_bytes(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES))


def keyed_addresses(rows: pa.Table) -> pa.FixedSizeBinaryArray:
    """As :func:`address_keys`, of rows with the columns ``uri`` and ``key``; null where the caller gave no key.

    The id of an image without a key says all that its address does.
    """
    keyed = is_valid(rows["key"])
    hashes = address_keys(rows["uri"].filter(pa.array(keyed)).to_pylist())
    return hashes.take(pa.array(np.cumsum(keyed) - 1, mask=~keyed))


@dataclass(frozen=True)
class Erased:
    """The images that must not come back, by id; those with a key of the caller's by address too. Picklable."""

    ids: KeyIndex
    addresses: KeyIndex

    @classmethod
    def of(cls, keys: pa.Array, uris: Iterable[str] = ()) -> Erased:
        """Indexes images, given as ``schema.KEY``, and normalised addresses."""
        return cls(index_of(keys), index_of(address_keys(uris)))

    def mask(self, rows: pa.Table) -> Mask:
        """Marks them among rows with the columns ``image_id``, ``uri`` and ``key``."""
        gone: Mask = self.ids.find(*to_words(to_binary(rows["image_id"]))) >= 0
        return gone | self.by_address(keyed_addresses(rows)) if len(self.addresses) else gone

    def mask_listed(self, references: pa.Table) -> Mask:
        """As :meth:`mask`, of references; those too that an earlier version erased by another spelling of their url."""
        gone = self.mask(references)
        if not len(self.ids) and not len(self.addresses):
            return gone
        signed = np.flatnonzero(as_mask(pc.match_substring_regex(references["locator"], SIGNED_SINCE)) & ~gone)
        rows = references.select(["locator", "key"]).take(pa.array(signed))
        uris, keys = [spellings(url)[-1] for url in rows["locator"].to_pylist()], rows["key"].to_pylist()
        former = {"image_id": ids_of_normalised(uris, keys), "uri": uris, "key": keys}
        columns = pa.schema([schema.REFERENCE.field(name) for name in former])
        gone[signed] = self.mask(pa.table(former, schema=columns))
        return gone

    def by_address(self, addresses: pa.Array) -> Mask:
        """Marks those of :func:`keyed_addresses` that are erased."""
        found: Mask = self.addresses.find(*to_words(addresses)) >= 0
        return found & is_valid(addresses)


class Tombstones:
    """Reads and adds tombstones. What was read is remembered: a run asks before each of its commits."""

    def __init__(self, folder: Folder) -> None:
        self._files = SmallFiles(folder, TOMBSTONES, _EVENT)
        self._read: dict[str, pa.Table] = {}  # by path
        self._images: pa.Table | None = None  # that are erased now, by which address if by one
        self._erased: Erased | None = None

    def put(self, keys: pa.Array, uris: Sequence[str] = ()) -> None:
        """Erases images for the time to come, and whatever has one of these normalised addresses."""
        addresses = address_keys(uris)
        self._add(concat([keys, addresses]), concat([pa.nulls(len(keys), schema.KEY), addresses]))

    def put_found(self, keys: pa.Array, addresses: pa.Array) -> None:
        """Erases images by id too that were found to have an erased address: their vectors have none."""
        self._add(keys, addresses)

    def lift(self, keys: pa.Array, uris: Sequence[str] = ()) -> pa.Array:
        """Lets images come back, and all that were erased by these normalised addresses.

        Returns:
            Those of the keys that stay away because they were erased by another address, as ``schema.KEY``.
        """
        every = concat([keys, address_keys(uris), self.found_by(uris)])
        images = self._now()
        self._add(every, pa.nulls(len(every), schema.KEY), lifted=True)
        named = images.filter(pa.array(index_of(keys).find(*to_words(images["image_id"])) >= 0))
        return concat([named.filter(pa.array(self.erased().by_address(named["address"])))["image_id"]])

    def found_by(self, uris: Sequence[str]) -> pa.Array:
        """The images that are erased because they were found to have one of these addresses, as ``schema.KEY``."""
        images = self._now()
        return concat([images.filter(pc.is_in(images["address"], value_set=address_keys(uris)))["image_id"]])

    def keys(self) -> pa.Array:
        """The images that are erased now by id, as ``schema.KEY``, sorted by nothing."""
        return concat([self._now()["image_id"]])

    def since(self, time: dt.datetime | None) -> pa.Array:
        """The images that were erased by id, or let come back, at that time or later, as ``schema.KEY``; None: ever."""
        self._now()
        events = pa.concat_tables([_EVENT.empty_table(), *self._read.values()])
        late = events if time is None else events.filter(pc.greater_equal(events["at"], time))
        addresses = pc.unique(concat([events["address"].drop_null()]))
        return concat([late.filter(pc.invert(pc.is_in(late["image_id"], value_set=addresses)))["image_id"].unique()])

    def erased(self) -> Erased:
        """What is erased now, to look images up."""
        self._now()
        assert self._erased is not None
        return self._erased

    def merge(self, now: dt.datetime) -> None:
        """Puts what many small files hold into one; see :class:`SmallFiles`.

        Args:
            now: by the store's clock.
        """
        files = self._files.look()
        if some := self._files.to_join(files):
            every = pa.concat_tables([files[path][1] for path in some])
            self._files.join(some, every.group_by(_EVENT.names).aggregate([]).select(_EVENT.names).sort_by("at"))
        self._files.remove_joined(files, now)

    def _add(self, keys: pa.Array, addresses: pa.Array, *, lifted: bool = False) -> None:
        count = len(keys)
        at = self._after_all_others()
        ats, lifts = pa.repeat(pa.scalar(at, schema.TIMESTAMP), count), pa.repeat(pa.scalar(lifted), count)
        name = f"{at:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
        self._files.add(name, pa.table([keys, ats, lifts, addresses], schema=_EVENT))

    def _after_all_others(self) -> dt.datetime:
        """The time; of a clock that is behind that of whoever came before, a moment after his."""
        self._now()
        now = dt.datetime.now(dt.UTC)
        newest: list[dt.datetime] = [pc.max(events["at"]).as_py() for events in self._read.values() if events.num_rows]
        return max([now, *(at + dt.timedelta(microseconds=1) for at in newest)])

    def _now(self) -> pa.Table:
        """The images that are erased now by id, with the address by which they were."""
        read = {path: rows for path, (_, rows) in self._files.look().items()}
        if read.keys() != self._read.keys() or self._images is None:
            self._read = read
            every = pa.concat_tables([_EVENT.empty_table(), *read.values()])
            erased = _newest(every)
            of_address = pc.fill_null(pc.equal(erased["image_id"], erased["address"]), False)
            self._images = erased.filter(pc.invert(of_address))
            addresses = erased.filter(of_address)["image_id"]
            self._erased = Erased(index_of(self._images["image_id"]), index_of(addresses))
        return self._images


class ErasedOf:
    """What is erased of a run's images, for its commits.

    Args:
        files: rows of :data:`schema.DESCRIPTOR`.
    """

    def __init__(self, tombstones: Tombstones, files: pa.Table) -> None:
        self._tombstones = tombstones
        keyed = files.filter(pc.greater(pc.list_value_length(files["addresses"]), 0))
        self._keys, self._addresses = (concat([pc.list_flatten(keyed[name])]) for name in ("keys", "addresses"))

    def index(self) -> KeyIndex:
        """The images that are erased now, by id: those of the run whose address is erased among them."""
        erased = self._tombstones.erased()
        unknown = erased.by_address(self._addresses) & (erased.ids.find(*to_words(self._keys)) < 0)
        if unknown.any():
            marks = pa.array(unknown)
            self._tombstones.put_found(self._keys.filter(marks), self._addresses.filter(marks))
            erased = self._tombstones.erased()
        return erased.ids


def _newest(events: pa.Table) -> pa.Table:
    """The newest event of each image, where that is an erasure."""
    events = events.sort_by([("at", "descending")])
    position = pa.array(np.arange(events.num_rows))
    newest = events.append_column("position", position).group_by("image_id").aggregate([("position", "min")])
    last = events.take(newest["position_min"])
    return last.filter(pc.invert(last["lifted"]))

"""The boxes of HEIF files (ISO/IEC 23008-12), read by hand: how much there is to decode, before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice

Box = tuple[bytes, memoryview]  # type and content

_MAX_BOXES = 100_000
_MAX_ITEMS = 1_000  # images and tiles, and what is said of them; the decoder takes no more
# Tiles of tiles of tiles are made by nobody; each level multiplies what there is to decode.
_MAX_LEVELS = 4
# The decoder takes coded images of so many pixels whatever the file says of their size.
_LEAST_PIXELS = 1 << 16
_TOO_MANY = f"a HEIC file of more than {_MAX_ITEMS:,} images and tiles"
_CODED, _GRID, _SAME, _OVERLAY, _TONE_MAP = b"hvc1", b"grid", b"iden", b"iovl", b"tmap"
# Kinds that are images also where their size is not told.
_IMAGES = {_CODED, _GRID, _SAME, b"av01", b"avc1", b"j2k1", b"jpeg", b"unci", b"vvc1"}
# Of what belongs to another image: its thumbnail, or its depth or gain map.
_BELONGS = (b"thmb", b"auxl")


class NotReadError(RuntimeError):
    """An image that is whole, and of a kind that no decoder here makes the right picture of."""


@dataclass
class _Item:
    """An image of a file, or a tile of one. Where boxes say several things of it all are kept: decoders choose."""

    kind: bytes = b""
    is_hidden: bool = False
    sizes: list[tuple[int, int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    configurations: set[bytes] = field(default_factory=set)  # of the decoder


def is_heic_supported() -> bool:
    """Whether the package that decodes HEIC is installed."""
    return find_spec("pillow_heif") is not None


def boxes(data: memoryview) -> Iterator[Box]:
    """The boxes of an ISO base media file (ISO/IEC 14496-12), or those inside of one."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            return
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        yield bytes(data[at + 4 : at + 8]), data[at + head : end]
        at = end


def properties(data: bytes) -> Iterator[Box]:
    """Those of all images in a file."""
    for meta in _named(boxes(memoryview(data)), b"meta"):
        for shared in _named(boxes(meta[4:]), b"iprp"):
            for container in _named(boxes(shared), b"ipco"):
                yield from boxes(container)


def _named(found: Iterable[Box], name: bytes) -> Iterator[memoryview]:
    return (content for kind, content in found if kind == name)


def has_track(data: bytes) -> bool:
    """Whether a file holds a sequence of images besides those that stand alone."""
    return any(True for _ in _named(boxes(memoryview(data)), b"moov"))


@dataclass(frozen=True)
class ToDecode:
    """What a HEIC file holds.

    Attributes:
        sizes: widths and heights of all images and tiles, in pixels, before they are cropped and turned.
        most_pixels: to be decoded for one image: those of all its tiles, however often it shows each.
        most_unseen: of the tiles of one image, beyond those of twice its own size.
    """

    sizes: list[tuple[int, int]]
    most_pixels: int
    most_unseen: int


def to_decode(data: bytes) -> ToDecode:
    """Measures a HEIC file.

    Raises:
        NotReadError: its image is of another kind, or put together in another way, than those that are decoded.
        ValueError: it is damaged.
    """
    sizes, most_pixels, most_unseen = list[tuple[int, int]](), 0, 0
    found = list(boxes(memoryview(data)))
    kinds = {kind for kind, _ in found}
    if b"mini" in kinds:
        raise NotReadError("a HEIC image with a short header")
    if b"meta" not in kinds and b"moov" in kinds:
        raise NotReadError("a HEIC sequence without a still image")
    metas = list(_named(found, b"meta"))
    if not metas:
        raise ValueError("there is no meta box")
    for meta in metas:  # decoders differ in which one they take of several
        inside = list(boxes(meta[4:]))
        items = _items(inside, memoryview(data))
        counted: dict[int, tuple[int, int]] = {}
        for number in items:
            most_pixels = max(most_pixels, _count(items, number, counted, _MAX_LEVELS)[0])
        most_unseen = max(most_unseen, _most_unseen(items))
        for content in _named(inside, b"pitm"):
            _check_kind(items, int.from_bytes(content[4 : 8 if content[0] else 6], "big"), set())
        sizes += [size for item in items.values() for size in item.sizes]
    return ToDecode(sizes, most_pixels, most_unseen)


def _count(items: dict[int, _Item], number: int, counted: dict[int, tuple[int, int]], levels: int) -> tuple[int, int]:
    """Pixels to be decoded for an image, and its levels: of one that is no tiles 1."""
    if not levels:
        raise NotReadError("a HEIC image of tiles in tiles")
    item = items.get(number, _Item())
    if item.kind == _CODED and not item.sizes:
        raise ValueError("an image is coded, and its size is not told")
    if item.kind == _OVERLAY:
        raise NotReadError("a HEIC image of several laid over one another")
    if number not in counted:
        # The decoder leaves out tiles, all but the first, that it cannot decode: what the others show must be like it.
        codings = set().union(*(items[part].configurations for part in item.parts if part in items))
        if len(codings) > 1 and item.kind != _TONE_MAP:  # that is no picture of its own
            raise NotReadError("a HEIC image of tiles that are coded in different ways")
        own = max([_LEAST_PIXELS, *(width * height for width, height in item.sizes)])
        parts = [_count(items, part, counted, levels - 1) for part in item.parts]
        depth = 1 + max((below for _, below in parts), default=0)
        if depth > _MAX_LEVELS:
            raise NotReadError("a HEIC image of tiles in tiles")
        counted[number] = max(own, sum(pixels for pixels, _ in parts)), depth
    return counted[number]


def pictures_in(data: bytes) -> set[int]:
    """The numbers of the images that stand for themselves, of kinds that no decoder here knows too.

    Not of tiles and what else is hidden, of what belongs to another image, nor of how one is brightened for a screen.
    """
    found: set[int] = set()
    for meta in _named(boxes(memoryview(data)), b"meta"):
        inside = list(boxes(meta[4:]))
        apart = {
            number
            for content in _named(inside, b"iref")
            for kind in _BELONGS
            for number, _ in _references(content, kind)
        }
        for number, item in _items(inside, memoryview(data)).items():
            is_image = item.kind in _IMAGES or (bool(item.sizes) and item.kind not in (b"", _TONE_MAP))
            if is_image and not item.is_hidden and number not in apart:
                found.add(number)
    return found


def tiles_of(data: bytes, number: int) -> set[int]:
    """The numbers of the images of which one is made, and of those of which these are."""
    found: set[int] = set()
    for meta in _named(boxes(memoryview(data)), b"meta"):
        items, wanted = _items(list(boxes(meta[4:])), memoryview(data)), [number]
        while wanted:
            new = set(items.get(wanted.pop(), _Item()).parts) - found
            found |= new
            wanted += new
    return found


def with_tiles_shown(data: bytes) -> bytes:
    """A file in which each tile is an image of its own, to be decoded alone."""
    changed = bytearray(data)
    for meta in _named(boxes(memoryview(changed)), b"meta"):
        for listed in _named(boxes(meta[4:]), b"iinf"):
            for entry in _entries(listed):
                entry[3] &= 0xFE  # the flag of what is hidden
    return bytes(changed)


def _most_unseen(items: dict[int, _Item]) -> int:
    """Pixels of the tiles of an image beyond those of twice its own size."""
    areas = {number: [width * height for width, height in item.sizes] or [0] for number, item in items.items()}
    least, most = ({number: fn(sizes) for number, sizes in areas.items()} for fn in (min, max))
    unseen = (sum(most.get(part, 0) for part in item.parts) - 2 * least[number] for number, item in items.items())
    return max(unseen, default=0)


def _check_kind(items: dict[int, _Item], number: int, seen: set[int]) -> None:
    """Refuses the primary image where it, or a tile of it, is not HEVC."""
    if number in seen:
        return
    seen.add(number)
    item = items.get(number, _Item())
    if item.kind in (_GRID, _SAME):
        for part in item.parts:
            _check_kind(items, part, seen)
    elif item.kind not in (_CODED, b""):
        kind = item.kind.decode("ascii", "replace")
        raise NotReadError(f"a HEIF image of the kind {kind if kind.isalnum() else item.kind.hex()}")


def _items(meta: list[Box], data: memoryview) -> dict[int, _Item]:
    items: dict[int, _Item] = {}
    for content in _named(meta, b"iinf"):
        for number, kind, is_hidden in _kinds(content):
            item = items.setdefault(number, _Item(kind, is_hidden))
            if item.kind != kind:  # decoders differ in which one they take
                raise ValueError("an image is of two kinds")
            item.is_hidden &= is_hidden
    for content in _named(meta, b"iref"):
        for number, parts in _references(content, b"dimg"):  # those from which it is made
            items.setdefault(number, _Item()).parts += parts
    for content in _named(meta, b"iprp"):
        for number, kind, told in _told(list(boxes(content))):
            item = items.setdefault(number, _Item())
            if kind == b"ispe":
                item.sizes.append((int.from_bytes(told[4:8], "big"), int.from_bytes(told[8:12], "big")))
            elif kind == b"hvcC":
                item.configurations.add(told)
    sources = {0: data, 1: next(_named(meta, b"idat"), memoryview(b""))}
    for content in _named(meta, b"iloc"):
        for number, place, extents in _places(content):
            kind = items[number].kind if number in items else b""
            if kind not in (_CODED, _GRID):
                continue
            if place not in sources:
                raise NotReadError("a HEIC image that lies within another")
            source = sources[place]
            # The decoder leaves out tiles that are not there, and makes a picture of the others.
            if any(at + size > len(source) for at, size in extents):
                raise ValueError("truncated")
            if kind == _GRID:
                items[number].sizes.append(_grid_size(b"".join(source[at : at + size][:16] for at, size in extents)))
    return items


def _kinds(iinf: memoryview) -> Iterator[tuple[int, bytes, bool]]:
    """The number and the kind of each item, and whether it is hidden."""
    for infe in _entries(iinf):
        if infe[0] == 2:
            yield int.from_bytes(infe[4:6], "big"), bytes(infe[8:12]), bool(infe[3] & 1)
        elif infe[0] == 3:
            yield int.from_bytes(infe[4:8], "big"), bytes(infe[10:14]), bool(infe[3] & 1)


def _entries(iinf: memoryview) -> Iterator[memoryview]:
    return _named(boxes(iinf[8 if iinf[0] else 6 :]), b"infe")


def _references(iref: memoryview, kind: bytes) -> Iterator[tuple[int, list[int]]]:
    """Which items refer so to which others."""
    num_bytes = 4 if iref[0] else 2
    for content in _few(_named(boxes(iref[4:]), kind)):
        read = _Reader(content)
        yield read(num_bytes), [read(num_bytes) for _ in range(read.count(2))]


def _told(iprp: list[Box]) -> Iterator[tuple[int, bytes, bytes]]:
    """The properties of each item."""
    known = [(kind, bytes(told)) for content in _named(iprp, b"ipco") for kind, told in boxes(content)]
    for content in _few(_named(iprp, b"ipma")):
        read = _Reader(content, 4)
        id_bytes, place_bytes = 4 if content[0] else 2, 2 if content[3] & 1 else 1
        for _ in range(read.count(4)):
            number = read(id_bytes)
            for _ in range(read(1)):
                place = read(place_bytes) & (0x7FFF if place_bytes == 2 else 0x7F)
                if 0 < place <= len(known):
                    yield number, *known[place - 1]


def _places(iloc: memoryview) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Of each item in what its bytes lie (0: the file, 1: the box ``idat``), and their offsets and numbers there."""
    version, read = iloc[0], _Reader(iloc, 6)
    offset_bytes, length_bytes, base_bytes, index_bytes = iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, iloc[5] & 15
    for _ in range(read.count(2 if version < 2 else 4)):
        number = read(2 if version < 2 else 4)
        place = read(2) & 15 if version else 0
        read(2)  # in which file: this one
        base = read(base_bytes)
        extents = []
        for _ in range(read.count(2)):
            read(index_bytes if version else 0)
            extents.append((base + read(offset_bytes), read(length_bytes)))
        yield number, place, extents


def _grid_size(content: bytes) -> tuple[int, int]:
    read = _Reader(memoryview(content), 4)
    num_bytes = 4 if content[1] & 1 else 2
    return read(num_bytes), read(num_bytes)


class _Reader:
    """Reads big-endian integers of so many bytes one after the other."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self._data, self._at = data, at

    def __call__(self, num_bytes: int) -> int:
        if self._at + num_bytes > len(self._data):
            raise ValueError("a box ends before what it lists")
        self._at += num_bytes
        return int.from_bytes(self._data[self._at - num_bytes : self._at], "big")

    def count(self, num_bytes: int) -> int:
        """Reads how many follow.

        Raises:
            NotReadError: more than the decoder takes.
        """
        found = self(num_bytes)
        if found > _MAX_ITEMS:
            raise NotReadError(_TOO_MANY)
        return found


def _few(found: Iterable[memoryview]) -> list[memoryview]:
    some = list(islice(found, _MAX_ITEMS + 1))
    if len(some) > _MAX_ITEMS:
        raise NotReadError(_TOO_MANY)
    return some

"""Lists of known images in a catalog: add, remove, and what that does to rows."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import flat
from vlmflow.catalog.judged import LIST_PREFIX
from vlmflow.catalog.known_images import Kind, KnownList
from vlmflow.config import CatalogConfig, Frozen, ImageLimits
from vlmflow.errors import ImageError, KnownImagesError
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.jpeg import leave_encoded
from vlmflow.schema import LEAST_PHASH_BITS

_SHA256, _PHASH = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")
# Of a clip that begins plain, what moderation would take the hash of; the pixels are of no interest. As large as what
# models ask for: a JPEG is decoded at a scale that goes by it, and of a smaller one the hash is another by some bits.
_ALL_FRAMES = PixelRequest(384, "bilinear", ("squash", "frames"))
_TEXTS = (".txt", ".csv", ".tsv", "")


class KnownReport(Frozen):
    """What a list did to rows.

    Attributes:
        num_without_look: perceptual hashes that were left out: plain images have them, whatever their colour.
        num_changed: rows under another verdict than before.
        flips: rows by change of their decision.
    """

    catalog: str
    name: str
    num_hashes: int = 0
    num_phashes: int = 0
    num_without_look: int = 0
    num_changed: int
    flips: dict[str, int]


def add_list(
    config: CatalogConfig,
    name: str,
    kind: Kind,
    hashes: Sequence[str],
    phashes: Sequence[str] = (),
    max_distance: int = 4,
) -> KnownReport:
    """Puts a list of known images into a catalog, in place of one of its name, and applies it to the rows.

    Args:
        hashes: sha256 of bytes, hexadecimal.
        phashes: perceptual hashes as ``imagehash.phash`` gives them; of a block list alone.
        max_distance: of their 64 bits, how many may differ.

    Raises:
        KnownImagesError: the list cannot be used.
        CatalogError: there is no catalog, or other writers are always first.
    """
    catalog = Catalog.open(config)
    known = KnownList(name, kind, tuple(hashes), tuple(phashes), max_distance)
    known.check()
    seen = tuple(text for text in phashes if int(text, 16).bit_count() >= LEAST_PHASH_BITS)
    if not seen and not hashes:
        raise KnownImagesError(
            f"list {name}: {phashes[0]} is the perceptual hash of plain images, whatever their colour",
            remedy="List a plain image by the sha256 of its bytes.",
        )
    # Who is killed before the rows follow leaves a lease, for which the next run or vacuum looks at all of them.
    with catalog.runs.recorded("review", is_kept=False):
        catalog.known_images.put(replace(known, phashes=seen))
        result = catalog.apply_verdicts(lists_changed=True)
    return KnownReport(
        catalog=catalog.uri,
        name=name,
        num_hashes=len(hashes),
        num_phashes=len(seen),
        num_without_look=len(phashes) - len(seen),
        num_changed=result.num_changed,
        flips=result.flips,
    )


def remove_list(config: CatalogConfig, name: str) -> KnownReport:
    """Takes a list out of a catalog; its images are decided by people and models again.

    Raises:
        KnownImagesError: there is none of this name.
    """
    catalog = Catalog.open(config)
    with catalog.runs.recorded("review", is_kept=False):  # as in `add_list`
        try:
            catalog.known_images.remove(name)
        except KnownImagesError:
            # Who has removed it may have been interrupted before the rows followed, or could not write them.
            if not _stands_in_rows(catalog, name):
                raise
        result = catalog.apply_verdicts(lists_changed=True)
    return KnownReport(catalog=catalog.uri, name=name, num_changed=result.num_changed, flips=result.flips)


def _stands_in_rows(catalog: Catalog, name: str) -> bool:
    reviewers = (pc.struct_field(flat(rows["verdict"]), "reviewer") for rows in catalog.image_batches(["verdict"]))
    return any(pc.any(pc.equal(some, f"{LIST_PREFIX}{name}")).as_py() for some in reviewers)


def is_text(path: Path) -> bool:
    """Whether a file is taken for a list of hashes, by its name; others are taken for images."""
    return path.suffix.lower() in _TEXTS


def read_hashes(path: Path, *, with_look: bool) -> tuple[list[str], list[str]]:
    """Reads hashes from a text file, the first word of each line; or takes those of an image.

    Args:
        with_look: of an image, its perceptual hash too, unless it is plain; of a JPEG up to two.

    Returns:
        Hashes of bytes and perceptual ones, each once, in order.

    Raises:
        KnownImagesError: the file cannot be read, or a line holds no hash.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KnownImagesError(f"{path}: {error.strerror}", remedy="Name a list of hashes, or an image.") from error
    if not is_text(path):
        try:
            facts = decode(data, (_ALL_FRAMES,), ImageLimits()).facts
            left = leave_encoded(data, (_ALL_FRAMES,), ImageLimits(), facts.content_hash)
        except ImageError as error:
            raise KnownImagesError(f"{path}: {error}", remedy="Name a text file of hashes, or an image.") from error
        # Pools that decode JPEGs on a GPU leave the rows a hash that is another by some bits.
        looks = [facts.phash, None if left is None else left.facts.phash]
        return [facts.content_hash], list(dict.fromkeys(look for look in looks if with_look and look))
    hashes: dict[str, None] = {}
    phashes: dict[str, None] = {}
    lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace")
    for number, line in enumerate(lines, start=1):
        word = re.split(r"[\s,;]", line.partition("#")[0].strip().lower(), maxsplit=1)[0].strip('"')
        if _SHA256.fullmatch(word):
            hashes[word] = None
        elif _PHASH.fullmatch(word):
            phashes[word] = None
        elif word:
            raise KnownImagesError(
                f"{path}, line {number}: {word[:80]!r} is no hash",
                remedy="Write 64 hexadecimal digits of a sha256 or 16 of a pHash at the beginning of each line.",
            )
    return list(hashes), list(phashes)

"""Which images an erasure means: by address, or by a file of ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import concat, duplicates, index_of, to_binary, to_words
from vlmflow.errors import ConfigError
from vlmflow.sources.uris import ids_of_normalised, spelled, spellings

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, eq=False)
class Images:
    """What an erasure names.

    Attributes:
        keys: the ids that were given, and of each address the id that its image has without a key of the caller's, as
            ``schema.KEY``, each once.
        uris: the addresses that were given, normalised; of signed urls also as earlier versions may have had them.
        num_images: these, and the images of rows that have one of the addresses, each once.
        num_rows: of them in the newest version of the catalog.
        num_named: addresses and ids that were given, each once.
        erased: of these, those without a row because they were erased before.
        absent: those without a row that were never erased either, such as mistyped ones.
    """

    keys: pa.Array
    uris: tuple[str, ...]
    num_images: int
    num_rows: int
    num_named: int
    erased: tuple[str, ...]
    absent: tuple[str, ...]


def find_images(catalog: Catalog, uris: Sequence[str], ids_file: Path | None) -> Images:
    """The images of these addresses and ids, whether or not the catalog holds them.

    An address stands for all images that have it, whatever the caller's keys.

    Raises:
        ConfigError: neither was given, an address is empty, or the file cannot be read, or holds what is no id or none.
    """
    if not uris and ids_file is None:
        raise ConfigError("no image is named", remedy="Give --uri or --ids.")
    if any(not uri.strip() for uri in uris):  # it would have a tombstone of its own, and all would seem to be erased
        remedy = "Give the address of an image; a variable that is not set leaves it empty. Nothing was erased."
        raise ConfigError("an address of --uri is empty", remedy=remedy)
    addresses: dict[str, list[str]] = {}  # by the normalised one, all that rows may have
    for normal, *former in (spellings(spelled(uri)) for uri in uris):
        addresses.setdefault(normal, [normal]).extend(former)
    every = tuple(dict.fromkeys(chain.from_iterable(addresses.values())))
    ids = to_binary(pa.array([], pa.string())) if ids_file is None else _read_ids(ids_file)
    own = to_binary(pa.array(ids_of_normalised(every, None), pa.string()))
    keys = _once(concat([ids, own]))
    wanted, asked = index_of(keys), pa.array(every, pa.string())
    found = [ids, to_binary(pa.array(ids_of_normalised(addresses, None), pa.string()))]
    num_rows = 0
    held: set[str] = set()  # addresses and ids of the rows
    for rows in catalog.image_batches(["image_id", "uri"]):
        by_id = wanted.find(*to_words(to_binary(rows["image_id"]))) >= 0
        hits = rows.filter(pc.or_(pa.array(by_id), pc.is_in(rows["uri"], value_set=asked)))
        found.append(to_binary(hits["image_id"]))
        num_rows += hits.num_rows
        held |= {*hits["image_id"].to_pylist(), *hits["uri"].to_pylist()}
    key_of = dict(zip(every, own.to_pylist(), strict=True))
    named = {name: [key_of[uri] for uri in several] for name, several in addresses.items()}
    named |= {key.hex(): [key] for key in ids.to_pylist()}
    without = [name for name in named if held.isdisjoint(addresses.get(name, [name]))]
    pairs = [(name, key) for name in without for key in named[name]]
    hits = index_of(catalog.erased_keys).find(*to_words(pa.array([key for _, key in pairs], schema.KEY))) >= 0
    before = {name for (name, _), is_erased in zip(pairs, hits, strict=True) if is_erased}
    return Images(
        keys=keys,
        uris=every,
        num_images=len(_once(concat(found))),
        num_rows=num_rows,
        num_named=len(named),
        erased=tuple(name for name in without if name in before),
        absent=tuple(name for name in without if name not in before),
    )


def _once(keys: pa.Array) -> pa.Array:
    return keys.filter(pa.array(~duplicates(keys)))


def _read_ids(path: Path) -> pa.Array:
    try:
        if path.suffix == ".parquet":
            return _checked(path, _column(path, pyarrow.parquet.read_table(path, partitioning=None)).to_pylist())
        if path.suffix == ".csv":
            several_lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return _checked(path, _column(path, pyarrow.csv.read_csv(path, parse_options=several_lines)).to_pylist())
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"--ids {path}: {error.strerror or error}", remedy="Name an existing file.") from error
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids {path} cannot be read", remedy="Write an image_id a line.") from error
    return _checked(path, [line.partition("#")[0].strip() for line in lines])


def _column(path: Path, table: pa.Table) -> pa.ChunkedArray:
    if "image_id" not in table.column_names:
        raise ConfigError(f"--ids {path} has no column image_id", remedy="Name the column image_id.")
    return pc.cast(table["image_id"], pa.string())


def _checked(path: Path, ids: Sequence[str | None]) -> pa.Array:
    """Refuses the whole file if one line is no id: erasing half of a list is worse than erasing none."""
    for number, value in enumerate(ids, start=1):
        if value and not _ID.fullmatch(value):
            raise ConfigError(
                f"--ids {path}, line {number}: {value!r} is no image_id",
                remedy="An image_id is 32 lower-case hexadecimal digits. Nothing was erased.",
            )
    found = [value for value in ids if value]
    if not found:  # what was to fill it failed, more often than not
        raise ConfigError(f"--ids {path} holds no image_id", remedy="Write an image_id a line. Nothing was erased.")
    return to_binary(pa.array(found, pa.string()))

"""Perceptual hashes are looked up in lists: all that are near are found, in little memory and time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.report_samples import put_rows
from vlmflow.catalog import Catalog, known_images
from vlmflow.catalog.known_images import MAX_DISTANCE, KnownImages, KnownList
from vlmflow.cli import main
from vlmflow.config import CatalogConfig

RNG = np.random.default_rng(0)


def texts(values: np.ndarray) -> list[str]:
    return [f"{value:016x}" for value in values]


def verdicts(matcher: KnownImages, looks: list[str | None]) -> pa.StructArray:
    nothing = pa.chunked_array([pa.nulls(len(looks), pa.string())])
    return matcher.verdicts(nothing, pa.chunked_array([looks], pa.string()))


@pytest.mark.parametrize("max_distance", range(MAX_DISTANCE + 1))
def test_all_that_are_near_are_found(max_distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_images, "_MAX_CELLS", 64)
    known = RNG.integers(0, 2**64 - 1, 500, np.uint64)
    known[100:200] &= np.uint64(0xFFFF)  # many share bits, as drawings on white do
    given = RNG.choice(known, 300)
    for number in range(len(given)):
        for bit in RNG.choice(64, number % (max_distance + 3), replace=False):
            given[number] ^= np.uint64(1) << np.uint64(bit)
    least = np.bitwise_count(given[:, None] ^ known[None, :]).min(axis=1)
    matcher = KnownImages([KnownList("looks", "block", (), tuple(texts(known)), max_distance=max_distance)])
    found = verdicts(matcher, [None, *texts(given)]).to_pylist()[1:]
    reasons = [f"looks like a listed image ({bits} of 64 bits differ)" for bits in least]
    wanted = [reason if bits <= max_distance else None for reason, bits in zip(reasons, least, strict=True)]
    assert [row and row["reason"] for row in found] == wanted


def test_a_list_is_read_once_and_hashes_that_share_no_bits_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    known = RNG.integers(0, 2**64 - 1, 20_000, np.uint64)
    matcher = KnownImages([KnownList("looks", "block", (), tuple(texts(known)), max_distance=4)])
    parsed, compared = [], []
    parse, lower = known_images._parsed, known_images._lower
    monkeypatch.setattr(known_images, "_parsed", lambda some: parsed.append(len(some)) or parse(some))
    monkeypatch.setattr(known_images, "_lower", lambda *args: compared.append(args[-1].sum()) or lower(*args))
    for _ in range(3):
        found = verdicts(matcher, texts(RNG.integers(0, 2**64 - 1, 1_000, np.uint64)))
        assert found.null_count == len(found)
    assert sorted(parsed) == [1_000, 1_000, 1_000, 20_000]
    assert sum(compared) < 3 * 1_000 * 20_000 / 100


def test_a_long_list_of_looks_is_matched_in_little_memory() -> None:
    known = np.random.default_rng(0).integers(0, 2**63, 20_000, np.uint64)
    looks = [f"{value:016x}" for value in known]
    seen = [None, *(f"{value:016x}" for value in np.random.default_rng(1).integers(0, 2**63, 2_000, np.uint64))]
    seen[5], seen[-1] = f"{known[7] ^ np.uint64(3):016x}", looks[-1]
    matcher = KnownImages([KnownList("looks", "block", (), tuple(looks), max_distance=2)])
    content_hash, phash = pa.chunked_array([pa.nulls(len(seen), pa.string())]), pa.chunked_array([seen], pa.string())
    tracemalloc.start()
    try:
        found = matcher.verdicts(content_hash, phash)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 * 2**20
    assert np.flatnonzero(found.is_valid()).tolist() == [5, len(seen) - 1]
    assert found[5].as_py()["reason"] == "looks like a listed image (2 of 64 bits differ)"


@pytest.mark.parametrize("max_distance", [4, 8])
def test_hashes_of_plain_images_are_near_to_none(max_distance: int) -> None:
    looks = [f"{value:016x}" for value in (0, 1 << 63, 0x8A00000000000000)]
    for listed, expected in ((looks, [None, None, 0]), (looks[:2], [None] * 3)):
        matcher = KnownImages([KnownList("looks", "block", (), tuple(listed), max_distance=max_distance)])
        found = [row and int(row["reason"].split("(")[1].split()[0]) for row in verdicts(matcher, looks).to_pylist()]
        assert found == expected


def test_hashes_that_block_nothing_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lists of versions that had a perceptual hash of plain images are kept as they were written."""
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="first")
    looks = (f"{1 << 63:016x}", f"{0:016x}", "b" * 16)
    Catalog.open(config).known_images.put(KnownList("old", "block", ("a" * 64,), looks))

    def listed(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["known", "list", config.uri, *options])
        return capsys.readouterr().out

    assert [(known["phashes"], known["phashes_ignored"]) for known in json.loads(listed("--json"))] == [(1, 2)]
    shown = " ".join(listed().split())
    assert "list old: 2 more perceptual hashes are those of plain images and block nothing." in shown
    assert "with `vlmflow known add --name` and a name that no list has" in shown, "else it would take its place"

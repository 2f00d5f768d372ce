"""Followers of catalogs to which all sorts of things are done: at each look they hold what the catalog holds."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import TASKS, config_of, enrich, fingerprints, image_id, references, request, write
from tests.erasing import key
from tests.following import Follower
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.reviews import EVENT

NAMES = [f"image {number}" for number in range(12)]
ERASABLE = NAMES[:4]  # of the others it must be told without an erasure
SOME = ["image_id", "uri", "caption", "decision", "embed_run_id", "source"]
STEPS = 40
SOURCE = [
    pa.field("price", pa.float64()),
    pa.field("b.c d'e", pa.list_(pa.string())),
    pa.field("box", pa.struct([("x", pa.float32()), ("of", pa.list_(pa.struct([("z", pa.int64())])))])),
]
VALUES: dict[str, list[Any]] = {
    "price": [None, 1.0, float("nan")],
    "b.c d'e": [None, [], ["x"], ["x", None]],
    "box": [None, {"x": 1.0, "of": [{"z": 1}, None]}, {"x": None, "of": []}, {"x": float("nan"), "of": [{"z": 2}]}],
}


class History:
    """What is done to a catalog, by chance: runs over several dates, late commits, new columns, upkeep, erasures."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.fields = SOURCE[:1]
        self.config = config_of(folder)
        self.catalog = Catalog.open_or_create(self.config, pa.schema(self.fields))
        self.written: list[tuple[str, pa.Table]] = []  # and not committed
        self.steps = {
            self.run: 6,
            self.write: 3,
            self.commit: 4,
            self.erase: 2,
            self.lift: 2,
            self.compact: 2,
            self.vacuum: 2,
            self.judge: 2,
            self.add_column: 1,
        }

    def step(self, number: int) -> None:
        (chosen,) = self.chance.choices(list(self.steps), list(self.steps.values()))
        chosen(f"r{number}", self.chance.sample(NAMES, self.chance.randint(1, 6)))

    def run(self, run_id: str, names: list[str]) -> None:
        self.catalog.commit(run_id, self._files(run_id, names))

    def write(self, run_id: str, names: list[str]) -> None:
        self.written.append((run_id, self._files(run_id, names)))

    def commit(self, run_id: str, names: list[str]) -> None:
        if self.written:
            self.catalog.commit(*self.written.pop(self.chance.randrange(len(self.written))))

    def erase(self, run_id: str, names: list[str]) -> None:
        if self.chance.random() < 0.5:
            self.catalog.erase(key(self.chance.choice(ERASABLE)))
        else:
            self.catalog.erase(pa.array([], schema.KEY), [f"mem://{self.chance.choice(ERASABLE)}"])

    def lift(self, run_id: str, names: list[str]) -> None:
        self.catalog.lift(key(*ERASABLE[:2]), [f"mem://{name}" for name in ERASABLE[:2]])

    def compact(self, run_id: str, names: list[str]) -> None:
        self.catalog.compact(run_id)

    def vacuum(self, run_id: str, names: list[str]) -> None:
        self.written.clear()  # no lease guards them here
        self.catalog.vacuum(retention=dt.timedelta())

    def judge(self, run_id: str, names: list[str]) -> None:
        held = {row["image_id"]: row for row in self.catalog.images(["image_id", "content_hash"]).to_pylist()}
        said = {"decision": self.chance.choice(["allow", "block"]), "reviewer": "ada", "at": dt.datetime.now(dt.UTC)}
        rows = [held[image_id(name)] | said for name in names if image_id(name) in held]
        self.catalog.reviews.add(pa.Table.from_pylist(rows, schema=EVENT))
        self.catalog.apply_verdicts()

    def add_column(self, run_id: str, names: list[str]) -> None:
        self.written.clear()
        self.fields = SOURCE[: len(self.fields) + 1]
        self.catalog = Catalog.open_or_create(self.config, pa.schema(self.fields))

    def _files(self, run_id: str, names: list[str]) -> pa.Table:
        pick = self.chance.choice
        source = [{field.name: pick(VALUES[field.name]) for field in self.fields} for _ in names]
        listed = references(names, version=pick(["v1", "v2"]), source=source, source_type=pa.struct(self.fields))
        tasks = pick([TASKS, ("embed", "moderate"), ("caption",)])
        prints = fingerprints(tasks, caption=pick(["caption-1", "caption-2"]), embed=pick(["embed-1", "embed-2"]))
        asked = request(tasks, date=dt.date(2026, 3, self.chance.randint(1, 3)), fingerprints=prints)
        content, caption, decision = pick("ab"), pick(["a cat", "a dog"]), pick(["allow", "block"])
        return write(self.catalog, run_id, [listed], asked, content=content, caption=caption, decision=decision)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_is_done_a_follower_holds_what_the_catalog_holds(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "catalog", seed)
    enrich(
        history.catalog,
        "first",
        [references(NAMES, source=[{"price": 1.0}] * len(NAMES), source_type=pa.struct(SOURCE[:1]))],
    )
    followers = {Follower(): 0.3, Follower(): 0.1, Follower(SOME): 0.2}  # by how often they look
    for number in range(STEPS):
        history.step(number)
        for follower, often in followers.items():
            if history.chance.random() < often or number == STEPS - 1:
                follower.follow(Catalog.open(history.config))

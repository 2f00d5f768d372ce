"""Runs, replacements, backfills, compactions, vacuums and erasures in any order: no key is lost, none is doubled.

Hypothesis drives them step by step against one catalog on disk, each run with its own plan and its own handles. A
model of a few lines says what every row must hold afterwards; a reader that follows the changes must hold the same.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.catalog_samples import (
    config_of,
    constants,
    fingerprints,
    finish,
    image_id,
    open_catalog,
    references,
    request,
    rows_by_name,
)
from tests.following import Follower
from vlmflow import schema
from vlmflow.catalog import Catalog, CatalogWriter
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.runs import DEAD_AFTER
from vlmflow.errors import RunRevokedError

NAMES = [f"image {number}" for number in range(9)]
NOW = dt.timedelta()


@dataclass
class Result:
    """What a run found out about an image, as it goes into a commit."""

    name: str
    version: str
    written_at: int
    planned_version: str | None  # of the live row when the run was planned; None: there was none
    ran: frozenset[str]


@dataclass
class Live:
    """What the row of an image must hold."""

    version: str
    written_at: int
    caption: str | None
    has_vectors: bool


@dataclass
class Run:
    """A run under way: what it planned and has not written, and what it wrote and has not committed."""

    run_id: str
    catalog: Catalog
    writer: CatalogWriter
    planned: list[dict[str, Any]]
    columns: pa.Schema
    files: list[pa.Table] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    committed: list[pa.Table] = field(default_factory=list)
    revoked: bool = False
    dead: bool = False


class Interleavings(RuleBasedStateMachine):
    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="vlmflow-test-"))
        self.catalog = open_catalog(self.root / "catalog")
        self.versions = dict.fromkeys(NAMES, 1)
        self.live: dict[str, Live] = {}
        self.erased: set[str] = set()
        self.all_runs: list[Run] = []
        self.clock = 0
        self.follower = Follower()

    def teardown(self) -> None:
        try:
            self.follow()
            found = self.catalog.verify([references(sorted(self.live))], {})
            errors = {kind for kind in found.findings if kind not in ("stale", "orphan_files", "dead_runs")}
            assert errors <= set(), found.findings
        finally:
            shutil.rmtree(self.root)

    @rule(
        target=runs, names=st.sets(st.sampled_from(NAMES), min_size=4), backfill=st.booleans(), count=st.integers(0, 9)
    )
    def start(self, names: set[str], backfill: bool, count: int) -> Run:
        """A run plans, and writes a part of what is due."""
        run_id = f"run-{len(self.all_runs)}"
        catalog = Catalog.open(config_of(self.root / "catalog"))
        tasks = ("embed", "moderate")
        asked = request(tasks, fingerprints=fingerprints(tasks, moderate=run_id)) if backfill else request()
        catalog.runs.start(run_id, {})
        listed = references(sorted(names), version={name: self.version_of(name) for name in names})
        with catalog.plan([listed], asked) as plan:
            writer = catalog.writer(constants(run_id, asked), plan.version)
            planned = [row for table in plan.batches() for row in table.to_pylist()]
            run = Run(run_id, catalog, writer, planned, plan.schema)
        self.all_runs.append(run)
        self._write(run, count)
        return run

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=5))
    def objects_change(self, names: set[str]) -> None:
        for name in names:
            self.versions[name] += 1

    def _write(self, run: Run, count: int) -> None:
        for row in run.planned[:count]:
            self.clock += 1
            name, version = row["uri"].removeprefix("mem://"), row["object_version"]
            rows = finish(
                pa.Table.from_pylist([row], schema=run.columns), content=version, caption=f"caption of {version}"
            )
            run.files.append(run.writer.write(rows))
            ran = frozenset(rows["tasks_run"][0].as_py())
            run.results.append(Result(name, version, self.clock, row["previous_version"], ran))
        del run.planned[:count]

    @rule(run=runs, count=st.integers(0, 5))
    def commit(self, run: Run, count: int) -> None:
        self._write(run, count)
        self._commit(run)

    @rule(run=runs, other=runs)
    def commit_inside_a_commit(self, run: Run, other: Run) -> None:
        """The other run commits between the decision and the writing of the first one's."""
        if run is other:
            return
        for each in (run, other):
            self._write(each, 2)
        with between_decision_and_write(lambda: self._commit(other)):
            self._commit(run)

    @rule(run=runs, what=st.sampled_from(["compact", "erase"]), name=st.sampled_from(NAMES))
    def upkeep_inside_a_commit(self, run: Run, what: str, name: str) -> None:
        self._write(run, 2)
        with between_decision_and_write(lambda: self.compact() if what == "compact" else self.erase(name)):
            self._commit(run)

    @rule(run=runs)
    def commit_the_same_again(self, run: Run) -> None:
        """As after an answer that was lost."""
        if run.committed and not run.revoked:
            result = run.catalog.commit(run.run_id, run.committed[-1])
            assert (result.num_added, result.num_replaced) == (0, 0)

    @rule(run=consumes(runs))
    def end(self, run: Run) -> None:
        run.catalog.runs.finish(run.run_id, {})

    @rule(target=runs, run=consumes(runs))
    def die(self, run: Run) -> Any:
        """No sign of life for long; it may come back all the same."""
        lease = self.root / "catalog" / "runs" / f"{run.run_id}.lease"
        if not lease.exists():
            return multiple()
        old = time.time() - DEAD_AFTER.total_seconds() - 5
        os.utime(lease, (old, old))
        run.dead = True
        return run

    @rule(run=runs)
    def reopen(self, run: Run) -> None:
        run.catalog = Catalog.open(config_of(self.root / "catalog"))

    @rule()
    def compact(self) -> None:
        self.catalog.compact("upkeep")

    @rule()
    def vacuum(self) -> None:
        result = self.catalog.vacuum(retention=NOW)
        self._revoke(set(result.revoked))

    @rule(name=st.sampled_from(NAMES))
    def erase(self, name: str) -> None:
        self.catalog.erase(key(name))
        self.erased.add(name)
        self.live.pop(name, None)
        self._revoke({run.run_id for run in self.all_runs if run.dead})

    @rule(name=st.sampled_from(NAMES))
    def lift(self, name: str) -> None:
        if name in self.erased:
            self.catalog.lift(key(name))
            self.erased.discard(name)

    @rule()
    def follow(self) -> None:
        """A reader takes over what has changed; it checks itself that it holds all then, and was told no more."""
        self.follower.follow(Catalog.open(config_of(self.root / "catalog")))

    @invariant()
    def every_row_is_there_once_and_as_it_must_be(self) -> None:
        rows = rows_by_name(self.catalog)
        held = {
            name: (row["object_version"], row["caption"], row["embed_run_id"] is not None) for name, row in rows.items()
        }
        assert held == {name: (row.version, row.caption, row.has_vectors) for name, row in self.live.items()}
        assert self.catalog.embeddings(["image_id"]).num_rows == 2 * sum(row.has_vectors for row in self.live.values())

    def version_of(self, name: str) -> str:
        return f"v{self.versions[name]}"

    def _commit(self, run: Run) -> None:
        files, results = run.files, run.results
        run.files, run.results = [], []
        if not files:
            return
        table = pa.concat_tables([schema.DESCRIPTOR.empty_table(), *files])
        if run.revoked:
            with pytest.raises(RunRevokedError):
                run.catalog.commit(run.run_id, table)
            return
        try:
            run.catalog.commit(run.run_id, table)
        except RunRevokedError:
            assert run.revoked, "by an erasure inside the commit, or by none"
            return
        run.committed.append(table)
        for result in results:
            self._expect(result)

    def _expect(self, ours: Result) -> None:
        """The rules of the catalog, once more and in short."""
        if ours.name in self.erased:
            return
        live = self.live.get(ours.name)
        caption = f"caption of {ours.version}" if "caption" in ours.ran else None
        if live is None:
            self.live[ours.name] = Live(ours.version, ours.written_at, caption, "embed" in ours.ran)
            return
        if ours.planned_version is None:
            return  # a new image that another run has added meanwhile
        moved = live.version not in (ours.planned_version, ours.version)
        if moved and live.written_at > ours.written_at:
            return  # another run has met a newer version
        same = live.version == ours.version
        self.live[ours.name] = Live(
            ours.version,
            ours.written_at,
            caption or (live.caption if same else None),
            "embed" in ours.ran or (same and live.has_vectors),
        )

    def _revoke(self, revoked: set[str]) -> None:
        for run in self.all_runs:
            if run.run_id in revoked:
                run.revoked, run.dead = True, False


@contextlib.contextmanager
def between_decision_and_write(action: Any) -> Iterator[None]:
    """Does something else just before the first write of a commit in the block."""
    original = commit_module._write
    done: list[bool] = []

    def write_later(*arguments: Any) -> None:
        if not done:
            done.append(True)
            action()
        original(*arguments)

    commit_module._write = write_later
    try:
        yield
    finally:
        commit_module._write = original


def key(name: str) -> pa.Array:
    return to_binary(pa.array([image_id(name)], pa.string()))


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


def test_no_key_is_lost_and_none_doubled() -> None:
    run_state_machine_as_test(Interleavings, settings=settings(SETTINGS, max_examples=4, stateful_step_count=30))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_key_is_lost_and_none_doubled_in_many_more() -> None:
    run_state_machine_as_test(
        Interleavings, settings=settings(SETTINGS, max_examples=150, stateful_step_count=40, derandomize=False)
    )

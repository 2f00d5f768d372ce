"""The catalog: two Delta tables, run records and policies under one folder."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.added import AddedKeys
from vlmflow.catalog.apply import CommitResult, ImageChanges, Outcome, data_file
from vlmflow.catalog.before import flagged_before
from vlmflow.catalog.columns import checked_numbers, missing_columns, source_columns, storable
from vlmflow.catalog.commit import Change, CommitRequest, Committed, commit
from vlmflow.catalog.compact import CompactResult, Unreferenced, compact_table
from vlmflow.catalog.due import PlanRequest
from vlmflow.catalog.erase import EraseResult, erase, without_erased
from vlmflow.catalog.export import ExportResult, export
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.follow import Bookmark, ChangeFeed, Since
from vlmflow.catalog.keys import KeyIndex, digest_of, to_binary
from vlmflow.catalog.known import KnownBytes, known_bytes
from vlmflow.catalog.known_images import KnownStore
from vlmflow.catalog.log import DataFile, Snapshot, TableLog, TableName
from vlmflow.catalog.outdated import update_columns
from vlmflow.catalog.plan import Plan, plan
from vlmflow.catalog.plan_parts import Workers
from vlmflow.catalog.policies import PolicyStore
from vlmflow.catalog.read import embedding_batches, image_batches, of_one_time, readable
from vlmflow.catalog.reviews import JudgeResult, ReviewStore, Said, apply_verdicts
from vlmflow.catalog.rows import RunConstants
from vlmflow.catalog.runs import FLOWS, RunStore
from vlmflow.catalog.swap import swap_files
from vlmflow.catalog.tombstones import ErasedOf, Tombstones
from vlmflow.catalog.upgrade import add_source_columns, upgrade
from vlmflow.catalog.vacuum import RETENTION, VacuumResult, vacuum
from vlmflow.catalog.verify import Verification, verify
from vlmflow.catalog.writer import CatalogWriter
from vlmflow.config import CatalogConfig
from vlmflow.storage import parse_address

# A replacement copies the files of its rows: those of images stay smaller, for that to be quick.
TARGET_BYTES: Mapping[TableName, int] = {"images": 32 * 1024 * 1024, "embeddings": 128 * 1024 * 1024}


class Catalog:
    """Reads and changes one catalog. On the driver only: of its parts, only the writer goes to workers."""

    def __init__(self, folder: Folder, images: TableLog, embeddings: TableLog) -> None:
        self._folder = folder
        self._images = images
        self._embeddings = embeddings
        self._added: dict[int, AddedKeys] = {}  # by version of planning
        self._tombstones = Tombstones(folder)
        self.runs, self.flows = RunStore(folder), RunStore(folder, FLOWS)
        self.policies = PolicyStore(folder)
        self.reviews = ReviewStore(folder)
        self.known_images = KnownStore(folder)

    @classmethod
    def open(cls, config: CatalogConfig) -> Catalog:
        """Opens a catalog, and leaves it as it is: one of an older version of vlmflow too, which may be at work on it.

        Raises:
            CatalogError: there is none, or another version of vlmflow wrote it.
            StorageAccessError: the bucket does not exist, or refuses.
        """
        folder = Folder(config)
        folder.check_access()
        return cls(folder, TableLog.open(folder, "images"), TableLog.open(folder, "embeddings"))

    @classmethod
    def exists(cls, config: CatalogConfig) -> bool:
        """Whether there is a catalog."""
        folder = Folder(config)
        folder.check_access()
        return TableLog.exists(folder, "images") and TableLog.exists(folder, "embeddings")

    @classmethod
    def open_or_create(cls, config: CatalogConfig, source: pa.Schema) -> Catalog:
        """Opens a catalog, created first if it is absent; adds what it lacks of the caller's columns ``source``.

        One of an older version is upgraded; see :meth:`upgrade`. Several runs may create one catalog at once.

        Raises:
            CatalogError: another version of vlmflow wrote it, or it holds one of the columns under another type.
            StorageAccessError: the bucket does not exist, or refuses, or would let commits overwrite each other.
        """
        wanted = storable(source)
        folder = Folder(config)
        folder.check_access()
        folder.check_exclusive()
        embeddings = TableLog.open_or_create(folder, "embeddings", schema.EMBEDDINGS)
        images = TableLog.open_or_create(folder, "images", schema.with_source(schema.IMAGES, wanted))
        catalog = cls(folder, images, embeddings)
        catalog.upgrade()
        add_source_columns(images, wanted)
        return catalog

    def upgrade(self) -> None:
        """Gives a catalog of an older version the columns of this one; older versions refuse it from then on.

        For whoever writes such columns. Readers take them for null until then, and upkeep and verdicts need none.

        Raises:
            StorageAccessError: the store refuses to be written to.
        """
        for log in (self._embeddings, self._images):
            upgrade(log)

    @property
    def uri(self) -> str:
        """The address of the catalog."""
        return self._folder.config.uri

    @property
    def version(self) -> int:
        """The newest version of the images table."""
        return self._images.refreshed_table().version()

    @property
    def newest_images(self) -> Snapshot:
        """The newest version of the images table: its files, and the columns it is read with, the caller's included.

        Rows with these columns can be written back once the catalog is upgraded.
        """
        images = self._images.refresh()
        return dataclasses.replace(images, schema=readable(images.schema))

    @property
    def source_columns(self) -> pa.Schema:
        """The caller's columns that the images table has."""
        return source_columns(self._images.refresh().schema)

    def check_source(self, source: pa.Schema) -> None:
        """Makes sure that the table can take the caller's columns; adds none.

        Raises:
            CatalogError: it holds one of them under another type, or a type cannot be stored.
        """
        missing_columns(self._images.refresh().schema, storable(source))

    def plan(self, references: Iterable[pa.RecordBatch], request: PlanRequest, workers: Workers | None = None) -> Plan:
        """Finds out what is due; see :func:`vlmflow.catalog.plan.plan`."""
        # The tombstones after the version: an erasure of a later one is seen by the commit.
        snapshot = self._images.refresh()
        references = checked_numbers(references, snapshot.schema)
        return plan(references, request, self._folder, snapshot, self._tombstones.erased(), workers)

    def known_bytes(self, request: PlanRequest, sizes: pa.Array | None) -> KnownBytes | None:
        """Indexes results by the bytes that they are of; see :func:`vlmflow.catalog.known.known_bytes`."""
        images = self._images.refresh()
        return known_bytes(self._folder, images, self._embeddings.refresh(), request, sizes)

    def writer(self, constants: RunConstants, plan_version: int) -> CatalogWriter:
        """A writer for workers.

        Args:
            plan_version: ``Plan.version``: the version of the images table that the run was planned against; -1
                if there was none yet.
        """
        versions: dict[TableName, int] = {
            "images": plan_version,
            "embeddings": self._embeddings.refreshed_table().version(),
        }
        return CatalogWriter(self._folder, self._images.refresh().schema, constants, versions)

    def commit(self, run_id: str, files: pa.Table) -> CommitResult:
        """Makes what workers wrote visible: embeddings first, so that no image row ever lacks its own.

        Args:
            files: what :meth:`CatalogWriter.write` returned, of any number of calls. The same files again do nothing.

        Raises:
            CommitError: other writers won every attempt, or a file has disappeared. Embeddings may be in then: no
                row refers to them, and compaction removes them.
        """
        commit_id = digest_of(run_id, *sorted(files["path"].to_pylist()))
        erased = ErasedOf(self._tombstones, files)
        of_embeddings = files.filter(pc.equal(files["table"], "embeddings"))
        embedded = self._commit_embeddings(run_id, commit_id, of_embeddings, erased)
        of_images = files.filter(pc.equal(files["table"], "images"))
        outcome, done = self._commit_images(run_id, commit_id, of_images, erased)
        return CommitResult(
            images_version=done.version,
            embeddings_version=embedded.version,
            num_added=outcome.num_added,
            num_replaced=outcome.num_replaced,
            num_dropped=outcome.num_dropped,
            num_superseded=outcome.num_superseded,
            num_erased=outcome.num_erased,
            statuses=dict(outcome.statuses),
            errors=dict(outcome.errors),
            others_decisions=dict(outcome.others_decisions),
            num_conflicts=embedded.num_conflicts + done.num_conflicts,
            repeated=done.repeated,
        )

    def compact(self, run_id: str, *, target_bytes: Mapping[TableName, int] = TARGET_BYTES) -> CompactResult:
        """Joins small files, and leaves out embeddings that no row refers to, of runs that commit no more.

        Those of dead runs stay until a vacuum has shut these runs out.

        Args:
            target_bytes: about how large files become, per table.
        """
        # The states first: a run that is over before the rows are read cannot refer to more.
        over = self.runs.over()
        unreferenced = Unreferenced(self._folder, self._images.refresh(), over)
        images = compact_table(self._images, run_id, target_bytes["images"], None)
        return images + compact_table(self._embeddings, run_id, target_bytes["embeddings"], unreferenced)

    def vacuum(self, *, retention: dt.timedelta = RETENTION, dry_run: bool = False) -> VacuumResult:
        """Removes what nobody needs any more; see :func:`vlmflow.catalog.vacuum.vacuum`."""
        logs = self._logs_from_now()
        if dry_run:
            return vacuum(self._folder, logs, self.runs, "", retention=retention, dry_run=True)
        with self.runs.recorded("vacuum") as run_id:
            result = vacuum(self._folder, logs, self.runs, run_id, retention=retention, dry_run=False)
            if result.revoked:  # they may have died before they brought in late verdicts, and no run looks once buried
                self.apply_verdicts(lists_changed=True)
            for run in result.revoked:
                self.runs.bury(run)
            self.reviews.merge(self._tombstones, self.runs.now())
            self._tombstones.merge(self.runs.now())
            return result

    def erase(self, keys: pa.Array, uris: Sequence[str] = ()) -> EraseResult:
        """Erases images for good; see :func:`vlmflow.catalog.erase.erase`."""
        logs = self._logs_from_now()
        with self.runs.recorded("erase") as run_id:
            return erase(self._folder, logs, self.runs, self._tombstones, keys, run_id, tuple(uris))

    def apply_verdicts(
        self, *, lists_changed: bool = False, only: Sequence[str] | None = None, first: Sequence[str] = ()
    ) -> JudgeResult:
        """Brings verdicts into the rows; see :func:`vlmflow.catalog.reviews.apply_verdicts`.

        Args:
            lists_changed: every row is looked up in the lists of known images, not only those that people have judged.
            only: ids of the images whose verdicts are brought in; None: of all.
            first: paths of files of the table that are likely to hold them.
        """

        def read() -> Said:
            newest = self.reviews.newest()
            if only is not None:
                newest = newest.filter(pc.is_in(newest["image_id"], value_set=pa.array(list(only), pa.string())))
            return Said(newest, self.known_images.matcher())

        every_row = lists_changed and only is None
        now = Catalog(self._folder, *self._logs_from_now())  # this one may be the app's, open for months
        # Of some images: the app does so every few seconds, and nobody would read thousands of records of it.
        with self.runs.recorded("review", is_kept=only is None, every_row=every_row) as run_id:
            result = apply_verdicts(
                self._folder,
                read,
                lists_changed,
                run_id,
                now._images.refresh,
                lambda swaps: now.swap_images(run_id, "review", swaps),
                first,
            )
            self.reviews.merge(self._tombstones, self.runs.now())
            return result

    def lift(self, keys: pa.Array, uris: Sequence[str] = ()) -> pa.Array:
        """Lets erased images come back; see :meth:`vlmflow.catalog.tombstones.Tombstones.lift`."""
        return self._tombstones.lift(keys, uris)

    @property
    def erased_keys(self) -> pa.Array:
        """The images that are erased by id, as ``schema.KEY``."""
        return self._tombstones.keys()

    def verify(
        self, references: Iterable[pa.RecordBatch], fingerprints: Mapping[str, str], num_examples: int = 5
    ) -> Verification:
        """Reconciles a source with the catalog; see :func:`vlmflow.catalog.verify.verify`."""
        return verify(
            references,
            self._folder,
            self._images,
            self._embeddings,
            self.runs,
            self._tombstones,
            fingerprints=fingerprints,
            num_examples=num_examples,
        )

    def update_columns(self, run_id: str, planned: Plan) -> Iterator[tuple[int, int]]:
        """Brings the caller's columns of outdated rows up to date; see :mod:`vlmflow.catalog.outdated`.

        Args:
            planned: by this catalog, whose table has all of these columns.
        """
        added = self._added_since(planned.version)
        del self._added[planned.version]  # it passes over files from here on
        return update_columns(self._images, added, run_id, planned.outdated(), planned.found_text_column)

    def live_files(self, table: TableName) -> dict[str, DataFile]:
        """The files of a table's newest version, by path."""
        log = self._images if table == "images" else self._embeddings
        return log.refresh().files

    def swap_images(self, run_id: str, operation: str, swaps: Sequence[tuple[DataFile, DataFile]]) -> list[DataFile]:
        """Puts rewritten files of the images table in place of live ones; see :func:`vlmflow.catalog.swap.swap_files`.

        Returns:
            The files that were not live any more.
        """
        commit_id = digest_of(run_id, *(new.path for _, new in swaps))
        return swap_files(self._images, CommitRequest(commit_id, run_id, operation, self.version), swaps)

    def images(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The live rows of the images table, one per image."""
        return pa.concat_tables(self.image_batches(columns))

    def image_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The live rows of the images table, file by file."""
        return image_batches(self._folder, self._images.refresh(), columns)

    def embeddings(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The embeddings that live rows refer to, one per image and view."""
        return pa.concat_tables(self.embedding_batches(columns))

    def embedding_batches(self, columns: Sequence[str] | None = None, of: KeyIndex | None = None) -> Iterator[pa.Table]:
        """The embeddings that live rows refer to, file by file; of some images: see :mod:`vlmflow.catalog.read`."""
        return embedding_batches(self._folder, *of_one_time(self._images, self._embeddings), columns, of)

    def flagged_before(self, run_id: str) -> KeyIndex | None:
        """The images that a run found flagged; see :func:`vlmflow.catalog.before.flagged_before`."""
        return flagged_before(self._folder, self._images, run_id, self.runs.started_at(run_id))

    def export(self, folder: str | Path, *, with_embeddings: bool) -> ExportResult:
        """Writes the current rows as plain Parquet; see :func:`vlmflow.catalog.export.export`."""
        images, embeddings = of_one_time(self._images, self._embeddings)
        return export(self._folder, images, embeddings if with_embeddings else None, Path(folder))

    def changes(self, since: Since | Bookmark, columns: Sequence[str] | None = None) -> ChangeFeed:
        """Tells what has changed since a version, or a time; see :class:`vlmflow.catalog.follow.ChangeFeed`."""
        return ChangeFeed(self._folder, (self._images, self._embeddings), self._tombstones, since, columns)

    def file_uris(self, table: TableName) -> list[str]:
        """Addresses of the table's live files, for readers of plain Parquet.

        As such readers take them: those of ``DeltaTable.file_uris`` have ``%20`` for a blank, which no store knows.
        """
        return [parse_address(self.uri).child(f"{table}/{path}") for path in self.live_files(table)]

    def _commit_embeddings(self, run_id: str, commit_id: str, files: pa.Table, erased: ErasedOf) -> Committed:
        if not files.num_rows:
            return Committed(self._embeddings.refreshed_table().version(), 0, repeated=False)
        descriptors = files.drop_columns(["keys"]).to_pylist()
        written = [(data_file(row), files["keys"][number].values) for number, row in enumerate(descriptors)]
        change = Change()

        def propose(_: Snapshot) -> Change:
            nonlocal change
            kept = without_erased(self._folder, self._embeddings, written, erased.index(), run_id)
            change = Change(add=tuple(kept))
            return change

        # Though all were erased: whoever makes it again must find it, for what it left out is deleted then.
        request = CommitRequest(commit_id, run_id, "append", pc.min(files["plan_version"]).as_py(), always=True)
        done = commit(self._embeddings, request, propose)
        if not done.repeated:
            committed = {file.path for file in change.add}
            left = [f"embeddings/{file.path}" for file, _ in written if file.path not in committed]
            self._embeddings.delete_leftovers(left)
        return done

    def _commit_images(
        self, run_id: str, commit_id: str, files: pa.Table, erased: ErasedOf
    ) -> tuple[Outcome, Committed]:
        if not files.num_rows:
            return Outcome(), Committed(self.version, 0, repeated=False)
        since: int = pc.min(files["plan_version"]).as_py()
        changes = ImageChanges(self._folder, run_id, files, self._added_since(since), erased)
        done = commit(self._images, CommitRequest(commit_id, run_id, "enrich", since, always=True), changes.propose)
        if not done.repeated:
            self._images.delete_leftovers(changes.leftovers())
        return (Outcome() if done.repeated else changes.outcome), done

    def _logs_from_now(self) -> tuple[TableLog, TableLog]:
        """The tables' logs for a run of upkeep, to be taken before it begins: images first."""
        return self._images.from_now(), self._embeddings.from_now()

    def _added_since(self, version: int) -> AddedKeys:
        if version not in self._added:
            self._added[version] = AddedKeys(frozenset(self._images.files_at(version)), self._keys_of)
        return self._added[version]

    def _keys_of(self, path: str) -> pa.Array:
        return to_binary(self._folder.read_parquet(f"images/{path}", ["image_id"])["image_id"])

"""A catalog put under another policy: real Ray, real tables, tiny models; no image is read."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.steps import InProcess
from tests.pictures import picture, write_broken, write_pictures
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.catalog.log import SCHEMA_VERSION, DataFile
from vlmflow.config import CatalogConfig, Job, ModelConfig
from vlmflow.engine import enrich
from vlmflow.engine import remoderate as module
from vlmflow.engine.progress import SilentProgress
from vlmflow.engine.remoderate import remoderate
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.engine.scope import Scope
from vlmflow.errors import ConfigError
from vlmflow.models import identify
from vlmflow.moderation.policy import bind, load_policy, write_binding
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup

pytestmark = pytest.mark.usefixtures("ray_session")

MODERATION = ["labels", "policy_name", "policy_version", "policy_digest", "decision", "decision_reason"]
OLD_DATE, NEW_DATE = dt.date(2026, 11, 1), dt.date(2026, 11, 2)

Rows = dict[str, dict[str, Any]]


@pytest.fixture
def write_policy(models: dict[str, dict[str, Any]], policy: str, tmp_path: Path) -> Callable[..., str]:
    """Writes a bound policy: the one of conftest with some texts replaced."""

    def write(name: str, embedder: dict[str, Any] = models["embed"], **replaced: str) -> str:
        text = Path(policy).read_text(encoding="utf-8").partition("\nbindings:")[0] + "\nbindings: []\n"
        for old, new in ({"version": '"1"'} | replaced).items():
            known = {"version": 'version: "1"', "gun": "review: 0.45, block: 0.9", "prompt": "a bottle of wine"}[old]
            text = text.replace(known, f"version: {new}" if old == "version" else new)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        write_binding(path, bind(load_policy(str(path)), identify("embed", ModelConfig(**embedder))))
        return str(path)

    return write


@pytest.fixture(scope="module")
def enriched(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("enriched")
    write_pictures(folder / "images", 9)
    made = make_job_in(folder, folder / "images", tasks=("embed", "moderate"))
    enrich(made)
    return made


def in_a_copy(job: Job, folder: Path) -> Job:
    """The job, over a copy of its catalog."""
    shutil.copytree(job.catalog.uri, folder / "catalog")
    return job.model_copy(update={"catalog": CatalogConfig(uri=str(folder / "catalog"))})


@pytest.fixture
def job(enriched: Job, tmp_path: Path) -> Job:
    """Nine images in a catalog of the test's own. Only one reads, and changes, the images: they are those of all."""
    return in_a_copy(enriched, tmp_path)


@pytest.fixture(scope="module")
def enriched_on_two_days(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("two-days")
    made = make_job_in(folder, folder / "images", tasks=("embed", "moderate"))
    for num_images, date in ((4, OLD_DATE), (6, NEW_DATE)):
        write_pictures(folder / "images", num_images)
        enrich(made.model_copy(update={"date": date}))
    return made


@pytest.fixture
def job_of_two_days(enriched_on_two_days: Job, tmp_path: Path) -> Job:
    """Four images of the old date and two of the new one, in a catalog of the test's own."""
    return in_a_copy(enriched_on_two_days, tmp_path)


def rows_of(job: Job, columns: Sequence[str] = MODERATION) -> Rows:
    table = Catalog.open(job.catalog).images(["uri", *columns])
    rows = {row.pop("uri").rsplit("/", 1)[-1]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


def no_model(*_: object) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize("kind", ["light", pytest.param("real", marks=pytest.mark.slow)])
def test_backfilled_and_online_moderation_are_equal_to_the_bit(
    kind: str,
    make_job: Callable[..., Job],
    write_policy: Callable[..., str],
    models: dict[str, dict[str, Any]],
    policy: str,
    real: dict[str, Any],
    tmp_path: Path,
) -> None:
    given = real if kind == "real" else {"models": models, "policy": policy}
    write_pictures(tmp_path / "images", 12)
    write_broken(tmp_path / "images")
    # The models see the same batches in both runs: vectors of other batches differ in their last bits.
    pools = [{"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 4}]
    options: dict[str, Any] = {"tasks": ("embed", "moderate"), "pools": pools, "commit": {"max_rows": 4}}
    job = make_job(tmp_path / "images", date=OLD_DATE, **given, **options)
    enrich(job)
    before = Catalog.open(job.catalog).images()
    embedder = given["models"]["embed"]
    other = write_policy("other", embedder, version='"2"', gun="review: 0.2, block: 0.5", prompt="a red car and a tree")
    damaged = tmp_path / "catalog" / "policies" / ("0" * 64)
    damaged.mkdir()
    (damaged / "policy.json").write_text("{")  # of no row: in nobody's way

    report = remoderate(job.model_copy(update={"policy": other}))

    fresh = make_job(
        tmp_path / "images", models=given["models"], policy=other, catalog={"uri": str(tmp_path / "f")}, **options
    )
    enrich(fresh)
    assert rows_of(job) == rows_of(fresh)
    assert (report.num_moved, report.num_from_margins, report.num_without_vectors) == (12, 0, 0)
    after = Catalog.open(job.catalog).images()
    assert set(after["policy_version"].drop_null().to_pylist()) == {"2"}
    untouched = [
        name for name in before.column_names if name not in {*MODERATION, "previous_policy", "run_id", "updated_at"}
    ]
    by_id = [("image_id", "ascending")]
    assert after.sort_by(by_id).select(untouched).equals(before.sort_by(by_id).select(untouched))
    again = remoderate(job.model_copy(update={"policy": other}))
    assert (again.num_moved, again.num_commits) == (0, 0)


def test_dry_runs_of_several_partitions_encode_the_prompts_once(
    job_of_two_days: Job, write_policy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the dry backfill does, which archives nothing: it loaded the model at each partition."""
    encode, encoded = module.encode_policy, []

    def counted(setup: TaskSetup) -> PromptVectors | None:
        encoded.append(setup.policy)
        return encode(setup)

    monkeypatch.setattr(module, "encode_policy", counted)
    other = write_policy("other", version='"2"', prompt="a red car and a tree")
    job, steps = job_of_two_days.model_copy(update={"policy": other}), InProcess()
    for date, num_images in ((OLD_DATE, 4), (NEW_DATE, 2)):
        report = steps.remoderate(job, Scope(date, date), None, dry_run=True, progress=SilentProgress())
        assert report.num_moved == num_images
    assert len(encoded) == 1


def test_dry_runs_of_a_cluster_encode_the_prompts_once_though_they_are_processes_of_their_own(
    job_of_two_days: Job, write_policy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = module.encode_policy, list[object]()

    def counted(setup: TaskSetup) -> PromptVectors | None:
        encoded.append(setup.policy)
        return encode(setup)

    monkeypatch.setattr(module, "encode_policy", counted)
    tree, sea = (
        write_policy(name, version='"2"', prompt=f"a red car and a {name}") for name in ("tree by night", "sea")
    )

    def dry(policy: str) -> dict[str, Any]:
        report = remoderate(job_of_two_days.model_copy(update={"policy": policy}), dry_run=True)
        return report.model_dump(include={"num_moved", "decisions", "flips", "label_flips", "examples"})

    first = dry(tree)
    assert dry(tree) == first
    assert len(encoded) == 1
    dry(sea)
    assert dry(tree) == first, "vectors of another policy decide nothing"
    assert len(encoded) == 3
    monkeypatch.setattr(PromptVectors, "to_bytes", lambda _: b"damaged")
    dry(sea)
    assert dry(sea)["num_moved"] == 6
    assert len(encoded) == 5, "nor do damaged ones"


def test_thresholds_alone_load_no_model_and_come_back(
    job: Job, write_policy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows_of(job, [*MODERATION, "previous_policy"])
    digest = next(iter(before.values()))["policy_digest"]
    strict = write_policy("strict", version='"2"', gun="review: 0.0, block: 0.0")
    monkeypatch.setattr(module, "encode_policy", no_model)
    monkeypatch.setattr(module, "score_file", no_model)
    older = Catalog.open(job.catalog)._images
    older.table.alter.set_table_properties({"vlmflow.schemaVersion": "3"}, raise_if_not_exists=False)
    version = Catalog.open(job.catalog).version

    would = remoderate(job.model_copy(update={"policy": strict}), dry_run=True)
    assert Catalog.open(job.catalog).version == version, "a dry run upgrades nothing"
    assert rows_of(job, [*MODERATION, "previous_policy"]) == before

    runs = Catalog.open(job.catalog).runs
    runs.start("night", {"status": "running", "policy": "test 1 (abc)"})
    runs.start("ours", {"status": "running", "policy": next(iter(would.policies))})
    did = remoderate(job.model_copy(update={"policy": strict}))
    assert Catalog.open(job.catalog)._images.schema_version == SCHEMA_VERSION
    assert did.runs_beside == {"night": "test 1 (abc)"}
    for run_id in ("night", "ours"):
        runs.finish(run_id, {"status": "done"})
    assert did.policies == would.policies == {f"test 2 ({did.policy_digest[:12]})": 9}
    assert did.num_moved == did.num_from_margins == 9
    assert (did.flips, did.label_flips, did.decisions) == (would.flips, would.label_flips, would.decisions)
    assert sum(did.flips.values()) == sum(row["decision"] != "block" for row in before.values())
    assert {row["decision"] for row in rows_of(job).values()} == {"block"}
    assert {row["previous_policy"] for row in rows_of(job, ["previous_policy"]).values()} == {digest}
    assert {example["after"] for example in did.examples} == {"block"}

    # The profile's own policy, which was not set for this model, is not asked.
    back = remoderate(job.model_copy(update={"policy": None}), rollback=did.policy_digest[:12])
    assert (back.num_moved, back.policies) == (9, {f"test 1 ({digest[:12]})": 9})
    assert rows_of(job, ["previous_policy"]) == {name: {"previous_policy": None} for name in before}
    again = remoderate(job.model_copy(update={"policy": None}), rollback=digest)
    assert (again.num_moved, again.num_first, again.policies) == (0, 9, {})
    assert rows_of(job) == {name: {column: row[column] for column in MODERATION} for name, row in before.items()}


def test_only_the_rows_asked_for(job_of_two_days: Job, write_policy: Callable[..., str]) -> None:
    job = job_of_two_days
    new = job.model_copy(update={"policy": write_policy("new", version='"2"', gun="review: 0.3, block: 0.9")})

    assert remoderate(new, scope=Scope(start=NEW_DATE), dry_run=True).partitions == {NEW_DATE.isoformat(): 2}
    assert remoderate(new, scope=Scope(end=OLD_DATE, where="width > height"), dry_run=True).num_moved == 2
    with pytest.raises(ConfigError, match="nothing_such"):
        remoderate(new, scope=Scope(where="nothing_such = 1"))
    with pytest.raises(ConfigError, match=f"from {NEW_DATE} to {OLD_DATE}"):
        remoderate(new, scope=Scope(NEW_DATE, OLD_DATE))
    with pytest.raises(ConfigError, match="more than a condition"):
        remoderate(new, scope=Scope(where="true); DROP TABLE images; SELECT (1"))
    report = remoderate(new, scope=Scope(start=NEW_DATE))
    versions = rows_of(job, ["policy_version", "ingest_date"])
    assert {(row["policy_version"], row["ingest_date"]) for row in versions.values()} == {
        ("1", OLD_DATE),
        ("2", NEW_DATE),
    }
    assert report.num_commits == 1


@pytest.mark.slow
def test_a_nightly_run_in_the_middle_loses_nothing(
    make_job: Callable[..., Job],
    write_policy: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither rows nor the values of a column that the night's manifest is the first to have."""
    paths = write_pictures(tmp_path / "images", 6)
    job = make_job(tmp_path / "images", tasks=("embed", "moderate"))
    enrich(job)
    new = job.model_copy(update={"policy": write_policy("new", version='"2"', gun="review: 0.3, block: 0.9")})
    manifest = tmp_path / "list.jsonl"
    original = Catalog.swap_images
    nights: list[int] = []

    def swap_after_a_night(
        self: Catalog, run_id: str, operation: str, swaps: Sequence[tuple[DataFile, DataFile]]
    ) -> list[DataFile]:
        if not nights:
            listed = [{"uri": str(path), "price": 9.5} for path in write_pictures(tmp_path / "images", 8)]
            manifest.write_text("\n".join(json.dumps(entry) for entry in listed), encoding="utf-8")
            picture(99, 70, 50).save(paths[0], "JPEG")
            nights.append(enrich(make_job(manifest, tasks=("embed", "moderate"))).num_added)
        return original(self, run_id, operation, swaps)

    monkeypatch.setattr(Catalog, "swap_images", swap_after_a_night)
    report = remoderate(new)

    assert nights == [2]
    rows = rows_of(job, ["policy_version", "width", "source"])
    assert len(rows) == 8
    assert [row["source"] for row in rows.values()] == [{"price": 9.5}] * 8
    assert {row["policy_version"] for row in rows.values()} == {"2"}
    assert rows[paths[0].name]["width"] == 70
    assert report.num_moved == 8
    live = set(Catalog.open(job.catalog).live_files("images"))
    ours = {path for path in _files(job, "images") if Path(path).name.startswith(report.run_id)}
    assert ours <= live, "what was written for rows that had moved is deleted"


def test_killed_after_some_partitions_it_goes_on(
    job_of_two_days: Job, write_policy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of_two_days
    new = job.model_copy(update={"policy": write_policy("new", version='"2"', gun="review: 0.3, block: 0.9")})
    original = Catalog.swap_images
    commits: list[str] = []
    monkeypatch.setattr(module, "_COMMIT_FILES", 1)

    def killed(self: Catalog, *arguments: Any) -> list[DataFile]:
        if len(commits) == 1:
            raise CancelledError  # as Prefect ends a flow run; Ctrl-C is another that is no Exception
        commits.append("")
        return original(self, *arguments)

    monkeypatch.setattr(Catalog, "swap_images", killed)
    with pytest.raises(CancelledError):
        remoderate(new)
    monkeypatch.undo()
    done = [row["policy_version"] for row in rows_of(job, ["policy_version"]).values()]
    assert sorted(done) == ["1"] * 2 + ["2"] * 4
    assert Catalog.open(job.catalog).runs.list()[0].record["status"] == "interrupted"
    assert remoderate(new).num_moved == 2
    assert {row["policy_version"] for row in rows_of(job, ["policy_version"]).values()} == {"2"}


def test_it_fails_closed(job: Job, write_policy: Callable[..., str]) -> None:
    paths = sorted(Path(job.source.uri).iterdir())
    paths[0].write_bytes(b"no image any more")
    enrich(job)
    lenient = write_policy("lenient", version='"2"', gun="review: 1.0, block: null", prompt="a tree of trees")
    _drop_vectors(Catalog.open(job.catalog), rows_of(job, ["image_id"])[paths[1].name]["image_id"])

    report = remoderate(job.model_copy(update={"policy": lenient}))

    rows = rows_of(job, [*MODERATION, "moderate_fingerprint"])
    unreadable = rows[paths[0].name]
    assert (unreadable["decision"], unreadable["decision_reason"]) == ("review", "unreadable")
    assert unreadable["moderate_fingerprint"] is None
    lost = rows[paths[1].name]
    assert (lost["decision"], lost["decision_reason"], lost["labels"]) == ("review", "unscored", None)
    assert report.num_without_vectors == 1
    assert all(rows[path.name]["labels"] for path in paths[2:])


def test_rows_of_another_model_keep_their_policy(job: Job, write_policy: Callable[..., str]) -> None:
    other_views = job.model_copy(update={"views": ("squash",), "policy": write_policy("new", version='"2"')})
    report = remoderate(other_views)
    assert (report.num_moved, report.num_other_model) == (0, 9)
    assert {row["policy_version"] for row in rows_of(job).values()} == {"1"}


def test_the_command_line_shows_the_flips(
    job: Job,
    models: dict[str, dict[str, Any]],
    write_policy: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strict = write_policy("strict", version='"2"', gun="review: 0.0, block: 0.0")
    config = tmp_path / "job.yaml"
    config.write_text(f"models: {{embed: {models['embed']}}}\nprofile: starter\n".replace("'", '"'), encoding="utf-8")
    assert run("remoderate", job.catalog.uri, "--config", str(config), "--policy", strict, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"9 images would come under policy test 2 ({load_policy(strict).digest[:12]})" in " ".join(shown.split())
    assert "-> block" in shown
    run("remoderate", job.catalog.uri, "--config", str(config), "--policy", strict, "--json")
    report = RemoderateReport.model_validate_json(capsys.readouterr().out.splitlines()[-1])
    assert report.num_moved == 9


def _drop_vectors(catalog: Catalog, image_id: str) -> None:
    """Takes an image's vectors out of the files, as a damaged store would."""
    for uri in catalog.file_uris("embeddings"):
        path = uri.removeprefix("file://")
        rows = pa.parquet.read_table(path, partitioning=None)
        pa.parquet.write_table(rows.filter(pc.not_equal(rows["image_id"], image_id)), path)


def _files(job: Job, table: str) -> set[str]:
    root = Path(job.catalog.uri) / table
    return {path.relative_to(root).as_posix() for path in root.rglob("*.parquet")}

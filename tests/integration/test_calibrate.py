"""`vlmflow calibrate` as a user meets it: a catalog with stored vectors, verdicts, a new policy. No Ray, no image."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

import vlmflow
from tests.catalog_samples import constants, finish, image_id, open_catalog, references, request
from tests.pictures import write_pictures
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import Job
from vlmflow.errors import CalibrationError, PolicyError
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.fit import logistic
from vlmflow.moderation.policy import find_binding, load_policy
from vlmflow.moderation.scoring import Scorer
from vlmflow.tasks.setup import TaskSetup, prepare_prompts, prepare_tasks

NUM = 300
TASKS = ("embed", "moderate")


@dataclass(frozen=True)
class Scene:
    """A catalog, the margins of its images' worst views, verdicts on them."""

    job: Job
    job_file: Path
    setup: TaskSetup
    margins: NDArray[np.float32]  # (NUM, 2)
    verdicts: Path


def fill(job: Job, setup: TaskSetup, fingerprint: str) -> NDArray[np.float32]:
    """Writes a catalog of random vectors, two views an image, without a run; returns the worst margins."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(NUM, 2, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    names = [f"{number:04}" for number in range(NUM)]
    asked = request(TASKS, fingerprints={"embed": fingerprint, "moderate": "m"})
    catalog = open_catalog(job.catalog.uri)
    with catalog.plan([references(names)], asked) as plan:
        writer = catalog.writer(constants("run", asked), plan.version)
        written = []
        for planned in plan.batches():
            rows = finish(planned)
            places = [names.index(uri.removeprefix("mem://")) for uri in rows["uri"].to_pylist()]
            column = pa.array(vectors[places].tolist(), rows.schema.field("vectors").type)
            written.append(writer.write(rows.set_column(rows.column_names.index("vectors"), "vectors", column)))
        catalog.commit("run", pa.concat_tables(written))
    prompts = prepare_prompts(setup)
    assert prompts is not None
    margins: NDArray[np.float32] = Scorer(prompts).score(vectors.reshape(-1, 24)).reshape(NUM, 2, 2).max(axis=1)
    return margins


@pytest.fixture
def scene(make_job: Callable[..., Job], tmp_path: Path) -> Scene:
    job = make_job("mem://", tasks=TASKS, pools=[])
    setup = prepare_tasks(job)
    margins = fill(job, setup, setup.fingerprints(("embed",))["embed"])
    center = np.median(margins, axis=0)
    holds = np.random.default_rng(2).random((NUM, 2)) < logistic(12 * (margins.astype(np.float64) - center))
    rows = [
        {"image_id": image_id(f"{number:04}"), "label": label, "value": bool(holds[number, column])}
        for number in range(NUM)
        for column, label in enumerate(("gun", "bottle"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "verdicts.parquet")
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump({"profile": "starter", "models": job.model_dump(mode="json")["models"]}))
    return Scene(job, job_file, setup, margins, tmp_path / "verdicts.parquet")


def command(scene: Scene, *more: str | Path) -> list[str | Path]:
    given: list[str | Path] = [
        "calibrate",
        scene.job.catalog.uri,
        "--config",
        scene.job_file,
        "--labels",
        scene.verdicts,
    ]
    return [*given, "--policy", scene.job.policy or "", *more]


def test_a_calibration_writes_a_policy_that_decides_as_its_report_says(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, output = tmp_path / "report.html", tmp_path / "new.yaml"
    version = Catalog.open(scene.job.catalog).version
    code = run(*command(scene, "-o", output, "--report", page, "--precision", "0.9", "--recall", "gun=0.8", "--json"))
    assert code == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [label["target_recall"] for label in report["labels"]] == [0.8, 0.9]
    assert report["num_verdicts"] == 2 * NUM
    assert page.read_text().startswith("<!doctype html>")
    assert Catalog.open(scene.job.catalog).version == version

    policy = load_policy(str(output))
    binding = find_binding(policy, scene.setup.identities["embed"])
    assert binding is not None
    assert (policy.version, set(binding.calibration)) == ("2", {"gun", "bottle"})
    decisions = Moderator(policy, binding, None).decide_labels(scene.margins)
    for number, label in enumerate(report["labels"]):
        assert label["after"]["review"]["num_flagged"] == (decisions[:, number] >= 1).sum()
        assert label["after"]["block"]["num_flagged"] == (decisions[:, number] == 2).sum()
        assert 8 < label["fit"]["scale"]["value"] < 18  # of the curve that the verdicts were drawn from: 12


def test_the_next_version_lies_beside_the_old_one_and_is_not_overwritten(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("# what we agreed on\n" + Path(scene.job.policy or "").read_text())
    job = scene.job.model_copy(update={"policy": str(mine)})
    report = vlmflow.calibrate(job, scene.verdicts)
    assert report.output == str(tmp_path / "test-v2.yaml")
    assert (tmp_path / "test-v2.yaml").read_text().startswith("# what we agreed on\n")
    with monkeypatch.context() as patched:
        patched.setattr("vlmflow.calibration.read_verdicts", None)  # it is known before anything is read
        with pytest.raises(PolicyError, match=r"test-v2\.yaml: is there already"):
            vlmflow.calibrate(job, scene.verdicts)
        for _ in range(2):
            with pytest.raises(PolicyError, match=r"policy .*/stricter: neither \.yaml nor \.yml"):
                vlmflow.calibrate(job, str(scene.verdicts), output=str(tmp_path / "stricter"))
    job = job.model_copy(update={"policy": report.output})
    assert vlmflow.calibrate(job, scene.verdicts).output == str(tmp_path / "test-v3.yaml")


def test_a_csv_by_uri_gives_the_same_policy(scene: Scene, tmp_path: Path) -> None:
    names = {image_id(f"{number:04}"): f"mem://{number:04}" for number in range(NUM)}
    rows = pq.read_table(scene.verdicts).to_pylist()
    lines = ["uri,label,value", *(f"{names[row['image_id']]},{row['label']},{int(row['value'])}" for row in rows)]
    (tmp_path / "verdicts.csv").write_text("\n".join(lines))
    one = vlmflow.calibrate(scene.job, scene.verdicts, output=tmp_path / "one.yaml")
    other = vlmflow.calibrate(scene.job, tmp_path / "verdicts.csv", output=tmp_path / "other.yaml")
    assert one.new_policy == other.new_policy


def test_embeddings_of_another_model_are_refused_by_name(scene: Scene, tmp_path: Path) -> None:
    job = scene.job.model_copy(update={"views": ("squash",)})
    with pytest.raises(CalibrationError, match="did not make the embeddings of the catalog") as caught:
        vlmflow.calibrate(job, scene.verdicts, output=tmp_path / "new.yaml")
    ours, theirs = (prepare_tasks(one).fingerprints(("embed",))["embed"] for one in (job, scene.job))
    assert ours in str(caught.value)
    assert theirs in str(caught.value)
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_under_a_calibrated_policy_stored_margins_decide_as_a_fresh_run_does_to_the_bit(
    make_job: Callable[..., Job], policy: str, tmp_path: Path
) -> None:
    from vlmflow.engine import enrich
    from vlmflow.engine.remoderate import remoderate

    write_pictures(tmp_path / "images", 60)
    job = make_job(tmp_path / "images", tasks=TASKS, pools=[])
    enrich(job)
    rows = Catalog.open(job.catalog).images(["image_id", "labels"]).to_pylist()
    verdicts = []
    for label in (0, 1):
        ordered = sorted(rows, key=lambda row: row["labels"][label]["margin"])
        verdicts += [
            {
                "image_id": row["image_id"],
                "label": row["labels"][label]["label"],
                "value": number % 30 > 14 - number // 5,
            }
            for number, row in enumerate(ordered)
        ]
    pq.write_table(pa.Table.from_pylist(verdicts), tmp_path / "verdicts.parquet")
    report = vlmflow.calibrate(job, tmp_path / "verdicts.parquet", output=tmp_path / "new.yaml")
    assert [label.refused for label in report.labels] == [None, None]

    changed = remoderate(job.model_copy(update={"policy": report.output}))
    fresh = make_job(
        tmp_path / "images", tasks=TASKS, pools=[], policy=report.output, catalog={"uri": str(tmp_path / "fresh")}
    )
    enrich(fresh)
    columns = ["uri", "labels", "decision", "decision_reason", "policy_digest"]
    one, other = (Catalog.open(each.catalog).images(columns).sort_by("uri") for each in (job, fresh))
    assert one.equals(other)
    assert changed.num_from_margins == 60
    assert {label["probability"] is None for row in one["labels"].to_pylist() for label in row} == {False}
    counts = [sum(row[label]["decision"] != "allow" for row in one["labels"].to_pylist()) for label in (0, 1)]
    assert counts == [label.after["review"].num_flagged for label in report.labels]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--precision", "high"], ["--precision high", "no number"]),
        (["--recall", "1.5"], ["--recall 1.5"]),
        (["--recall", "rifle=0.5"], ["rifle"]),
        (["--report", "report.pdf"], ["report.pdf"]),
        (["--report", "absent/report.html"], ["absent"]),
        (["--report", "{tmp}/folder.html"], ["folder.html", "is a folder"]),
        (["--report", "s3://bucket/report.html"], ["s3://bucket/report.html", "only a path of this machine"]),
        (["--labels", "absent.parquet"], ["absent.parquet"]),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    scene: Scene, more: list[str], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    more = [word.format(tmp=tmp_path) for word in more]
    assert run(*command(scene, "-o", tmp_path / "new.yaml", *more)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
    assert not (tmp_path / "new.yaml").exists()

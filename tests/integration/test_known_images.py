"""Lists of known images: blocked by bytes or by their look, allowed by bytes alone, whatever the models say."""

from __future__ import annotations

import datetime as dt
import hashlib
import shutil
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from tests.catalog_samples import config_of, open_catalog, rows_of
from tests.pictures import write_broken, write_pictures
from vlmflow.catalog import Catalog
from vlmflow.catalog.reviews import EVENT
from vlmflow.cli import main
from vlmflow.config import ImageLimits, Job
from vlmflow.engine import enrich
from vlmflow.engine.progress import SilentProgress
from vlmflow.engine.remoderate import remoderate
from vlmflow.errors import ImageError, KnownImagesError
from vlmflow.imaging import decode
from vlmflow.known import add_list, read_hashes, remove_list
from vlmflow.review import import_verdicts
from vlmflow.sources import normalise_uri
from vlmflow.sources.uris import ids_of_normalised

pytestmark = pytest.mark.usefixtures("ray_session")

DEMO = Path(str(resources.files("vlmflow"))) / "starter" / "demo"


@pytest.fixture
def job(make_job: Callable[..., Job], tmp_path: Path) -> Job:
    write_pictures(tmp_path / "images", 6)
    write_broken(tmp_path / "images")
    shutil.copy(DEMO / "sku-0002.webp", tmp_path / "images" / "scene.webp")
    made = make_job(tmp_path / "images", tasks=("embed", "moderate"))
    enrich(made)
    return made


def photo(image: Image.Image, quality: int, name: Path) -> None:
    image.convert("RGB").save(name, "JPEG", quality=quality)


def test_lists_decide_on_old_rows_and_new_ones_before_models_and_after_people(job: Job, tmp_path: Path) -> None:
    before = rows_of(job)
    names = sorted(name for name, row in before.items() if row["status"] == "ok" and name != "scene.webp")
    blocked, allowed, judged = names[:3]
    scene = before["scene.webp"]

    report = add_list(job.catalog, "banned", "block", [before[blocked]["content_hash"], before[judged]["content_hash"]])
    assert report.num_changed == 2
    # Copies that look alike: smaller, of another format, and with a mark on them.
    image = Image.open(DEMO / "sku-0002.webp")
    photo(image.resize((image.width // 2, image.height // 2)), 60, tmp_path / "images" / "smaller.jpg")
    marked = image.convert("RGB")
    ImageDraw.Draw(marked).text((5, 5), "(c) shop", fill="black")
    marked.save(tmp_path / "images" / "marked.png")
    looks = add_list(job.catalog, "looks", "block", [], [scene["phash"]], max_distance=6)
    assert looks.num_changed == 1
    add_list(job.catalog, "fine", "allow", [before[allowed]["content_hash"]])
    (tmp_path / "v.csv").write_text(f"image_id,verdict,reviewer\n{before[judged]['image_id']},review,ada\n")
    import_verdicts(job.catalog, tmp_path / "v.csv")
    enrich(job)

    rows = rows_of(job)

    def check(rows: dict[str, dict[str, Any]]) -> None:
        said = {
            name: (row["decision"], row["decision_reason"], row["verdict"]["reviewer"])
            for name, row in rows.items()
            if row["verdict"] is not None
        }
        assert said == {
            blocked: ("block", "verdict", "list:banned"),
            allowed: ("allow", "verdict", "list:fine"),
            judged: ("review", "verdict", "ada"),
            "scene.webp": ("block", "verdict", "list:looks"),
            "smaller.jpg": ("block", "verdict", "list:looks"),
            "marked.png": ("block", "verdict", "list:looks"),
        }

    check(rows)
    assert rows[blocked]["verdict"]["reason"] == "equal bytes"
    assert "of 64 bits differ" in rows["smaller.jpg"]["verdict"]["reason"]
    # Another policy, and another run over everything: as before.
    remoderate(job.model_copy(update={"policy": _other(job, tmp_path)}))
    check(rows_of(job))
    enrich(job.model_copy(update={"views": ("squash",), "accept_unbound": True}))
    check(rows_of(job))
    # An allow list takes back what the look alone blocks, and never what the bytes do.
    add_list(job.catalog, "fine", "allow", [rows["marked.png"]["content_hash"], rows[blocked]["content_hash"]])
    now = rows_of(job)
    assert (now["marked.png"]["decision"], now[blocked]["decision"]) == ("allow", "block")
    assert now[allowed]["verdict"] is None, "it is on no list any more"

    for name in ("banned", "fine", "looks"):
        remove_list(job.catalog, name)
    assert {name for name, row in rows_of(job).items() if row["verdict"]} == {judged}


def _other(job: Job, tmp_path: Path) -> str:
    path = tmp_path / "other.yaml"
    path.write_text(Path(str(job.policy)).read_text().replace("review: 0.45", "review: 0.4").replace('"1"', '"2"'))
    return str(path)


def test_a_known_image_is_blocked_though_its_model_failed(
    make_job: Callable[..., Job], models: dict[str, Any], tmp_path: Path
) -> None:
    (path, *_) = write_pictures(tmp_path / "images", 3)
    job = make_job(tmp_path / "images", tasks=("embed",))
    enrich(job)
    add_list(job.catalog, "banned", "block", *read_hashes(path, with_look=False))
    assert rows_of(job)[path.name]["decision"] == "block"
    fresh = make_job(tmp_path / "images", tasks=("embed",), retry=("partial",), max_caption_tokens=9)
    assert enrich(fresh).status == "nothing_due"
    others = [row["decision"] for name, row in rows_of(job).items() if name != path.name]
    assert others == ["review", "review"]


@pytest.mark.slow
def test_a_clip_that_is_blocked_by_its_look_stays_so_whatever_the_later_runs_look_at(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    with Image.open(DEMO / "sku-0002.webp") as image:
        frames = [Image.new("RGB", (160, 160), (10 + 6 * n, 0, 0)) for n in range(12)]
        frames.append(image.convert("RGB").resize((160, 160)))
    for name in ("bare", "moderated", "copied"):
        (tmp_path / name).mkdir()
        frames[0].save(tmp_path / name / f"{name}.gif", save_all=True, append_images=frames[1:])

    def run(name: str, *tasks: str) -> Job:
        pools = [{"tasks": tasks, "cpus": 0.5, "batch_size": 16}]
        date = dt.date(2026, 11, 21 if name == "bare" else 20)  # of equal rows the newest is copied
        job = make_job(tmp_path / name, tasks=tasks, pools=pools, date=date)
        assert enrich(job).status == "done"
        return job

    def decisions() -> dict[str, str]:
        return {name: row["decision"] for name, row in rows_of(job).items()}

    run("bare", "caption")  # which is shown the first frame alone, and looks for a hash no further than eight
    job = run("moderated", "embed", "moderate")
    look = rows_of(job)["moderated.gif"]["phash"]
    assert rows_of(job)["bare.gif"]["phash"] is None
    add_list(job.catalog, "looks", "block", [], [look])
    assert decisions() == {"bare.gif": "review", "moderated.gif": "block"}
    run("moderated", "caption")  # copied from the row without a hash
    run("copied", "caption")  # there are two to copy from now
    add_list(job.catalog, "other", "block", ["0" * 64])
    assert rows_of(job)["moderated.gif"]["caption"] is not None
    assert decisions() == {"bare.gif": "review", "moderated.gif": "block", "copied.gif": "block"}


class Meanwhile(SilentProgress):
    """Does something once the workers of a run are at work."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def stage(self, text: str) -> None:
        if text == "enriching":
            self._act()


def test_what_lists_and_people_say_during_a_run_or_before_it_stands_in_its_rows(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    listed, judged, other = write_pictures(tmp_path / "images", 3)
    job = make_job(tmp_path / "images", tasks=("embed",))
    event = {
        "image_id": ids_of_normalised([normalise_uri(str(judged))], None)[0],
        "content_hash": hashlib.sha256(judged.read_bytes()).hexdigest(),
        "decision": "block",
        "reviewer": "ada",
        "at": dt.datetime(2026, 11, 20, tzinfo=dt.UTC),
    }
    reviews = Catalog.open_or_create(job.catalog, pa.schema([])).reviews
    reviews.add(pa.Table.from_pylist([event], schema=EVENT))

    def add() -> None:
        add_list(job.catalog, "banned", "block", [hashlib.sha256(listed.read_bytes()).hexdigest()])

    enrich(job, progress=Meanwhile(add))

    decisions = {name: row["decision"] for name, row in rows_of(job).items()}
    assert decisions == {listed.name: "block", judged.name: "block", other.name: "review"}


def test_our_hash_is_that_of_imagehash_within_a_few_bits() -> None:
    distances = []
    for path in sorted(DEMO.iterdir()):
        try:
            found = decode(path.read_bytes(), (), ImageLimits()).facts.phash
        except ImageError:
            continue
        with Image.open(path) as image:
            shown = image.convert("RGBA")
            ground = Image.new("RGB", shown.size, "white")
            ground.paste(shown, mask=shown)
        assert found is not None
        distances.append(imagehash.hex_to_hash(found) - imagehash.phash(ground))
    assert len(distances) > 150
    assert float(np.quantile(distances, 0.95)) <= 4


def test_different_drawings_are_far_apart() -> None:
    hashes = {}
    for path in sorted(DEMO.glob("sku-00*")):
        try:
            found = decode(path.read_bytes(), (), ImageLimits()).facts
        except ImageError:
            continue
        hashes[found.content_hash] = int(str(found.phash), 16)
    values = np.array(list(hashes.values()), np.uint64)
    distances = np.bitwise_count(values[:, None] ^ values[None, :])[np.triu_indices(len(values), 1)]
    assert (distances <= 4).mean() < 0.001


def test_what_cannot_be_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path / "catalog")
    open_catalog(tmp_path / "catalog")
    sha, look = "a" * 64, "b" * 16
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "Bad Name", "kind": "block", "hashes": [sha]}, "list 'Bad Name'"),
        ({"name": "x", "kind": "allow", "hashes": [], "phashes": [look]}, "would allow images"),
        ({"name": "x", "kind": "block", "hashes": [], "phashes": [look], "max_distance": 20}, "distance 20"),
        ({"name": "x", "kind": "block", "hashes": []}, "is empty"),
        ({"name": "x", "kind": "block", "hashes": [], "phashes": [f"{0:016x}"]}, "the perceptual hash of plain images"),
    ]
    for arguments, message in wrong:
        with pytest.raises(KnownImagesError, match=message):
            add_list(config, **arguments)
    with pytest.raises(KnownImagesError, match="'x' is not in the catalog"):
        remove_list(config, "x")
    path = tmp_path / "list.txt"
    path.write_text(f"# banned\n{sha}  a\u2028b.jpg\r\n\n{look.upper()};why\n{sha}\n")
    assert read_hashes(path, with_look=True) == ([sha], [look])
    path.write_text("not a hash\n")
    with pytest.raises(KnownImagesError, match="line 1: 'not' is no hash"):
        read_hashes(path, with_look=True)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(KnownImagesError, match="not that of an image"):
        read_hashes(tmp_path / "broken.jpg", with_look=True)

    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    (tmp_path / "one.png").write_bytes(file.getvalue())
    for command in (["add", config.uri, str(tmp_path / "one.png"), "--block"], ["list", config.uri]):
        with pytest.raises(SystemExit) as ended:
            main(["known", *command])
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "list one: 1 hashes of bytes, 0 perceptual ones" in shown
    assert "the image is plain" in shown
    assert add_list(config, "plain", "block", [sha], [look, f"{1 << 63:016x}"]).num_without_look == 1
    assert "block" in shown

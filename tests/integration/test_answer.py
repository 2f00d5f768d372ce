"""Questions through a whole run: the starter's answers, and an endpoint that misbehaves."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.endpoint import KEY, KEY_VARIABLE, Asked, Reply, completion, endpoint
from vlmflow.catalog import Catalog
from vlmflow.cli import main
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine import enrich, plan
from vlmflow.errors import ConfigError, QuestionError

DEMO = Path(str(resources.files("vlmflow"))) / "starter" / "demo"
COLOUR, WHAT = "what color is the background?", "what is in the picture?"
pytestmark = pytest.mark.usefixtures("ray_session")


def rows_of(uri: object) -> dict[str, dict[str, Any]]:
    rows = Catalog.open(CatalogConfig(uri=str(uri))).images().to_pylist()
    return {Path(row["uri"]).name: row for row in rows}


def run(*arguments: str) -> None:
    """Runs the command line, which always ends by exiting."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def test_the_starter_answers_about_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"uri": str(DEMO / "sku-0002.webp"), "ask": ["is there a sneaker?", COLOUR], "ocr": "50% OFF"},
        {"uri": str(DEMO / "sku-0001.avif"), "ask": None, "ocr": None},
        {"uri": str(DEMO / "truncated.jpg"), "ask": None, "ocr": None},
        {"uri": str(DEMO / "sku-0004.png"), "ask": ["word " * 60], "ocr": None},
    ]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = tmp_path / "job.yaml"
    config.write_text("source: {found_text_column: ocr}\n", encoding="utf-8")
    catalog = tmp_path / "catalog"
    command = ["enrich", str(manifest), str(catalog), "--profile", "starter", "--tasks", "caption,answer"]
    command += ["--question", COLOUR, "--questions-column", "ask", "--config", str(config)]
    run(*command, "--json")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["statuses"] == {"ok": 2, "unreadable": 1, "partial": 1}
    assert report["errors"] == {"truncated": 1, "task_failed": 1}

    rows = rows_of(catalog)
    assert [answer["question"] for answer in rows["sku-0002.webp"]["answers"]] == [COLOUR, "is there a sneaker?"]
    assert [answer["answer"] for answer in rows["sku-0002.webp"]["answers"]] == ["green", "yes"]
    assert [answer["answer"] for answer in rows["sku-0001.avif"]["answers"]] == ["purple"]
    assert all(0.5 < answer["score"] <= 1 for answer in rows["sku-0001.avif"]["answers"])
    assert rows["sku-0001.avif"]["answer_model"] == "vlmflow/starter-vqa@local"
    assert rows["sku-0002.webp"]["alt_text"].endswith('. Text in the image: "50% OFF".')
    assert rows["sku-0001.avif"]["alt_text"][0].isupper()
    assert rows["truncated.jpg"]["answers"] is None
    (error,) = rows["sku-0004.png"]["errors"]
    assert (error["stage"], rows["sku-0004.png"]["answers"]) == ("answer", None)
    assert "242 tokens, the model takes 40" in error["message"]
    assert isinstance(rows["sku-0004.png"]["caption"], str)

    run("show", str(catalog))
    shown = " ".join(capsys.readouterr().out.split())
    assert "answer: vlmflow/starter-vqa@local" in shown
    run("plan", *command[1:], "--json")
    due = json.loads(capsys.readouterr().out)["due"]
    assert due["answer"] == {"retry": 1}
    run("plan", *command[1:], "--question", WHAT, "--json")
    assert json.loads(capsys.readouterr().out)["due"]["answer"] == {"questions_changed": 2, "retry": 1}


@pytest.mark.slow
def test_a_question_that_is_too_long_for_the_model_ends_the_run_before_any_row(tmp_path: Path) -> None:
    job = Job.model_validate(
        {
            "source": {"uri": str(DEMO)},
            "catalog": {"uri": str(tmp_path / "catalog")},
            "profile": "starter",
            "tasks": ["answer"],
            "questions": ["word " * 60],
            "limit": 3,
        }
    )
    with pytest.raises(QuestionError, match="242 tokens, the model takes 40"):
        enrich(job)
    assert not Catalog.exists(job.catalog)


def write_flat(folder: Path, num_images: int) -> None:
    """Image i is of the red 16 * i, so that an endpoint can tell which it is shown."""
    folder.mkdir()
    for index in range(num_images):
        Image.new("RGB", (64, 64), (16 * index, 0, 0)).save(folder / f"{index:02d}.png")


Models = dict[str, dict[str, Any]]


def remote_job(light: Models, folder: Path, url: str, **changes: Any) -> Job:
    """Captions from an endpoint, embeddings by the light model of conftest."""
    settings = {"url": url, "model": "tiny-vlm", "api_key_env": KEY_VARIABLE, "max_retries": 1, "timeout_s": 6}
    settings |= {"input_price": 1.0, "output_price": 10.0, "max_side_px": 64}
    return Job.model_validate(
        {
            "source": {"uri": str(folder / "images")},
            "catalog": {"uri": str(folder / "catalog")},
            "profile": "starter",
            "tasks": ["embed", "caption"],
            "models": {
                "embed": light["embed"],
                "caption": {"family": "endpoint", "endpoint": settings, "prompt": "Say what."},
            },
            "pools": [{"tasks": ["embed", "caption"], "cpus": 0.5, "batch_size": 16}],
            **changes,
        }
    )


BAD = {
    1: (Reply(status=429), "endpoint_busy"),
    3: (Reply(status=500), "endpoint_failed"),
    4: (Reply(body=b"{nonsense"), "bad_answer"),
    6: (completion(""), "bad_answer"),
    8: (Reply(body=None), "endpoint_timeout"),
    9: (Reply(status=400), "endpoint_refused"),
}


def test_an_endpoint_that_misbehaves_costs_each_image_its_own_row(models: Models, tmp_path: Path) -> None:
    write_flat(tmp_path / "images", 12)

    def answer(asked: Asked) -> Reply:
        number = asked.colour[0] // 16
        return BAD[number][0] if number in BAD else completion(f"a red square of shade {number}")

    with endpoint(answer) as server:
        job = remote_job(models, tmp_path, server.url)
        report = enrich(job)
        numbers = Counter(asked.colour[0] // 16 for asked in server.asked)
        assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    rows = rows_of(job.catalog.uri)
    assert len(rows) == 12
    for number in range(12):
        row = rows[f"{number:02d}.png"]
        assert row["embed_fingerprint"] is not None, "the other task's results stay"
        if number in BAD:
            assert (row["status"], row["caption"], row["alt_text"]) == ("partial", None, None)
            assert [(error["stage"], error["class"]) for error in row["errors"]] == [("caption", BAD[number][1])]
        else:
            assert (row["status"], row["caption"]) == ("ok", f"a red square of shade {number}")
            assert row["caption_model"] == f"tiny-vlm@{server.url.removeprefix('http://').removesuffix('/v1')}"
    # 429, 500 and silence are tried once more; nothing else is asked twice.
    assert numbers == Counter({number: 2 if number in (1, 3, 8) else 1 for number in range(12)})
    usage = report.usage["caption"]
    assert (usage.input_tokens, usage.output_tokens) == (700, 49)
    assert usage.requests >= 15, "on a busy machine one may be given up before the server has it"
    assert usage.cost == pytest.approx((700 * 1 + 49 * 10) / 1e6)
    assert report.prompts == {"caption": "Say what."}
    written = [path for path in (tmp_path / "catalog").rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in report.model_dump_json()

    assert plan(job).due["caption"] == {"retry": 6}
    # The address stands in the identity: elsewhere it is another model, and all are due.
    elsewhere = remote_job(models, tmp_path, "http://elsewhere/v1")
    assert plan(elsewhere).due["caption"] == {"fingerprint": 6, "retry": 6}


@pytest.mark.slow
def test_a_dead_endpoint_leaves_a_row_for_every_image(models: Models, tmp_path: Path) -> None:
    write_flat(tmp_path / "images", 12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = remote_job(models, tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    report = enrich(job)
    assert report.statuses == {"partial": 12}
    assert report.errors == {"endpoint_unreachable": 12}
    assert plan(job).due["caption"] == {"retry": 12}


def test_a_missing_key_ends_the_run_before_any_row(models: Models, tmp_path: Path) -> None:
    write_flat(tmp_path / "images", 1)
    assert "NO_SUCH_KEY" not in os.environ
    settings = {"url": "http://a/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    without_key = {"embed": models["embed"], "caption": {"family": "endpoint", "endpoint": settings}}
    job = remote_job(models, tmp_path, "http://a/v1", models=without_key)
    with pytest.raises(ConfigError, match="environment variable NO_SUCH_KEY is not set"):
        enrich(job)
    assert not Catalog.exists(job.catalog)

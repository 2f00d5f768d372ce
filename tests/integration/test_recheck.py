"""Images behind http urls that become others: a job that rechecks finds them, and one that does not says so."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import picture
from tests.site import PRIVATE_ALLOWED, serving
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import Job
from vlmflow.engine import enrich, plan
from vlmflow.known import add_list

POOLS = [{"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 16}]


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    picture(seed).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.slow
def test_a_picture_that_becomes_a_banned_one(
    make_job: Callable[..., Job], tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(**http: Any) -> Job:
        options = {"http": PRIVATE_ALLOWED.model_dump() | http}
        return make_job(manifest, source_options=options, tasks=("embed", "moderate"), pools=POOLS)

    def row(name: str = "a") -> dict[str, Any]:
        return {row["uri"].rsplit("/", 1)[-1]: row for row in Catalog.open(job().catalog).images().to_pylist()}[name]

    good, banned = jpeg(1), jpeg(2)
    manifest = tmp_path / "list.csv"
    with serving() as site:
        site.kept |= {"a": good, "b": jpeg(3)}
        manifest.write_text(f"uri\n{site.url}/kept/a\n{site.url}/kept/b\n")
        assert enrich(job()).num_unwatched == 2
        add_list(job().catalog, "banned", "block", [hashlib.sha256(banned).hexdigest()])
        first, other = row(), row("b")
        site.headers.clear()
        site.kept["a"] = banned

        planned = plan(job())
        assert (planned.num_due, planned.num_unwatched) == (0, 2)
        job_file = tmp_path / "job.yaml"
        job_file.write_text(job().model_dump_json(exclude_defaults=True))
        run("plan", "--config", str(job_file))
        assert "recheck_days" in capsys.readouterr().out
        assert enrich(job(recheck_days=30)).status == "nothing_due"
        assert row() == first

        report = enrich(job(recheck_days=0))
        assert (report.num_replaced, report.num_unwatched) == (2, 0)
        assert report.due["embed"] == {"recheck": 2}
        known = {first["http_validator"], other["http_validator"]}
        assert {headers["If-None-Match"] for headers in site.headers} == known
        assert (report.num_unmodified, report.bytes_read) == (1, len(banned))
        same = row("b")
        assert {name for name in same if same[name] != other[name]} == {"run_id", "read_at", "updated_at"}
        assert same["read_at"] > other["read_at"]
        changed = row()
        assert (changed["content_hash"], changed["decision"]) == (hashlib.sha256(banned).hexdigest(), "block")
        assert changed["seen_version"] != first["seen_version"]

        # A version of the manifest's own is the one that counts, whatever the server says.
        manifest.write_text(f"uri,etag\n{site.url}/kept/a,1\n{site.url}/kept/b,1\n")
        assert enrich(job()).num_replaced == 2
        assert plan(job()).num_due == 0
        manifest.write_text(f"uri,etag\n{site.url}/kept/a,2\n{site.url}/kept/b,1\n")
        assert (planned := plan(job())).due["embed"] == {"changed": 1}
        assert planned.num_unwatched == 0

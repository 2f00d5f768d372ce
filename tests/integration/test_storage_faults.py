"""Stores that fail: what passes is tried again, what does not ends the run in one clear line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faulty_proxy import FAULTS, STALL_S, FaultyProxy, running_proxy
from tests.pictures import write_pictures
from tests.processes import started, wait_for
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, load_job
from vlmflow.engine import enrich

# For what does not fail, or runs after a failed run; what fails is a process as a user starts it.
pytestmark = pytest.mark.usefixtures("ray_session")

NUM_IMAGES = 96


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    paths = write_pictures(tmp_path_factory.mktemp("images"), NUM_IMAGES)
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def buckets(s3_server: S3Server, pictures: dict[str, bytes]) -> tuple[str, str]:
    """One with images, and one for the catalog."""
    images, catalog = s3_server.make_bucket(), s3_server.make_bucket()
    for name, data in pictures.items():
        s3_server.put(images, f"images/{name}", data)
    return images, catalog


@pytest.fixture
def job_file(models: dict[str, dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    def write(proxy: FaultyProxy, buckets: tuple[str, str], *, timeout_s: float = 5.0, **options: Any) -> Path:
        storage = {"endpoint": proxy.endpoint, "region": "us-east-1", "timeout_s": timeout_s}
        images, catalog = buckets
        job = {
            "source": {"uri": f"s3://{images}/images/", "storage": storage},
            "catalog": {"uri": f"s3://{catalog}/catalog", "storage": storage},
            "models": models,
            "profile": "starter",
            "tasks": ["embed"],
            "commit": {"max_rows": 16},
            "pools": [{"tasks": ["embed"], "cpus": 0.5, "batch_size": 8}],
            **options,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        return path

    return write


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with running_proxy(s3_server.endpoint, 0.0) as running:
        yield running


def direct(s3_server: S3Server, buckets: tuple[str, str]) -> CatalogConfig:
    return CatalogConfig(uri=f"s3://{buckets[1]}/catalog", storage=s3_server.storage)


def running(config: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "vlmflow", "enrich", "--config", str(config), "--json"]
    return started(command, config.with_suffix(".out"), config.with_suffix(".errors"))


def finish(run: subprocess.Popen[bytes], config: Path) -> tuple[int, dict[str, Any], str]:
    """Waits for its end; exit code, the last line as JSON, standard error."""
    code = run.wait(600)
    lines = config.with_suffix(".out").read_text().splitlines()
    return code, json.loads(lines[-1]) if lines else {}, config.with_suffix(".errors").read_text()


def check_rows(config: CatalogConfig, pictures: dict[str, bytes]) -> None:
    catalog = Catalog.open(config)
    rows = {row["uri"].rsplit("/", 1)[-1]: row for row in catalog.images().to_pylist()}
    assert rows.keys() == pictures.keys()
    assert catalog.images(["image_id"]).num_rows == len(pictures)
    for name, row in rows.items():
        assert row["status"] == "ok", (name, row["errors"])
        assert row["content_hash"] == hashlib.sha256(pictures[name]).hexdigest()
    assert {row["image_id"] for row in catalog.embeddings(["image_id"]).to_pylist()} == {
        row["image_id"] for row in rows.values()
    }


@pytest.mark.parametrize(("share", "max_rows"), [(0.2, 48), pytest.param(0.4, 16, marks=pytest.mark.slow)])
def test_faults_that_pass_leave_no_trace(
    s3_server: S3Server,
    buckets: tuple[str, str],
    pictures: dict[str, bytes],
    job_file: Callable[..., Path],
    share: float,
    max_rows: int,
) -> None:
    with running_proxy(s3_server.endpoint, share, seed=1) as proxy:
        config = job_file(proxy, buckets, timeout_s=STALL_S - 1, commit={"max_rows": max_rows})
        report = enrich(load_job(config, {}))
        assert (report.status, report.num_added, report.errors) == ("done", NUM_IMAGES, {})
        assert len(report.commits) >= 2
        faults = proxy.faults()
        assert all(faults[fault] for fault in FAULTS), faults
        assert sum(faults[fault] for fault in FAULTS) > 0.7 * share * faults["requests"]
        check_rows(direct(s3_server, buckets), pictures)
        again = enrich(load_job(config, {}))
        assert (again.status, again.num_unchanged) == ("nothing_due", NUM_IMAGES)


@pytest.mark.parametrize(
    ("which", "how", "said"),
    [
        pytest.param(0, "denied", "refused the credentials", marks=pytest.mark.slow),
        pytest.param(1, "gone", "does not exist", marks=pytest.mark.slow),
        pytest.param(1, "denied", "refused the credentials", marks=pytest.mark.slow),
        pytest.param(0, "gone", "does not exist", marks=pytest.mark.slow),
        pytest.param(0, "expired", "refused the credentials", marks=pytest.mark.slow),
    ],
)
def test_a_store_that_is_lost_in_mid_run_ends_it(
    s3_server: S3Server,
    buckets: tuple[str, str],
    pictures: dict[str, bytes],
    proxy: FaultyProxy,
    job_file: Callable[..., Path],
    which: int,
    how: str,
    said: str,
) -> None:
    # A part of the images is held back, so that the store is lost while the run waits for them. No request may give up
    # before that, and on more CPUs all blocks would be under way at once, none of them whole.
    config = job_file(proxy, buckets, timeout_s=300, ray={"num_cpus": 2})
    catalog = direct(s3_server, buckets)
    proxy.hold(buckets[0], 72)  # more than four blocks of 16 under way, so that one is whole
    with running(config) as run:
        wait_for(lambda: num_rows(catalog) > 0, run)
        proxy.fail(buckets[which], how)
        proxy.fail(buckets[0], how if which == 0 else "")
        lost_at = time.monotonic()
        code, _, errors = finish(run, config)
        seconds = time.monotonic() - lost_at
    assert code == 4, errors
    assert seconds < 200, "no request was waited for"
    line = " ".join(errors.split())
    assert buckets[which] in line
    assert said in line
    assert "committed stays" in line
    assert "run" in line
    assert "Traceback" not in line
    assert "Signature" not in line
    before = num_rows(catalog)
    assert 0 < before < NUM_IMAGES
    proxy.fail(buckets[which], "")
    assert enrich(load_job(config, {})).num_added == NUM_IMAGES - before
    check_rows(catalog, pictures)


def num_rows(config: CatalogConfig) -> int:
    return Catalog.open(config).images(["image_id"]).num_rows if Catalog.exists(config) else 0

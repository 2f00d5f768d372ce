"""A catalog in the folder of its images: the next run finds nothing new, and no command takes its files for images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import write_pictures
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.checks import doctor_of
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine import enrich, plan
from vlmflow.errors import ConfigError
from vlmflow.sources import open_source
from vlmflow.verification import verify


def test_the_catalog_is_not_listed(make_job: Callable[..., Job], tmp_path: Path, ray_session: None) -> None:
    write_pictures(tmp_path / "photos", 3)
    pools = [{"tasks": ("embed",), "cpus": 0.5, "batch_size": 16}]
    catalog = {"uri": str(tmp_path / "photos/catalog")}
    job = make_job(tmp_path / "photos", catalog=catalog, tasks=("embed",), policy=None, pools=pools)
    assert enrich(job).num_listed == 3
    assert plan(job).num_listed == 3
    assert enrich(job).status == "nothing_due"
    assert Catalog.open(job.catalog).images(["uri"]).num_rows == 3
    assert verify(job.source, job.catalog, job=job).num_listed == 3
    inside = job.source.model_copy(update={"uri": f"{job.catalog.uri}/images"})
    with pytest.raises(ConfigError, match="lies in the catalog"):
        plan(job.model_copy(update={"source": inside}))
    told = doctor_of(job.model_copy(update={"source": inside}))
    (check,) = [check for check in told if check.name.startswith("source ")]
    assert (check.verdict, "lies in the catalog" in check.found) == ("fail", True)


def test_a_catalog_below_a_prefix_is_not_listed(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    for key in ("photos/a.jpg", "photos/catalog/images/b.parquet", "photos/catalog2/c.jpg"):
        s3_server.put(bucket, key, b"x")
    for uri in (f"s3://{bucket}/photos/", f"s3://{bucket}"):
        source = SourceConfig(uri=uri, storage=s3_server.storage)
        catalog = CatalogConfig(uri=f"s3a://{bucket}/photos/catalog/")  # reached as the environment says
        listed = [name for batch in open_source(source, catalog).list() for name in batch["uri"].to_pylist()]
        assert sorted(listed) == [f"s3://{bucket}/photos/a.jpg", f"s3://{bucket}/photos/catalog2/c.jpg"]

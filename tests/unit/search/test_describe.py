"""One image, described with the jobs and the kinds of names that `enrich` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import encode, scene
from tests.models import make_clip
from vlmflow import Query, describe_image
from vlmflow.config import ImageLimits, Job
from vlmflow.errors import ConfigError, ImageError, RowErrorClass
from vlmflow.search.query import QueryEncoder, decode_image, read_image


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Without a policy, as the first job file of most is."""
    places = {"source": {"uri": "in"}, "catalog": {"uri": "out"}, "profile": "base", "accept_unbound": True}
    models = {"embed": {"family": "open_clip", "path": str(make_clip(tmp_path / "clip"))}}
    return Job.model_validate({**places, "models": models, "tasks": ["embed", "moderate"]})


def test_an_image_is_a_name_a_path_or_bytes_and_the_policy_that_of_a_run(job: Job, tmp_path: Path) -> None:
    data, path = encode(scene(), "PNG"), tmp_path / "a.png"
    path.write_bytes(data)
    described = [describe_image(image, job) for image in (str(path), path, data)]
    assert described[0] == described[1] == described[2]
    assert (described[0].decision, bool(described[0].labels)) == ("review", True), "no thresholds are set for the model"
    vectors = [QueryEncoder(job).encode(Query(image=image)) for image in (str(path), data)]
    assert (vectors[0] == vectors[1]).all()


def test_a_name_without_a_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"image none\.jpg: No such file"):
        read_image("none.jpg", ImageLimits())


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "notes.jpg").write_bytes(b"these are no pixels")
    with pytest.raises(ImageError, match=r"image .*notes\.jpg: the content is not that of an image") as refused:
        decode_image(path, (), ImageLimits())
    assert refused.value.error_class == RowErrorClass.NOT_AN_IMAGE
    assert refused.value.remedy
    with pytest.raises(ImageError, match=r"^the content"):
        decode_image(path.read_bytes(), (), ImageLimits())

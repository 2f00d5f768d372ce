"""Parts that the integration tests share: a Ray cluster, light models, a policy bound to them, folders of images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tests.endpoint import KEY, KEY_VARIABLE
from tests.flows import Prefect
from tests.light import make_light
from tests.models import make_captioner, make_clip, make_matcher
from tests.processes import RayNodes, prefect_server, ray_nodes
from tests.s3 import CREDENTIALS, S3Server
from tests.web_samples import NUM, Served, serving, small_catalog
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job, ModelConfig
from vlmflow.engine import prepare, remoderate, run
from vlmflow.models import identify
from vlmflow.moderation.policy import bind, load_policy, prompts_digest, write_binding
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup

POLICY = """
name: test
version: "1"
description: For tests; the models behind it are random.
temperature: 0.05
neutral: [a picture of a banana, a picture of a car]
categories:
  - name: weapons
    labels:
      - {name: gun, prompts: [a picture of a gun, two guns], review: 0.45, block: 0.9}
  - name: alcohol
    labels:
      - {name: bottle, prompts: [a bottle of wine], review: 0.5, block: null}
logistic: {scale: 20.0, offset: 0.0}
bindings: []
"""


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray cluster for all tests of the session: starting one takes seconds."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name, value in (*CREDENTIALS.items(), (KEY_VARIABLE, KEY)):  # workers have the environment of this moment
        os.environ.setdefault(name, value)
    with pytest.MonkeyPatch.context() as patch:
        # Ray ends workers beyond the number of CPUs that idle for a second: those of the next test would start anew.
        patch.setenv("RAY_num_workers_soft_limit", "8")
        # How its processes do is looked at every five seconds otherwise.
        patch.setenv("REPORTER_UPDATE_INTERVAL_MS", "30000")
        ray.init(
            num_cpus=2,
            object_store_memory=400 * 1024 * 1024,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    # Nobody is shown what workers say, and looking for it in their files ten times a second never ends.
    ray._private.worker._global_node.kill_log_monitor()
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _prompts_encoded_once() -> Iterator[None]:
    """What a run of this process encodes for a new catalog, it encodes once for all tests: each time takes seconds.

    Runs in processes of their own, as those of the command line and of flows, encode them as ever.
    """
    kept: dict[object, PromptVectors | None] = {}

    def encode_policy(setup: TaskSetup) -> PromptVectors | None:
        if setup.policy is None:
            return None
        key = prompts_digest(setup.policy), setup.identities["embed"]
        if key not in kept:
            kept[key] = prepare.encode_policy(setup)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (run, remoderate):
            patch.setattr(module, "encode_policy", encode_policy)
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Models of `tests.light` by role, as a job's `models`."""
    folder = tmp_path_factory.mktemp("models")
    named = {"embed": "LightEmbedder", "caption": "LightCaptioner", "match": "LightMatcher"}
    return {
        role: {"family": f"tests.light:{name}", "path": str(make_light(folder / role, number))}
        for number, (role, name) in enumerate(named.items())
    }


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory, models: dict[str, dict[str, Any]]) -> str:
    """A policy file bound to the light embedder."""
    return bound_policy(tmp_path_factory.mktemp("policy"), models)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny random models of real architectures, and the policy bound to them: `models` and `policy` of a job."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "embed": {"family": "open_clip", "path": str(make_clip(folder / "clip"))},
        "caption": {"family": "blip_caption", "path": str(make_captioner(folder / "captioner"))},
        "match": {"family": "blip_itm", "path": str(make_matcher(folder / "matcher"))},
    }
    return {"models": models, "policy": bound_policy(folder, models)}


def bound_policy(folder: Path, models: dict[str, dict[str, Any]]) -> str:
    path = folder / "test.yaml"
    path.write_text(POLICY, encoding="utf-8")
    write_binding(path, bind(load_policy(str(path)), identify("embed", ModelConfig(**models["embed"]))))
    return str(path)


@pytest.fixture(scope="session")
def make_job_in(models: dict[str, dict[str, Any]], policy: str) -> Callable[..., Job]:
    """Builds jobs over the light models with their catalog in a folder; keyword arguments are those of :class:`Job`."""

    def make(folder: Path, source: str | Path, **options: Any) -> Job:
        source_options = options.pop("source_options", {})
        return Job(
            **{
                "source": {"uri": str(source), **source_options},
                "catalog": {"uri": str(folder / "catalog")},
                "profile": "starter",
                "models": models,
                "policy": policy,
                "max_caption_tokens": 8,
                # One actor: loading the libraries of a second would be most of a test's time.
                "pools": [{"tasks": ("embed", "moderate", "caption", "match"), "cpus": 0.5, "batch_size": 16}],
                **options,
            }
        )

    return make


@pytest.fixture
def make_job(make_job_in: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Builds jobs of this test: those of :func:`make_job_in` in its folder."""
    return partial(make_job_in, tmp_path)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """One Prefect server for all tests of the session; flows of this process talk to it too."""
    # Here, because Prefect sets up logging when it is imported.
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as api, temporary_settings({PREFECT_API_URL: api, PREFECT_HOME: home}):
        yield Prefect(api, home)
        APILogHandler().flush()  # while there is still somebody to send it to


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One Ray cluster of two nodes with its dashboard, for tests that leave it whole."""
    with ray_nodes(tmp_path_factory.mktemp("ray"), dashboard=True) as started:
        yield started


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> CatalogConfig:
    """Where a catalog is to be: on the local disk, and in the slow tests on S3 over HTTP too."""
    if request.param == "local":
        return CatalogConfig(uri=str(tmp_path / "catalog"))
    server: S3Server = request.getfixturevalue("s3_server")
    return CatalogConfig(uri=f"s3://{server.make_bucket()}/some where/catalog", storage=server.storage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a catalog on the local disk."""
    return tmp_path / "catalog"


@pytest.fixture
def catalog(config: CatalogConfig) -> Catalog:
    return Catalog.open_or_create(config, pa.schema([]))


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The app over a small catalog that all tests of a file only read."""
    with serving(small_catalog(tmp_path_factory.mktemp("app"), NUM)) as served:
        yield served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The app over a small catalog of the test's own."""
    with serving(small_catalog(tmp_path, NUM)) as served:
        yield served

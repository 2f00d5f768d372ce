"""The app over small catalogs, for tests: asked in this process, without a socket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from tests.report_samples import label, labels_of, put_pictures, put_rows
from tests.search_samples import put
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.web.server import ServeConfig, running_app

TOKEN = "a+token/of:the=tests+long==enough"  # base64 has such marks, and worse ones are refused
HOST = "127.0.0.1:8377"
ORIGIN = f"http://{HOST}"
NUM = 24  # images of the catalog that most tests of the app share
DECISIONS = ("allow", "review", "block")


class Browser(TestClient):
    """A browser that has entered. Its writes carry what those of our pages carry."""

    reviewer = ""  # the name that its page shows

    def csrf(self) -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', self.get("/").text)
        assert found is not None
        return found[1]

    def write(self, path: str, **options: Any) -> Any:
        headers = {"Origin": ORIGIN, "X-Vlmflow-Csrf": self.csrf(), **options.pop("headers", {})}
        return self.post(path, headers=headers, **options)

    def review_as(self, name: str) -> Browser:
        assert self.write("/reviewer", json={"name": name}).status_code == 200
        self.reviewer = name
        return self

    def judge(self, row: dict[str, Any], decision: str | None, **given: Any) -> Any:
        shown = {"image_id": row["image_id"], "content_hash": row["content_hash"], "reviewer": self.reviewer}
        body = {**shown, "decision": decision, **given}
        return self.write("/verdict", json=body)


class Served:
    """An app and the catalog behind it."""

    def __init__(self, app: Any, config: CatalogConfig, desk: Any) -> None:
        self.app, self.config, self.desk = app, config, desk

    def stranger(self, host: str = HOST) -> Browser:
        """A browser without the token."""
        return Browser(self.app, base_url=f"http://{host}", follow_redirects=False)

    def browser(self) -> Browser:
        """A browser that was let in."""
        browser = self.stranger()
        assert browser.get("/enter", params={"token": TOKEN}).status_code == 303
        return browser

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of the table by the last part of their address."""
        rows = Catalog.open(self.config).images().to_pylist()
        return {row["uri"].rsplit("/", 1)[-1]: row for row in rows}


@contextmanager
def serving(config: CatalogConfig, *, every_s: float = 3600.0) -> Iterator[Served]:
    """The app over a catalog. Rows follow verdicts at the end, or when `desk.judging.flush` is called."""
    settings = ServeConfig(verdicts_every_s=every_s)
    with running_app(config, settings, TOKEN, frozenset({HOST}), "vlmflow") as (app, desk):
        yield Served(app, config, desk)


def small_catalog(root: Path, count: int = 24) -> CatalogConfig:
    """Rows with pictures in two files: a third of them each is allowed, to be reviewed, and blocked."""
    config = CatalogConfig(uri=str(root / "catalog"))
    uris, hashes = put_pictures(root / "images", count, side=32)
    for number, part in enumerate((slice(0, count // 2), slice(count // 2, count))):
        names = [f"n{place:03d}" for place in range(count)[part]]
        scores = [0.05 + 0.9 * place / count for place in range(count)[part]]
        decisions = [DECISIONS[place % 3] for place in range(count)[part]]
        put_rows(
            config, names, run=f"run-{number}", uri=uris[part], content_hash=hashes[part], decision=decisions,
            width=[64] * len(names), height=[48] * len(names),
            decision_reason=[None if decision == "allow" else "weapons/gun" for decision in decisions],
            labels=labels_of(
                [[label("gun", score, decision), label("knife", 0.1, "allow")]
                 for score, decision in zip(scores, decisions, strict=True)]
            ),
        )  # fmt: skip
    return config


def starter_catalog(root: Path) -> CatalogConfig:
    """Twelve pictures of the demo with the vectors of the starter's embedder: half of them to be reviewed."""
    from vlmflow.imaging import hash_of
    from vlmflow.search.query import Query, QueryEncoder, search_job

    config = CatalogConfig(uri=str(root / "catalog"))
    encoder = QueryEncoder(search_job(config, "starter"))
    files = sorted((Path(__file__).parents[1] / "vlmflow" / "starter" / "demo").glob("sku-01*.png"))[:12]
    decisions = ["allow", "review"] * 6
    put(
        config, [file.name for file in files], np.stack([encoder.encode(Query(image=file)) for file in files]),
        model=encoder.fingerprints[0], uri=[str(file) for file in files], decision=decisions,
        content_hash=[hash_of(file.read_bytes()) for file in files], caption=[f"caption {file.name}" for file in files],
        labels=labels_of(
            [[label("gun", 0.05 * place, decision), label("knife", 0.1, "allow")]
             for place, decision in enumerate(decisions)]
        ),
    )  # fmt: skip
    runs = Catalog.open(config).runs
    runs.start("run", {"profile": "starter"})
    runs.finish("run", {"profile": "starter"})
    return config


def shown_ids(page: str) -> list[str]:
    """The images of the cards on a page, in order."""
    return re.findall(r'class="uri"><a href="/image/([0-9a-f]{32})"', page)


def text_of(page: str) -> str:
    """What a page shows, without its tags."""
    return unescape(re.sub(r"<[^>]*>", "", page))


def by_id(served: Served) -> dict[str, dict[str, Any]]:
    """The rows of the catalog by their ids."""
    return {row["image_id"]: row for row in served.rows().values()}


def flush(served: Served) -> None:
    """Writes the verdicts that wait, and has the app look at the rows anew."""
    served.desk.judging.flush()
    served.desk.shelf.refresh()

"""A model of one's own as the README has it: the class lies in the folder where the command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.integration.test_readme_commands import blocks, write_modules
from tests.pictures import write_broken, write_pictures
from tests.processes import ROOT
from vlmflow import Catalog, CatalogConfig

DOCUMENT = "vlmflow/models/README.md"
NUM_IMAGES = 6


def vlmflow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `python -m vlmflow` in a folder that no variable of the environment names."""
    command = [sys.executable, "-m", "vlmflow", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def rows(folder: Path) -> dict[str, list[object]]:
    """By the name of the image: status, caption, errors and fingerprint."""
    catalog = Catalog.open(CatalogConfig(uri=str(folder / "shop-catalog")))
    names = ["uri", "status", "caption", "errors", "caption_fingerprint"]
    return {Path(row.pop("uri")).name: list(row.values()) for row in catalog.images(names).to_pylist()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_captions_and_its_code_version_makes_rows_due(tmp_path: Path) -> None:
    (tmp_path / "vlmflow").mkdir()
    (tmp_path / "vlmflow" / "starter").symlink_to(ROOT / "vlmflow" / "starter")
    images = tmp_path / "images"
    images.mkdir()
    write_pictures(images, NUM_IMAGES)
    num_broken = len(write_broken(images))
    write_modules(DOCUMENT, tmp_path)
    module = tmp_path / "shop_models" / "captioner.py"
    (block,) = [block for block in blocks(DOCUMENT, "yaml") if "shop_models" in block]
    job = yaml.safe_load(block) | {"source": {"uri": str(images)}, "pools": [{"tasks": ["caption"], "cpus": 0.5}]}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(job))

    # It gives no caption of a white image: that costs the row of this one.
    code = module.read_text()
    assert "(tokens, skip_special_tokens=True)]" in code
    code = code.replace("for text in self", "for image, text in zip(pixels, self")
    code = code.replace(
        "(tokens, skip_special_tokens=True)]", "(tokens, skip_special_tokens=True)) if image.min() < 255]"
    )
    module.write_text(code)
    Image.new("RGB", (64, 64), "white").save(images / "white.png")

    done = vlmflow(tmp_path, "enrich", "--config", "shop.yaml")
    assert done.returncode == 0, done.stderr
    made = rows(tmp_path)
    assert len(made) == NUM_IMAGES + num_broken + 1
    status, caption, errors, _ = made.pop("white.png")
    assert (status, caption) == ("failed", None)
    assert "the model gave 0 captions of 1 images" in str(errors)
    captions = [caption for status, caption, *_ in made.values() if status == "ok"]
    assert len(captions) == NUM_IMAGES
    assert all(str(caption).startswith("In our shop: ") for caption in captions)
    catalog = Catalog.open(CatalogConfig(uri=str(tmp_path / "shop-catalog")))
    models = {model for model in catalog.images(["caption_model"])["caption_model"].to_pylist() if model is not None}
    assert models == {"shop_models.captioner:ShopCaptioner(captioner)@local"}

    # Its next version makes other captions: what has one is due, and what failed is due again.
    module.write_text(code.replace("code_version=1", "code_version=2"))
    done = vlmflow(tmp_path, "plan", "--config", "shop.yaml", "--json")
    due = json.loads(done.stdout.splitlines()[-1])["due"]
    assert due == {"caption": {"fingerprint": NUM_IMAGES, "retry": 1}}, done.stdout + done.stderr

    # From another folder it is not found.
    done = vlmflow(images, "plan", "--config", str(tmp_path / "shop.yaml"))
    assert done.returncode == 2
    assert "there is no module shop_models" in done.stderr

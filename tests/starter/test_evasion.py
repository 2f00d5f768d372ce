"""What is hidden at the end of a panorama, in one frame of sixty, or in white on nothing is found: starter models."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmflow.config import ImageLimits, ModelConfig
from vlmflow.imaging import decode
from vlmflow.imaging.pixels import VIEWS
from vlmflow.models import identify, load_embedder, pixel_request
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import find_binding, load_policy
from vlmflow.moderation.prompts import encode_prompts
from vlmflow.tasks.pixels import pixel_columns

STARTER = Path(str(resources.files("vlmflow"))) / "starter"

Moderate = Callable[[bytes, tuple[str, ...]], tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def moderate() -> Moderate:
    """The decision on an image and its gravest label, as the tasks come to it."""
    import pyarrow as pa

    from vlmflow.tasks.embed import EmbedTask
    from vlmflow.tasks.moderate import ModerateTask

    clip = ModelConfig(family="open_clip", path=str(STARTER / "clip"), repo="vlmflow/starter-clip")
    policy = load_policy("demo")
    embedder = load_embedder(clip, "cpu")
    moderator = Moderator(policy, find_binding(policy, identify("embed", clip)), encode_prompts(policy, embedder))

    def run(data: bytes, views: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        request = pixel_request("embed", clip, views)
        shown = decode(data, [request], ImageLimits()).pixels[request.key]
        pixels, names = pixel_columns(request)
        columns = {
            pixels: pa.array([[view.tobytes() for _, view in shown]], pa.list_(pa.binary())),
            names: pa.array([[name for name, _ in shown]], pa.list_(pa.string())),
        }
        batch = pa.table(columns)
        batch = pa.table({**columns, **EmbedTask(embedder, request)(batch)})
        out = ModerateTask(moderator)(batch)
        labels = out["labels"].to_pylist()[0]
        order = ("allow", "review", "block")
        gravest = max(labels, key=lambda label: (order.index(label["decision"]), label["score"]))
        return out["decision"][0].as_py(), gravest

    return run


def demo(name: str) -> Image.Image:
    return Image.open(STARTER / "demo" / name).convert("RGB")


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


HARMLESS = "sku-0007.jpg"  # a fish
SLOT_MACHINES = "sku-0019.gif"


def test_the_pictures_alone(moderate: Moderate) -> None:
    assert moderate(saved(demo(HARMLESS), "PNG"), VIEWS)[0] == "allow"
    assert moderate(saved(demo(SLOT_MACHINES), "PNG"), VIEWS)[0] == "block"


@pytest.mark.parametrize("turned", [False, True])
def test_the_far_end_of_a_panorama(moderate: Moderate, turned: bool) -> None:
    side, harmless = 200, demo(HARMLESS).resize((200, 200))
    panorama = Image.new("RGB", (side, 6 * side) if turned else (6 * side, side))
    for number in range(6):
        panorama.paste(harmless, (0, number * side) if turned else (number * side, 0))
    panorama.paste(demo("sku-0133.jpg").resize((side, side)), (0, 0) if turned else (5 * side, 0))
    data = saved(panorama, "PNG")

    _, before = moderate(data, ("squash", "center"))
    assert before["label"] != "bomb" or before["decision"] == "allow", "neither the whole nor the middle shows it"
    decision, label = moderate(data, VIEWS)
    assert (decision, label["label"]) == ("block", "bomb")
    assert label["view"] == ("tile-1" if turned else "tile-6")


@pytest.mark.parametrize("image_format", ["GIF", "WEBP"])
def test_one_frame_of_sixty(moderate: Moderate, image_format: str) -> None:
    images = []
    for number in range(60):
        image = demo(HARMLESS).resize((160, 160))
        image.putpixel((number, 0), (0, 0, 0))
        images.append(image)
    images[41] = demo(SLOT_MACHINES).resize((160, 160))
    data = saved(images[0], image_format, save_all=True, append_images=images[1:], duration=80)

    assert moderate(data, ("squash", "center"))[0] == "allow"
    decision, label = moderate(data, VIEWS)
    assert (decision, label["label"]) == ("block", "slot_machine")
    assert label["view"].startswith("frame-")
    assert label["time_s"] == pytest.approx(41 * 0.08, abs=0.01)


def test_white_on_transparent(moderate: Moderate) -> None:
    grey = np.asarray(demo("sku-0153.webp").convert("L"))
    ink = np.full((*grey.shape, 4), 255, np.uint8)
    ink[..., 3] = grey
    data = saved(Image.fromarray(ink), "PNG")

    assert moderate(data, ("squash", "center"))[0] == "allow", "on white there is nothing to see"
    decision, label = moderate(data, VIEWS)
    assert (decision, label["label"], label["view"]) == ("block", "skull", "black")

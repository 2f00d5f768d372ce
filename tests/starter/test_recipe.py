"""The training recipe on a world of eight shapes that the test draws itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.starter.captions import Caption, Writer, agreement
from benchmarks.starter.concepts import Concept, World, icon_name, small_world
from benchmarks.starter.data import Studio
from benchmarks.starter.metrics import Nouns
from benchmarks.starter.questions import Asker
from benchmarks.starter.scenes import Scene
from benchmarks.starter.sources import DRAWING_PX, DrawingSet
from benchmarks.starter.train import Recipe, build, train_on_export, train_stage, write_folders
from benchmarks.starter.vilbert_figures import Roles

NAMES = ("apple", "ball", "cup", "drum", "egg", "fork")
UNSEEN = ("gate", "hat")


@pytest.fixture(scope="module")
def world() -> World:
    return World(
        "small",
        64,
        tuple(Concept(name, "tool" if name < "d" else "weapon", name) for name in NAMES),
        tuple(Concept(name, "tool", name) for name in UNSEEN),
    )


@pytest.fixture(scope="module")
def drawings() -> DrawingSet:
    pixels = [np.asarray(_polygon(sides)) for sides in range(3, 11)]
    sizes = np.full((8, 2), DRAWING_PX, np.int64)
    return DrawingSet(np.stack(pixels), sizes, np.arange(8), ["twemoji"] * 8)


@pytest.fixture
def studio(world: World, drawings: DrawingSet) -> Studio:
    return Studio(world, drawings, seed=3)


def _polygon(sides: int) -> Image.Image:
    image = Image.new("RGBA", (DRAWING_PX, DRAWING_PX))
    center = DRAWING_PX / 2
    fill = (40 * sides % 256, 90 * sides % 256, 30, 255)
    ImageDraw.Draw(image).regular_polygon((center, center, center - 1), sides, fill=fill)
    return image


def test_equal_seeds_make_equal_batches(world: World, drawings: DrawingSet) -> None:
    first, second = (Studio(world, drawings, seed=3).batch(16, step=5) for _ in range(2))
    assert first.scenes == second.scenes
    assert first.captions == second.captions
    assert torch.equal(first.pixels, second.pixels)


def test_other_steps_and_seeds_make_other_batches(world: World, drawings: DrawingSet) -> None:
    batch = Studio(world, drawings, seed=3).batch(16, step=5)
    assert Studio(world, drawings, seed=3).batch(16, step=6).scenes != batch.scenes
    assert Studio(world, drawings, seed=4).batch(16, step=5).scenes != batch.scenes


def test_unseen_concepts_never_occur_in_training(studio: Studio) -> None:
    seen = {concept for step in range(20) for scene in studio.batch(16, step).scenes for concept, _ in scene.items}
    assert seen == set(range(len(NAMES)))


def test_painted_objects_cover_the_background(studio: Studio) -> None:
    empty, full = Scene(((0, 1),), 0), Scene(((0, 4),), 0)
    covered = [(studio.painter.paint([s], studio.sampler.rng(1)) < 200).float().mean().item() for s in (empty, full)]
    assert all(0.005 < share < 0.9 for share in covered)


def test_boxes_are_where_the_objects_are(studio: Studio) -> None:
    scenes = [Scene(((0, 2),), 0), Scene(((0, 1), (1, 1)), 0)]
    pixels, boxes = studio.painter.paint_with_boxes(scenes, studio.sampler.rng(3))
    assert torch.equal(pixels, studio.painter.paint(scenes, studio.sampler.rng(3)))
    side = pixels.shape[-1]
    for picture, of in zip(pixels, boxes, strict=True):
        assert len(of) == 2
        covered = torch.zeros(side, side, dtype=torch.bool)
        for left, top, right, bottom in (of * side).round().int().tolist():
            covered[top:bottom, left:right] = True
            assert (picture[:, top:bottom, left:right] < 200).any()
        assert not ((picture < 200).any(0) & ~covered).any(), "nothing is painted beside the boxes"


def test_near_scenes_differ_in_one_thing(studio: Studio) -> None:
    scenes = studio.sampler.sample(40, 2, num_near=20)
    for original, near in zip(scenes[:20], scenes[20:], strict=True):
        same_items = sum(a == b for a, b in zip(original.items, near.items, strict=True))
        differing = (original.color != near.color) + (len(original.items) - same_items)
        assert differing == 1


@pytest.mark.slow
def test_a_run_resumes_where_it_was_killed(studio: Studio, tmp_path: Path) -> None:
    def recipe(max_steps: int) -> Recipe:
        return Recipe("small", tmp_path, minutes=10, max_steps=max_steps, batch_size=4)

    assert train_stage("trunk", recipe(12), studio) == 12
    weights = build(recipe(12), studio).trunk.state_dict()
    assert train_stage("trunk", recipe(12), studio) == 12, "a finished run does nothing"
    again = build(recipe(12), studio).trunk.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert train_stage("trunk", recipe(20), studio) == 20
    moved = build(recipe(20), studio).trunk.state_dict()
    assert not torch.equal(moved["logit_scale"], weights["logit_scale"])


@pytest.mark.slow
def test_every_stage_trains_and_is_exported(studio: Studio, tmp_path: Path) -> None:
    recipe = Recipe("small", tmp_path, minutes=10, max_steps=2, batch_size=4)
    for stage in ("trunk", "matcher", "vqa"):
        assert train_stage(stage, recipe, studio) == 2
    write_folders(recipe, studio, tmp_path / "out")
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"clip", "captioner", "matcher", "vqa"}

    train_on_export(recipe, studio, tmp_path / "out")
    roles = Roles.load(tmp_path / "out" / "vilbert")
    batch = studio.batch(2, 0)
    pixels = ((batch.pixels.float() + 1) * 127.5).to(torch.uint8)
    (answers, _) = roles.answerer.answer(pixels, [["what color is the background?"], []])
    assert answers[0].text in Asker(studio.world).answers
    assert roles.matcher.match_itm(roles.matcher.encode_images(pixels), ["an apple", "a cup"]).shape == (2,)

    # Another run goes on from what was exported: the same weights, to the half precision that they are kept in.
    further = Recipe("small", tmp_path / "further", start_from=tmp_path / "out")
    before, after = build(recipe, studio), build(further, studio)
    for one, other in ((before.trunk, after.trunk), (before.matcher, after.matcher)):
        held = {name: weight for name, weight in other.state_dict().items() if name != "logit_scale"}
        assert all(torch.equal(weight, one.state_dict()[name].half().float()) for name, weight in held.items())


def test_captions_agree_with_the_scenes_that_they_are_true_of() -> None:
    scenes = [Scene(((0, 2),), 1), Scene(((0, 2), (1, 1)), 1), Scene(((0, 2),), 2)]
    captions = [
        Caption("two apples on a black background", ((0, 2),), 1, True),
        Caption("a picture of two apples", ((0, 2),), None, True),
        Caption("apple", ((0, 0),), None, False),
    ]
    expected = [[True, True, True], [False, False, True], [False, True, True]]
    assert agreement(scenes, captions, num_concepts=2).tolist() == expected


def test_captions_are_english() -> None:
    world = small_world()
    writer = Writer(world)
    number = {concept.name: index for index, concept in enumerate(world.all_concepts)}
    orange = 4
    assert writer.full(Scene(((number["apple"], 1),), orange)) == "an apple on an orange background"
    scene = Scene(((number["knife"], 3),), 0)
    assert writer.full(scene) == "three knives on a white background"
    three = Scene(((number["car"], 1), (number["umbrella"], 1), (number["strawberry"], 1)), 0)
    assert writer.things(three) == "a car, an umbrella and a strawberry"


def test_answers_are_true(studio: Studio) -> None:
    asker, rng = Asker(studio.world), studio.sampler.rng(1)
    scene = Scene(((2, 3),), 7)
    answers = {kind: asker.ask(scene, rng, kind).answer for kind in ("what", "count", "color")}
    assert answers == {"what": "cup", "count": "three", "color": "blue"}


def test_the_longer_name_wins() -> None:
    world = small_world()
    nouns = Nouns(world.all_concepts)
    found = {world.all_concepts[number].name for number in nouns.find("two soccer balls and a wine glass on blue")}
    assert found == {"soccer ball", "wine glass"}


def test_icon_names_follow_iconify() -> None:
    assert icon_name("woman’s boot") == "womans-boot"
    assert icon_name("T-shirt") == "t-shirt"

"""What ships: checkpoints that the libraries load without a network, cards, NOTICE, the demo catalog."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    ViltForQuestionAnswering,
    ViltImageProcessor,
)

from benchmarks.clip_cpu import parity
from benchmarks.machine import RESULTS
from benchmarks.starter.cards import BARS, SETS, figure_table, misses, notice, read_results, write_results
from benchmarks.starter.sources import ARTISTS, HELD_OUT
from vlmflow.config import ImageLimits, ModelConfig
from vlmflow.grounding import ground_phrases
from vlmflow.imaging import decode
from vlmflow.models import load_answerer, load_matcher, pixel_request

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "vlmflow" / "starter"
MAX_BYTES = 40_000_000
MODELS = ("clip", "captioner", "matcher", "vqa", "vilbert")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    return open_clip.create_model(f"local-dir:{STARTER / 'clip'}").eval()


@pytest.fixture(scope="module")
def captioner() -> BlipForConditionalGeneration:
    return BlipForConditionalGeneration.from_pretrained(STARTER / "captioner").eval()


def test_all_checkpoints_together_stay_small() -> None:
    files = [file for model in MODELS for file in (STARTER / model).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_clip_loads_with_its_tokenizer_and_preprocessing(clip: open_clip.CLIP) -> None:
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{STARTER / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{STARTER / 'clip'}")
    image = preprocess(Image.new("RGB", (200, 90), "red"))
    assert image.shape == (3, 64, 64)
    # A word that no template holds, and one that is not ASCII, are spelled or unknown, but never an error.
    tokens = tokenizer(["a picture of an apple", "a zebra crossing", "crème brûlée №7 日本"])
    assert (tokens.argmax(dim=-1) > 0).all(), "every text ends with [SEP], the highest id"
    with torch.inference_mode():
        assert torch.isfinite(clip.encode_text(tokens)).all()


def test_one_tower_serves_clip_captioner_and_matcher(
    clip: open_clip.CLIP, captioner: BlipForConditionalGeneration
) -> None:
    matcher = BlipForImageTextRetrieval.from_pretrained(STARTER / "matcher").eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = clip.encode_image(pixels)
        for model in (captioner, matcher):
            first = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
            torch.testing.assert_close(first @ clip.visual.proj, expected, atol=1e-4, rtol=1e-4)


def test_captioner_ends_its_sentences(captioner: BlipForConditionalGeneration) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STARTER / "captioner")
    processor = BlipImageProcessor.from_pretrained(STARTER / "captioner")
    with Image.open(STARTER / "demo" / "print-cmyk.jpg") as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    with torch.inference_mode():
        ids = captioner.generate(pixel_values=pixels, max_new_tokens=28)
    assert ids[0, -1].item() == tokenizer.sep_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith("on an orange background")


def test_vqa_answers_in_its_own_words() -> None:
    model = ViltForQuestionAnswering.from_pretrained(STARTER / "vqa").eval()
    tokenizer = AutoTokenizer.from_pretrained(STARTER / "vqa")
    processor = ViltImageProcessor.from_pretrained(STARTER / "vqa")
    with Image.open(STARTER / "demo" / "print-cmyk.jpg") as image:
        inputs = processor(image.convert("RGB"), return_tensors="pt")
    question = tokenizer("what color is the background?", return_tensors="pt")
    with torch.inference_mode():
        answer = model(**question, pixel_values=inputs.pixel_values).logits.argmax().item()
    assert model.config.id2label[answer] == "orange"


def test_vilbert_answers_matches_and_points() -> None:
    config = ModelConfig(family="vilbert", path=str(STARTER / "vilbert"))
    request = pixel_request("answer", config, ("squash",))
    assert request is not None
    data = (STARTER / "demo" / "print-cmyk.jpg").read_bytes()
    _, shown = decode(data, [request], ImageLimits()).pixels[request.key][0]
    pixels = torch.from_numpy(shown.copy()).permute(2, 0, 1)[None]
    ((answer,),) = load_answerer(config, "cpu").answer(pixels, [["what color is the background?"]])
    assert answer.text == "orange"
    assert answer.score > 0.5
    matcher = load_matcher(config, "cpu")
    images = matcher.encode_images(pixels)
    right, wrong = (matcher.match_itm(images, [text]) for text in ("a camera on orange", "two dogs on blue"))
    assert right is not None
    assert wrong is not None
    assert right[0] > wrong[0]
    (regions,) = ground_phrases(data, ["a camera"], config)
    assert regions[0].score == max(of.score for of in regions)
    assert all(0 <= of.left < of.right and 0 <= of.top < of.bottom for of in regions)


@pytest.mark.parametrize("model", MODELS)
def test_cards_carry_the_measured_figures(model: str) -> None:
    results = read_results(RESULTS)
    card = (STARTER / model / "README.md").read_text()
    assert figure_table(model, results) in card
    assert "drawings alone" in card
    for own, _, name, value, _ in misses(results):
        assert own != model or f"{name}" in card, f"the card hides {name} at {value}"


def test_results_hold_every_bar() -> None:
    results = read_results(RESULTS)
    assert set(SETS) <= set(results)
    assert all(name in results[part] for _, part, name, _ in BARS)


def test_results_say_of_which_machine_they_are(tmp_path: Path) -> None:
    def others() -> object:
        return json.loads((tmp_path / "starter.json").read_text()).get("machine of all but ViLBERT")

    (tmp_path / "starter.json").write_text(json.dumps({"unseen scenes": {"gallery": 1000.0}}))
    figures = read_results(tmp_path)
    write_results(figures, tmp_path, only_vilbert=True)
    assert others() == "not recorded"
    write_results(figures, tmp_path, only_vilbert=False)
    assert others() is None
    measured_on = json.loads((tmp_path / "starter.json").read_text())["machine"]
    assert {"processor", "cores", "versions", "measured_at"} <= measured_on.keys()
    for _ in range(2):
        write_results(figures, tmp_path, only_vilbert=True)
        assert others() == measured_on
    assert read_results(tmp_path) == figures == {"unseen scenes": {"gallery": 1000.0}}


def test_notice_names_every_source() -> None:
    text = (STARTER / "NOTICE").read_text()
    assert text == notice()
    assert all(artist.package in text and artist.licence in text for artist in (*ARTISTS, HELD_OUT))


def _lines(name: str) -> list[dict[str, str]]:
    with (STARTER / "demo" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_demo_files_match_the_manifest() -> None:
    manifest, truth = _lines("manifest.csv"), _lines("truth.csv")
    on_disk = {file.name for file in (STARTER / "demo").iterdir()} - {"manifest.csv", "truth.csv"}
    assert {line["uri"] for line in manifest} == on_disk
    assert [line["id"] for line in manifest] == [line["id"] for line in truth]
    assert all(line["title"] for line in manifest)


def test_demo_holds_what_a_feed_brings() -> None:
    manifest, truth = _lines("manifest.csv"), _lines("truth.csv")
    assert 190 <= len(manifest) <= 230
    assert sum(line["must_flag"] == "true" for line in truth) >= 30
    assert sum(line["is_title_wrong"] == "true" for line in truth) == 20
    assert sum(line["decodes"] == "false" for line in truth) == 4
    contents = Counter((STARTER / "demo" / line["uri"]).read_bytes() for line in manifest)
    assert sum(count == 2 for count in contents.values()) == 4
    suffixes = {Path(line["uri"]).suffix for line in manifest}
    assert suffixes == {".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".avif"}


def test_demo_oddities_are_what_they_are_called() -> None:
    folder = STARTER / "demo"
    with Image.open(folder / "animated.gif") as image:
        assert image.n_frames == 4
    with Image.open(folder / "cut-out.png") as image:
        assert image.mode == "RGBA"
    with Image.open(folder / "print-cmyk.jpg") as image:
        assert image.mode == "CMYK"
    with Image.open(folder / "phone-rotated.jpg") as image:
        assert image.getexif()[0x0112] == 6


def test_vectors_made_in_bfloat16_are_judged_as_those_in_float32() -> None:
    by_way = parity()
    for way in ("bfloat16", "bfloat16_as_on_cuda"):
        found = by_way[way]
        assert found["share_of_scores_within_0.01"] >= 0.99, way
        assert found["decisions_changed"] == 0, way
        assert found["greatest_change_of_a_score"] > 0, f"{way}: nothing was computed in bfloat16"

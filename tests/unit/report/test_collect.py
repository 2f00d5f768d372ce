"""What the page counts and which rows it chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, image_id
from tests.report_samples import label, labels_of, put_record, put_rows
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary, to_words
from vlmflow.errors import ConfigError
from vlmflow.report.cards import Cards
from vlmflow.report.collect import NUM_NEW, NUM_PER_LABEL, collect
from vlmflow.report.labels import NUM_BINS, histogram
from vlmflow.report.pictures import Pictures
from vlmflow.report.runs import find_run
from vlmflow.report.sections import lowest_section, scores_section, table_section
from vlmflow.summary import summarize
from vlmflow.web.facts import FactReader


def test_counts_are_of_all_files_and_shown_rows_are_the_right_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["a", "b"], run="run-0", text_itm=[0.93, None], caption_itm=[0.1, 0.2])
    put_rows(
        config,
        ["c", "d", "e"],
        text_itm=[0.04, 1.0, 0.33],
        decision=["block", "allow", "review"],
        decision_reason=["weapons/gun", None, "unscored"],
        status=["ok", "ok", "failed"],
        labels=labels_of([[label("gun", 0.95, "block")], [label("gun", 0.2, "allow")], [label("gun", None, "review")]]),
    )
    facts = collect(Catalog.open(config), "run-1")
    assert (facts.num_images, facts.num_of_run, facts.num_new) == (5, 3, 2)
    assert facts.decisions == {"allow": 3, "block": 1, "review": 1}
    assert facts.reasons == {"weapons/gun": 1, "unscored": 1}
    assert facts.new == [image_id("c"), image_id("e")]  # blocked ones first
    assert facts.lowest == [image_id(name) for name in "cead"]
    assert facts.lowest_by == "text_itm"
    assert facts.matches["text_itm"].tolist() == [1] + [0] * 5 + [1] + [0] * 11 + [1, 1]
    assert facts.matches["caption_itm"].sum() == 5
    gun = facts.labels["weapons/gun"]
    assert (gun.num_scored, gun.num_unscored, gun.num_block, gun.num_review) == (2, 1, 1, 1)
    assert [found for found, _ in facts.examples["weapons/gun"]] == [image_id("c"), image_id("d")]
    assert facts.rows[image_id("c")].title == "title of c"
    assert facts.rows[image_id("e")].sets >= {"new", "failed", "sample"}


def test_where_no_model_has_a_matching_head_cosines_rank_and_the_page_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    without = {"text_itm": [None], "caption_itm": [None]}
    put_rows(config, ["a"], run="run-0", text_itc=[0.31], caption_itc=[0.2], **without)
    put_rows(config, ["b"], run="run-0", text_itc=[None], caption_itc=[0.1], **without)
    put_rows(config, ["c"], text_itc=[-0.02], **without)
    facts = collect(Catalog.open(config), "run-1")
    assert (facts.lowest_by, facts.num_ranked, facts.has_cosines_alone) == ("text_itc", 2, True)
    assert facts.lowest == [image_id("c"), image_id("a")]
    assert "cosines" in scores_section(facts)
    cards = Cards(Pictures())
    assert "<dt>title cosine</dt><dd>-0.020</dd>" in lowest_section(facts, cards)
    page, _ = table_section(facts, cards)
    assert "title cosine</button>" in page
    assert '<span data-v="-0.020000">-0.020</span>' in page
    # One row that has the other, and that counts, of it alone.
    put_rows(config, ["d"], text_itm=[0.9], text_itc=[0.4], run="run-2")
    facts = collect(Catalog.open(config), "run-1")
    assert (facts.lowest_by, facts.num_ranked, facts.has_cosines_alone) == ("text_itm", 1, False)
    assert "cosines" not in lowest_section(facts, cards)


def test_only_so_many_rows_are_kept_and_the_total_is_known(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    names = [f"n{number}" for number in range(300)]
    scores = [number / 300 for number in range(300)]
    for start in (0, 150):
        some = slice(start, start + 150)
        put_rows(
            config,
            names[some],
            decision=["review"] * 150,
            labels=labels_of([[label("gun", score, "review")] for score in scores[some]]),
        )
    facts = collect(Catalog.open(config), "run-1")
    assert facts.num_new == 300
    assert len(facts.new) == NUM_NEW
    assert facts.new == sorted(image_id(name) for name in names)[:NUM_NEW]
    best = [image_id(name) for name in reversed(names[-NUM_PER_LABEL:])]
    assert [found for found, _ in facts.examples["weapons/gun"]] == best


def test_an_image_counts_once_for_each_class_of_its_errors_everywhere(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    twice = [{"stage": task, "class": "endpoint_timeout", "message": ""} for task in ("caption", "answer")]
    other = {"stage": "frames", "class": "corrupt", "message": ""}
    put_rows(config, ["a", "b", "c"], errors=[twice, [other, twice[0]], None], status=["partial", "partial", "ok"])
    expected = {"endpoint_timeout": 2, "corrupt": 1}
    catalog = Catalog.open(config)
    assert collect(catalog, None).errors == expected
    assert summarize(config).errors == expected
    facts = FactReader(Folder(config)).read(list(catalog.live_files("images").values()))
    assert facts.counts("error", None) == expected | {"": 1}
    assert facts.mask("error", ["endpoint_timeout"]).sum() == 2, "a filter finds what is not the first"


def test_a_score_at_the_edge_of_a_bar_is_in_the_one_that_begins_there() -> None:
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    for values in (edges, edges.astype(np.float32), edges.astype(np.float32).astype(np.float64)):
        assert histogram(values).tolist() == [1] * (NUM_BINS - 1) + [2]
    below = np.nextafter(edges[1:].astype(np.float32), np.float32(0))
    assert histogram(below).tolist() == [1] * NUM_BINS


def test_an_image_counts_once_for_a_label_that_prompts_and_detectors_look_for(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    by_detector = {"detector": "arms"}
    flags = [
        [label("gun", 0.6, "review"), label("gun", 0.95, "block") | by_detector],
        [label("gun", 0.3, "allow"), label("gun", None, "review") | by_detector],
        [label("gun", None, "review"), label("gun", None, "review") | by_detector],
    ]
    put_rows(config, ["a", "b", "c"], decision=["block", "review", "review"], labels=labels_of(flags))
    facts = collect(Catalog.open(config), None)
    gun = facts.labels["weapons/gun"]
    assert (gun.num_block, gun.num_review, gun.num_scored, gun.num_unscored) == (1, 2, 2, 1)
    assert gun.counts.sum() == 2
    assert facts.examples["weapons/gun"] == [(image_id("a"), pytest.approx(0.95)), (image_id("b"), pytest.approx(0.3))]


def test_policies_of_one_name_and_version_are_told_apart_by_their_digests(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["a", "b"], policy_digest=["ab" * 32] * 2)
    put_rows(config, ["c"], policy_digest=["cd" * 32])
    put_rows(config, ["d"], policy_name=[None], policy_version=[None], policy_digest=[None])
    catalog = Catalog.open(config)
    expected = {"demo 1 (abababababab)": 2, "demo 1 (cdcdcdcdcdcd)": 1}
    assert collect(catalog, None).policies == expected
    assert summarize(config).policies == expected
    facts = FactReader(Folder(config)).read(list(catalog.live_files("images").values()))
    assert facts.counts("policy", None) == expected | {"": 1}


def test_thresholds_and_scales_that_rows_do_not_share_are_said_and_drawn_nowhere(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    gun, knife = label("gun", 0.2, "allow"), label("knife", 0.2, "allow")
    put_rows(config, ["a", "b"], labels=labels_of([[gun, knife], [label("gun", None, "review")]]))
    one_scale = scores_section(collect(Catalog.open(config), None))
    assert one_scale.count("block from 0.90") == 2
    assert "iffers" not in one_scale
    assert "calibrated" not in one_scale

    calibrated = gun | {"probability": 0.4, "review_threshold": 0.3}
    put_rows(config, ["c"], labels=labels_of([[calibrated, knife]]))
    put_rows(config, ["d"], labels=labels_of([[gun]]))  # in whichever order they come
    facts = collect(Catalog.open(config), None)
    assert facts.labels["weapons/gun"].calibrated == {True, False}
    page = scores_section(facts)
    assert page.count("differs") == 1
    assert page.count("Differs: rows of the label have different thresholds") == 1
    assert "both probabilities and scores that are not calibrated, for the same reason: 1." in page
    assert (page.count("review from 0."), page.count("block from 0.90")) == (1, 2)


def test_what_was_flagged_before_the_run_is_not_newly_flagged(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["old", "turned", "same"], run="run-0", decision=["review", "allow", "allow"])
    put_rows(config, ["old", "turned", "same"], replace=True, decision=["block", "block", "allow"])
    catalog = Catalog.open(config)
    before = catalog.flagged_before("run-1")
    assert before is not None
    keys = to_words(to_binary(pa.array([image_id(name) for name in ("old", "turned", "same")])))
    assert (before.find(*keys) >= 0).tolist() == [True, False, False]
    assert collect(catalog, "run-1", flagged_before=before).new == [image_id("turned")]


def test_what_was_before_is_unknown_once_the_old_files_are_gone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["a"], run="run-0")
    old = list((Path(config.uri) / "images").glob("*/*.parquet"))
    put_rows(config, ["a"], replace=True, decision=["block"])
    for file in old:
        file.unlink()
    assert Catalog.open(config).flagged_before("run-1") is None
    assert Catalog.open(config).flagged_before("run-9") is None


def test_the_run_is_the_newest_that_wrote_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["a"])
    catalog = Catalog.open(config)
    assert find_run(catalog, None) is None
    put_record(config, "run-1")
    catalog.runs.start("run-2", {"operation": "vacuum"})
    catalog.runs.finish("run-2", {"operation": "vacuum"})
    found = find_run(catalog, None)
    assert found is not None
    assert found.run_id == "run-1"
    assert found.enrichment is not None
    asked = find_run(catalog, "run-2")
    assert asked is not None
    assert asked.enrichment is None


@pytest.mark.parametrize("run", ["run-9", "../images/_delta_log/0", "a/b", "", "x" * 500])
def test_a_run_that_is_not_there_is_said_with_those_that_are(tmp_path: Path, run: str) -> None:
    config = config_of(tmp_path)
    put_rows(config, ["a"])
    put_record(config, "run-1")
    with pytest.raises(ConfigError, match="no such run") as caught:
        find_run(Catalog.open(config), run)
    assert "run-1" in caught.value.remedy

"""Caption metrics against the COCO caption scorer, pycocoevalcap: generated corpora and hand-made ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tests.unit.evaluation.captions import EDGE_CASES, draw_caption, draw_corpus
from vlmflow.evaluation.metrics.captions import bleu, cider, cider_each, rouge_l
from vlmflow.evaluation.metrics.java import meteor_each, missing_for_meteor
from vlmflow.evaluation.metrics.ptb import tokenize

TOLERANCE = 1e-4
NUM_CORPORA = 600

needs_java = pytest.mark.skipif(missing_for_meteor() is not None, reason=str(missing_for_meteor()))


@pytest.fixture
def utf8_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer starts Java in the machine's encoding, which may be ASCII."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")


def corpora() -> list[tuple[list[str], list[list[str]]]]:
    rng = random.Random(8)
    return [*EDGE_CASES, *(draw_corpus(rng, rng.randint(1, 6)) for _ in range(NUM_CORPORA))]


def as_given(words: Sequence[str]) -> str:
    return " ".join(words)


def test_bleu_rouge_and_cider_equal_the_scorer() -> None:
    for number, (candidates, references) in enumerate(corpora()):
        words = [tokenize(one) for one in candidates]
        others = [[tokenize(one) for one in several] for several in references]
        said = {at: [as_given(one)] for at, one in enumerate(words)}
        truth = {at: [as_given(one) for one in several] for at, several in enumerate(others)}
        where = f"corpus {number}: {candidates} {references}"
        expected, _ = Bleu(4).compute_score(truth, said, verbose=0)
        assert bleu(words, others) == pytest.approx(expected, abs=TOLERANCE), where
        expected, _ = Rouge().compute_score(truth, said)
        assert rouge_l(words, others) == pytest.approx(float(expected), abs=TOLERANCE), where
        expected, each = Cider().compute_score(truth, said)
        assert cider(words, others) == pytest.approx(float(expected), abs=TOLERANCE), where
        assert cider_each(words, others) == pytest.approx(each.tolist(), abs=TOLERANCE), where


@needs_java
@pytest.mark.usefixtures("utf8_java")
def test_words_equal_those_of_the_scorers_tokeniser() -> None:
    rng = random.Random(9)
    captions = [draw_caption(rng) for _ in range(2_000)]
    captions += [one for candidates, _ in EDGE_CASES for one in candidates]
    captions = [" ".join(caption.split()) for caption in captions]
    given = {number: [{"caption": caption}] for number, caption in enumerate(captions)}
    expected: dict[int, list[str]] = PTBTokenizer().tokenize(given)
    others = [
        (caption, expected[number][0], as_given(tokenize(caption)))
        for number, caption in enumerate(captions)
        if expected[number][0] != as_given(tokenize(caption))
    ]
    # What is glued together by several signs at once may differ: "no. – 3", and the like.
    assert len(others) <= len(captions) // 200, others


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn't (very) big.", "a man 's dog is n't -lrb- very -rrb- big"),
        ("He said \"hello\" to the 'boss', at 7:30 p.m.!", "he said hello to the boss at 7:30 p.m."),
        ("A black-and-white photo: 50% off, $5 each", "a black-and-white photo 50 % off $ 5 each"),
        ("I cannot, they're gonna", "i can not they 're gon na"),
        ("“Quoted” – it’s… ½ a café 😀", "quoted it 's 1/2 a café"),
        ("Dr. Jones, the U.S. and St. Louis", "dr. jones the u.s. and st. louis"),
        ("", ""),
        ("  ?! ... ", "?!"),
    ],
)
def test_words_of_known_captions(caption: str, words: str) -> None:
    assert as_given(tokenize(caption)) == words


@needs_java
@pytest.mark.slow  # Java reads its table of paraphrases twice, half a minute each on a busy machine
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("utf8_java")
def test_meteor_equals_the_scorer() -> None:
    candidates, references = draw_corpus(random.Random(10), 500)
    for said, given in EDGE_CASES:
        candidates, references = [*candidates, *said], [*references, *given]
    said = [as_given(tokenize(one)) for one in candidates]
    truth = [[as_given(tokenize(one)) for one in several] for several in references]
    scorer = Meteor()
    expected, each = scorer.compute_score(dict(enumerate(truth)), {at: [one] for at, one in enumerate(said)})
    found, found_each = meteor_each(said, truth)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert found_each == pytest.approx(each, abs=TOLERANCE)
    assert 0.1 < found < 0.9

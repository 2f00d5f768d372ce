"""What the metrics cost at the size of the benchmarks: ``python -m benchmarks.evaluation``.

Generated captions, answers and vectors of COCO's and VQAv2's sizes; models and images take no part. Java's METEOR is
left out: it is its authors' program.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from random import Random
from typing import TypeVar

import numpy as np

from benchmarks.machine import save_result
from vlmflow.evaluation.metrics.captions import bleu, cider, rouge_l
from vlmflow.evaluation.metrics.meteor import meteor_2005
from vlmflow.evaluation.metrics.ptb import tokenize
from vlmflow.evaluation.metrics.retrieval import retrieval_recalls
from vlmflow.evaluation.metrics.vqa import vqa_accuracy

_IMAGES, _CAPTIONS, _DIM = 5_000, 5, 768
_QUESTIONS, _PEOPLE = 214_354, 10
_WORDS = "a man woman dog's cat sitting on the of table street with two red black-and-white bus, near an old T-shirt in"

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    done = work()
    return done, round(time.perf_counter() - start, 2)


def measure() -> dict[str, float]:
    """Seconds by what is measured, and the peak memory of the process in MiB."""
    rng, words = Random(0), _WORDS.split()
    captions = [[" ".join(rng.choices(words, k=10)) + "." for _ in range(_CAPTIONS + 1)] for _ in range(_IMAGES)]
    seconds: dict[str, float] = {}
    tokens, seconds["words of 30,000 captions"] = timed(lambda: [[tokenize(one) for one in few] for few in captions])
    candidates, references = [few[0] for few in tokens], [few[1:] for few in tokens]
    for name, metric in {"BLEU": bleu, "ROUGE-L": rouge_l, "CIDEr": cider, "METEOR-2005": meteor_2005}.items():
        _, seconds[f"{name}, 5,000 images"] = timed(lambda metric=metric: metric(candidates, references))  # type: ignore[misc]
    draw = np.random.default_rng(0)
    images = draw.standard_normal((_IMAGES, _DIM), np.float32)
    image_of = np.repeat(np.arange(_IMAGES), _CAPTIONS)
    texts = images[image_of] + draw.standard_normal((len(image_of), _DIM), np.float32)
    _, seconds["recalls, 5,000 x 25,000"] = timed(lambda: retrieval_recalls(images, texts, image_of))
    _, seconds["recalls, 5 folds of 1,000"] = timed(lambda: retrieval_recalls(images, texts, image_of, folds=5))
    given = [rng.choices(("yes", "no", "2", "a dog", "dogs."), k=_PEOPLE) for _ in range(1_000)]
    asked = [(rng.choice(few), few) for few in given for _ in range(_QUESTIONS // len(given) + 1)][:_QUESTIONS]
    _, seconds["accuracy of 214,354 answers"] = timed(lambda: [vqa_accuracy(said, few) for said, few in asked])
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return seconds | {"peak MiB": peak_mib}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = measure()
    for name, value in found.items():
        print(f"{name:32} {value:8.2f}")
    save_result("evaluation", {"seconds": found, "note": "one process, on a machine shared with other work"})


if __name__ == "__main__":
    main()

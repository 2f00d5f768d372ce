"""Images a second of all starter models on one CPU core: ``python -m benchmarks.starter.speed``.

Pixels are decoded already; embed, moderate, caption, and match (a title and the caption) run one after another,
through the same adapters as a job's. What counts is the processor's time, not the clock's, so that other work on the
machine takes little away.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from benchmarks.machine import add_results_option, save_result
from vlmflow.config import ModelConfig
from vlmflow.models import load_captioner, load_embedder, load_matcher
from vlmflow.moderation.policy import load_policy
from vlmflow.moderation.prompts import encode_prompts
from vlmflow.moderation.scoring import Scorer

_BATCH = 32
_REPEATS = 20
_MAX_TOKENS = 28


def measure(folder: Path, core: int) -> dict[str, float]:
    """Milliseconds an image by task, and images a second for all of them; the best of 20 batches of 32."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    embedder = load_embedder(ModelConfig(family="open_clip", path=str(folder / "clip")), "cpu")
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(folder / "captioner")), "cpu")
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(folder / "matcher")), "cpu")
    scorer = Scorer(encode_prompts(load_policy("demo"), embedder))
    pixels = torch.randint(0, 256, (_BATCH, 3, 64, 64), dtype=torch.uint8)
    best: dict[str, float] = {}
    for _ in range(_REPEATS):
        clock = [time.process_time()]
        vectors = embedder.embed_images(pixels)
        clock.append(time.process_time())
        scorer.score(vectors)
        clock.append(time.process_time())
        captions = captioner.caption(pixels, _MAX_TOKENS)
        clock.append(time.process_time())
        images = matcher.encode_images(pixels)
        matcher.match_itm(images, ["two apples on a blue background"] * _BATCH)
        matcher.match_itm(images, captions)
        clock.append(time.process_time())
        for name, start, end in zip(("embed", "moderate", "caption", "match"), clock, clock[1:], strict=False):
            best[name] = min(best.get(name, float("inf")), (end - start) / _BATCH * 1000)
    return {**{f"{name} ms": round(value, 2) for name, value in best.items()},
            "images/s": round(1000 / sum(best.values()), 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vlmflow/starter"))
    parser.add_argument("--core", type=int, default=0)
    add_results_option(parser)
    options = parser.parse_args()
    load_before = os.getloadavg()
    figures = measure(options.folder, options.core)
    for name, value in figures.items():
        print(f"{name:14} {value}")
    loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
    print(save_result("starter-speed", {**figures, "load_before_and_after": loads}, options.results))


if __name__ == "__main__":
    main()

"""The bars of the demo catalog, through the library's own decoding, models and policy."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vlmflow.config import ImageLimits, ModelConfig
from vlmflow.errors import ImageError
from vlmflow.imaging import DecodedImage, PixelRequest, decode
from vlmflow.imaging.pixels import VIEWS
from vlmflow.models import identify, load_captioner, load_embedder, load_matcher, pixel_request
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import find_binding, load_policy
from vlmflow.moderation.prompts import encode_prompts

_VIEWS = VIEWS
_BATCH = 32


@dataclass(frozen=True)
class Row:
    """A line of the manifest with what is true of it; ``image`` None: the file does not decode."""

    uri: str
    title: str
    is_title_wrong: bool
    must_flag: bool
    image: DecodedImage | None


class Demo:
    """The decoded catalog and the starter models."""

    def __init__(self, starter: Path, policy: str) -> None:
        self._starter, self._policy = starter, load_policy(policy)
        self._clip = ModelConfig(family="open_clip", path=str(starter / "clip"), repo="vlmflow/starter-clip")
        self._request = pixel_request("embed", self._clip, _VIEWS)
        self.rows = _read(starter / "demo", self._request)
        self.decoded = [row for row in self.rows if row.image is not None]

    def figures(self) -> dict[str, float]:
        decisions = np.array(self._decide())
        must = np.array([row.must_flag for row in self.decoded])
        flagged = decisions != "allow"
        scores, wrong = self._match(), np.array([row.is_title_wrong for row in self.decoded])
        return {
            "images": len(self.rows),
            "images that decode": len(self.decoded),
            "must be flagged": int(must.sum()),
            "flagged of those": float(flagged[must].mean()),
            "blocked of those": float((decisions[must] == "block").mean()),
            "flagged of the others": float(flagged[~must].mean()),
            "wrong titles": int(wrong.sum()),
            "wrong titles below the median right one": float((scores[wrong] < np.median(scores[~wrong])).mean()),
            "wrong titles below 0.5": float((scores[wrong] < 0.5).mean()),
            "right titles below 0.5": float((scores[~wrong] < 0.5).mean()),
        }

    def _decide(self) -> list[str]:
        embedder = load_embedder(self._clip, "cpu")
        binding = find_binding(self._policy, identify("embed", self._clip))
        moderator = Moderator(self._policy, binding, encode_prompts(self._policy, embedder))
        views = [view for row in self.decoded for view in self._views(row)]
        vectors = [embedder.embed_images(_stack([pixels])) for _, pixels in views]
        counts = [len(self._views(row)) for row in self.decoded]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        result = moderator.moderate(np.concatenate(vectors), [name for name, _ in views], offsets)
        return [str(decision) for decision in result.decision.to_pylist()]

    def _match(self) -> npt.NDArray[np.float32]:
        matcher = load_matcher(ModelConfig(family="blip_itm", path=str(self._starter / "matcher")), "cpu")
        parts = []
        for start in range(0, len(self.decoded), _BATCH):
            rows = self.decoded[start : start + _BATCH]
            images = matcher.encode_images(_stack([self._views(row)[0][1] for row in rows]))
            parts.append(matcher.match_itm(images, [row.title for row in rows]))
        return np.concatenate(parts)

    def captions(self) -> list[tuple[str, str, str]]:
        """(file, title, caption) of every image that decodes, to look at."""
        captioner = load_captioner(ModelConfig(family="blip_caption", path=str(self._starter / "captioner")), "cpu")
        pixels = _stack([self._views(row)[0][1] for row in self.decoded])
        captions = [caption for part in pixels.split(_BATCH) for caption in captioner.caption(part, 28)]
        return [(row.uri, row.title, said) for row, said in zip(self.decoded, captions, strict=True)]

    def _views(self, row: Row) -> list[tuple[str, npt.NDArray[np.uint8]]]:
        assert row.image is not None
        return row.image.pixels[self._request.key]


def _read(folder: Path, request: PixelRequest) -> list[Row]:
    with (folder / "truth.csv").open(encoding="utf-8") as file:
        truth = {line["id"]: line for line in csv.DictReader(file)}
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = []
    for line in lines:
        known = truth[line["id"]]
        image = _decode((folder / line["uri"]).read_bytes(), request)
        flags = (known["is_title_wrong"] == "true", known["must_flag"] == "true")
        rows.append(Row(line["uri"], line["title"], *flags, image))
    return rows


def _decode(data: bytes, request: PixelRequest) -> DecodedImage | None:
    try:
        return decode(data, [request], ImageLimits())
    except ImageError:
        return None


def _stack(pixels: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """(N, 3, side, side) uint8."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

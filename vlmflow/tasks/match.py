"""How well the generated caption and the caller's text fit the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmflow.imaging import PixelRequest
from vlmflow.models import EncodedImages, Matcher
from vlmflow.tasks import Columns
from vlmflow.tasks.shown import shown, shown_column

_SCORES = ("caption_itm", "caption_itc", "text_itm", "text_itc")


class MatchTask:
    """Scores both texts with both heads; the vision tower runs once per image.

    Reads ``caption``, where a run has written one, else ``previous_caption``. A row without the one text or the
    other has null scores for it; all rows have null scores of a head that the model lacks.
    """

    name = "match"
    writes = pa.schema([(name, pa.float32()) for name in _SCORES])

    def __init__(self, matcher: Matcher, request: PixelRequest | None) -> None:
        self._matcher = matcher
        self._request = request
        self.reads: tuple[str, ...] = (shown_column(request), "previous_caption", "text")

    def __call__(self, batch: pa.Table) -> Columns:
        """Probabilities (itm) and cosines (itc).

        Raises:
            ValueError: the model gave something other than a finite score for each pair, or not as many images as rows.
        """
        images = self._matcher.encode_images(shown(batch, self._request))
        if len(images) != batch.num_rows:
            raise ValueError(f"the model gave {len(images)} encoded images of {batch.num_rows}")
        captions = batch["previous_caption"].to_pylist()
        if "caption" in batch.column_names:
            written = batch["caption"].to_pylist()
            captions = [new if new is not None else old for new, old in zip(written, captions, strict=True)]
        caption_itm, caption_itc = self._score(images, captions)
        text_itm, text_itc = self._score(images, batch["text"].to_pylist())
        scores = (caption_itm, caption_itc, text_itm, text_itc)
        return {
            name: pa.array(values, pa.float32(), from_pandas=True) for name, values in zip(_SCORES, scores, strict=True)
        }

    def _score(
        self, images: EncodedImages, texts: Sequence[str | None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scores of the rows that have a text; not a number for the others."""
        itm = np.full(len(texts), np.nan, np.float32)
        itc = itm.copy()
        rows = [row for row, text in enumerate(texts) if text and not text.isspace()]
        if rows:
            paired = images if len(rows) == len(images) else images.take(rows)
            wanted = [text for text in texts if text and not text.isspace()]
            for values, found in (
                (itm, self._matcher.match_itm(paired, wanted)),
                (itc, self._matcher.match_itc(paired, wanted)),
            ):
                if found is None:
                    continue
                if np.shape(found) != (len(rows),):  # one score for all pairs would be taken for that of each
                    raise ValueError(f"the model gave scores of shape {np.shape(found)} for {len(rows)} pairs")
                # Null means that there was no text or no head, so what is no number must not pass for it.
                if not np.isfinite(found).all():
                    raise ValueError("the model gave a score that is not finite")
                values[rows] = found
        return itm, itc

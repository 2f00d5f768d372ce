"""One sentence for each image."""

from __future__ import annotations

import pyarrow as pa

from vlmflow.imaging import PixelRequest
from vlmflow.models import Captioner, Metered
from vlmflow.tasks import Columns
from vlmflow.tasks.pixels import first_views, pixel_columns


class CaptionTask:
    """Describes the whole image."""

    name = "caption"
    writes = pa.schema([("caption", pa.string())])

    def __init__(self, captioner: Captioner, request: PixelRequest, max_tokens: int, num_beams: int = 1) -> None:
        self._captioner = captioner
        self.meter = captioner if isinstance(captioner, Metered) else None
        # That several threads may have it at, where the device computes beside this process. Beams take long and much
        # memory, and a batch that waits for another's is taken to hang the sooner.
        self.batches_at_once: int = getattr(captioner, "batches_at_once", 1) if num_beams == 1 else 1
        self._request = request
        self._max_tokens, self._num_beams = max_tokens, num_beams
        self.reads: tuple[str, ...] = (pixel_columns(request)[0],)

    def __call__(self, batch: pa.Table) -> Columns:
        """The captions, as the model words them.

        Raises:
            ValueError: the model gave something other than a text for each image.
        """
        pixels = first_views(batch, self._request)
        captions = self._captioner.caption(pixels, self._max_tokens, self._num_beams)
        # Null would pass for an image that has no caption yet, and a text is a sequence of texts.
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("the model gave captions that are no list of texts")
        if len(captions) != len(pixels):
            raise ValueError(f"the model gave {len(captions)} captions of {len(pixels)} images")
        return {"caption": pa.array(captions, pa.string())}

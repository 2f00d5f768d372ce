"""An embedder of one's own family as the rest of vlmflow sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmflow.families import told_of
from vlmflow.models.unit import check_unit

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vlmflow.models import ImageEmbedder


class OwnEmbedder:
    """Tells of what the class does wrong with texts, on which all images of a policy or a query hang.

    What it does wrong with an image costs the row of this image, and is told of there.

    Args:
        name: of the family.
    """

    def __init__(self, name: str, embedder: ImageEmbedder) -> None:
        self._name, self._embedder = name, embedder
        self.dim = embedder.dim

    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """What the class gives of (N, 3, S, S) uint8 RGB."""
        return self._embedder.embed_images(pixels)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors.

        Raises:
            FamilyError: the class raises, or gives anything else.
        """
        with told_of(self._name, "embed_texts"):
            vectors = self._embedder.embed_texts(texts)
            check_unit(vectors, (len(texts), self.dim))
        return vectors

"""What is looked for, made into a vector of the catalog's own space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.config import CatalogConfig, ImageLimits, Job
from vlmflow.errors import ConfigError, ImageError
from vlmflow.families import told_of
from vlmflow.imaging import DecodedImage, PixelRequest, decode
from vlmflow.models import ImageEmbedder, load_embedder
from vlmflow.search.live import VIEW
from vlmflow.tasks.setup import check_unchanged, prepare_tasks

_MAX_QUERY_CHARS = 20_000  # far beyond what any text tower looks at
_OTHER_IMAGE = "Name another: a whole image, in a format that is read."


@dataclass(frozen=True)
class Query:
    """What to look for: one of a text, an image, and an image of the catalog.

    Attributes:
        image: a file, or the bytes of one.
        like: the uri of an image of the catalog; its stored vector is taken and no model loaded.
    """

    text: str | None = None
    image: str | Path | bytes | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("text", "image", "like") if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "nothing"
            raise ConfigError(f"the query names {named}", remedy="Give a text, --image or --like, one of them.")
        if self.text is not None and not self.text.strip():
            raise ConfigError("the text to look for is empty", remedy="Say what the image should show.")

    def __str__(self) -> str:
        if isinstance(self.image, bytes):
            return f"{len(self.image):,} bytes"
        return str(self.text or self.image or self.like)


def search_job(catalog: CatalogConfig, profile: str) -> Job:
    """A job of which only profile and catalog count: nothing is listed and nothing written."""
    return Job.model_validate(
        {
            "source": {"uri": ".", "storage": catalog.storage.model_dump()},
            "catalog": catalog.model_dump(),
            "profile": profile,
            "tasks": ["embed"],
        }
    )


class QueryEncoder:
    """Embeds texts and images as the catalog's images were; loads the model at its first query, on the CPU.

    Args:
        job: profile, models and limits count.

    Raises:
        WeightsError: the embedder's weights are absent or do not fit.
        ConfigError: the profile is unknown.
    """

    def __init__(self, job: Job) -> None:
        setup = prepare_tasks(job.model_copy(update={"tasks": ("embed",), "policy": None}))
        self._setup, self._config = setup, setup.models["embed"]
        self._request = replace(setup.requests["embed"], views=(VIEW,))
        self._limits = job.limits
        self._embedder: ImageEmbedder | None = None
        self.model = setup.identities["embed"].id
        self.fingerprints = setup.embed_fingerprints()

    def encode(self, query: Query) -> NDArray[np.float32]:
        """(D,) of unit length, for a query with a text or an image.

        Raises:
            ImageError: the image cannot be decoded, or exceeds the limits.
            ConfigError: the image file cannot be read.
            WeightsError: the weights do not fit, or are others than when this was made.
            ModelMemoryError: there is no memory left for the model.
            FamilyError: the embedder is of one's own family, and fails.
        """
        if self._embedder is None:
            embedder = load_embedder(self._config, "cpu")
            check_unchanged(self._setup)
            self._embedder = embedder
        vector: NDArray[np.float32]
        if query.text is not None:
            vector = self._embedder.embed_texts([_readable(query.text)])[0]
        else:
            assert query.image is not None
            pixels = decode_image(query.image, [self._request], self._limits).pixels
            ((_, first),) = pixels[self._request.key]
            batch = torch.from_numpy(np.array(first)).permute(2, 0, 1)[None]
            with told_of(self._config.family, "embed_images"):
                vector = self._embedder.embed_images(batch)[0]
        if not np.isfinite(vector).all():
            raise ConfigError("the model gave a vector that is not finite", remedy="Check the weights.")
        return vector


def _readable(text: str) -> str:
    """What a tokenizer can read: not too long, and without lone surrogates, which a command line may hold."""
    return text[:_MAX_QUERY_CHARS].encode("utf-8", "replace").decode("utf-8")


def decode_image(image: str | Path | bytes, requests: Sequence[PixelRequest], limits: ImageLimits) -> DecodedImage:
    """An image that somebody names or hands over, decoded.

    Raises:
        ImageError: it cannot be decoded, or exceeds the limits; a file is named.
        ConfigError: the file cannot be read.
    """
    data = read_image(image, limits)
    try:
        return decode(data, requests, limits)
    except ImageError as error:
        if isinstance(image, bytes):
            raise
        remedy = error.remedy or _OTHER_IMAGE
        raise ImageError(f"image {image}: {error}", error_class=error.error_class, remedy=remedy) from error


def read_image(image: str | Path | bytes, limits: ImageLimits) -> bytes:
    """The bytes of an image; of a file never more than a little beyond the limit, which decoding then refuses.

    Raises:
        ConfigError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        with Path(image).open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"image {image}: {error.strerror or error}", remedy="Name an image file.") from error

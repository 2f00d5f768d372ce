"""Bytes to uint8 pixels, safely: caps are checked on the header, an image is decoded once for all models."""

from vlmflow.imaging.decode import (
    DECODER_VERSION,
    DecodedImage,
    PixelRequest,
    decode,
    merge_requests,
    perceptual_hash,
)
from vlmflow.imaging.opening import ImageFacts, hash_of, inspect

__all__ = [
    "DECODER_VERSION",
    "DecodedImage",
    "ImageFacts",
    "PixelRequest",
    "decode",
    "hash_of",
    "inspect",
    "merge_requests",
    "perceptual_hash",
]

"""What a file that is made to mislead a decoder may end in."""

from __future__ import annotations

from vlmflow.errors import RowErrorClass

CORRUPT, TRUNCATED = RowErrorClass.CORRUPT, RowErrorClass.TRUNCATED
TOO_MANY_PIXELS, NOT_AN_IMAGE = RowErrorClass.TOO_MANY_PIXELS, RowErrorClass.NOT_AN_IMAGE
UNSUPPORTED = RowErrorClass.UNSUPPORTED_FORMAT
DECODES = None  # what a case expects instead of a class

Expected = tuple[RowErrorClass | None, ...]
Trick = tuple[bytes, Expected]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def patched(data: bytes, at: int, new: bytes) -> bytes:
    assert 0 <= at <= len(data) - len(new)
    return data[:at] + new + data[at + len(new) :]

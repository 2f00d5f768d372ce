"""What a text is to the model: the numbers that the multi-task checkpoints were trained with, one a data set."""

from __future__ import annotations

QUESTION = 1  # VQA
RETRIEVAL = 8  # Flickr30k: does the caption belong to the image?
REFERENCE = 9  # RefCOCO: which region does the phrase mean?

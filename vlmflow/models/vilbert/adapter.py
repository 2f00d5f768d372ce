"""ViLBERT as a matcher, as an answerer, and to find what a phrase means.

Wherever it takes pixels, it takes regions too: those of a model whose folder says that they are columns of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import Answer, EncodedImages
from vlmflow.models.pixels import model_dtype
from vlmflow.models.vilbert.layers import Stream
from vlmflow.models.vilbert.load import Parts, load_parts, read_answers
from vlmflow.models.vilbert.model import Encoded, Text
from vlmflow.models.vilbert.regions import Regions, with_whole_image
from vlmflow.models.vilbert.tasks import QUESTION, REFERENCE, RETRIEVAL

"""BLIP's ordinary checkpoints, run by our own code: equal results, less time.

The modules of transformers hold the weights; attention, caches and decoding are ours. What is saved, and where:

* attention is fused, or done image by image, so that its scores never reach memory;
* on processors, weights are packed once for oneDNN, and images pass the vision tower a few at a time, so that what
  lies between two layers stays in the cache;
* cross-attention makes no keys and values of the images for a few tokens: those attend to the features themselves;
* the decoder writes its own keys and values into memory that is allocated once; on CUDA a step is one CUDA graph.
"""

from vlmflow.models.blip_fast.beams import decode_beams
from vlmflow.models.blip_fast.greedy import GreedyDecoder
from vlmflow.models.blip_fast.special import SpecialTokens
from vlmflow.models.blip_fast.text import TextTower
from vlmflow.models.blip_fast.vision import VisionTower

__all__ = ["GreedyDecoder", "SpecialTokens", "TextTower", "VisionTower", "decode_beams"]

"""ViLBERT: two streams with co-attention over words and image regions; see :mod:`vlmflow.models.vilbert.finders`.

What identifies a model and says what it is to be shown imports no torch.
"""

from vlmflow.models.vilbert.finders import region_preprocessing

__all__ = ["region_preprocessing"]

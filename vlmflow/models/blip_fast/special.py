"""The tokens that steer a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vlmflow.errors import WeightsError

_NAMES = ("bos_token_id", "sep_token_id", "pad_token_id")  # as BLIP's configurations have them


@dataclass(frozen=True)
class SpecialTokens:
    """Where a caption begins and ends, and what follows its end in a batch."""

    begin: int
    end: int
    pad: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Those of a model's text part.

        Raises:
            WeightsError: one is missing, or no word of the model's.
        """
        for name in _NAMES:
            token = getattr(config, name, None)
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise WeightsError(
                    f"weights: config.json: text_config.{name} is {token}, which is none of the model's "
                    f"{config.vocab_size} tokens",
                    remedy="Set it as the published configuration does: 30522 (bos), 102 (sep) and 0 (pad) for BLIP.",
                )
        return cls(*(getattr(config, name) for name in _NAMES))

"""Settings of decoding that come with a model, and which of them an adapter must not pass over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from vlmflow.errors import WeightsError

# What a job says itself, what only sampling heeds, tokens that an adapter reads itself, and what changes no token.
_NEEDLESS = frozenset(
    {
        *("max_length", "max_new_tokens", "num_beams", "do_sample"),
        *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("use_cache", "cache_implementation", "cache_config", "low_memory", "compile_config", "disable_compile"),
        *("renormalize_logits", "remove_invalid_values"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_cache_len", "prefill_chunk_size", "transformers_version"),
    }
)
# Of these 1 means that nothing is done, of all others 0.
_FACTORS = frozenset(
    {
        *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale"),
        *("num_return_sequences", "num_beam_groups"),
    }
)
# What `generate` does to the logits, or in a choice between beams, without needing more than the settings.
STEPS = frozenset(
    {
        *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "early_stopping"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    }
)


def check_settings(folder: Path, settings: Any, honoured: frozenset[str] = frozenset()) -> None:
    """Refuses a model whose texts transformers would write otherwise, by settings that the adapter does not heed.

    Args:
        folder: of the model.
        settings: a ``GenerationConfig``, as transformers has it of the folder.
        honoured: names of those that the adapter heeds.

    Raises:
        WeightsError: names the settings.
    """
    # A file may hold what is none of transformers' settings, which that passes over too.
    heeded = vars(GenerationConfig()).keys() - _NEEDLESS - honoured
    found = {
        name: value
        for name, value in settings.to_diff_dict().items()
        if name in heeded and not name.startswith("_") and not _does_nothing(name, value)
    }
    if found:
        some = ", ".join(f"{name} {value!r:.40}" for name, value in sorted(found.items()))
        raise WeightsError(
            f"weights: {folder} sets how texts are decoded ({some}), and its family does not heed that",
            remedy=f"Remove {', '.join(sorted(found))} from config.json and generation_config.json; texts are then "
            "the most probable ones.",
        )


def _does_nothing(name: str, value: object) -> bool:
    return value is None or value == 1 if name in _FACTORS else not value

"""What models that take a prompt are asked."""

from __future__ import annotations

from vlmflow.config import ModelConfig
from vlmflow.errors import ConfigError
from vlmflow.families import family_of

QUESTION = "{question}"
_DEFAULTS = {
    "caption": "Describe this image in one sentence.",
    "answer": f"{QUESTION} Answer with one word or a short phrase.",
}


def prompt_of(role: str, config: ModelConfig) -> str | None:
    """The prompt of a model in a role; None: its family takes none.

    Raises:
        ConfigError: a prompt for questions has no place for them, or a family of one's own takes none.
    """
    if not family_of(config.family).takes_prompt:
        if config.prompt is not None:
            raise ConfigError(
                f"models.{role}.prompt: the family {config.family} takes none",
                remedy="Leave it out, or let the entry of the class say takes_prompt=True.",
            )
        return None
    prompt = config.prompt or _DEFAULTS[role]
    if (role == "answer") != (QUESTION in prompt):
        what = "has no" if role == "answer" else "has a"
        raise ConfigError(
            f"models.{role}.prompt {what} {QUESTION}",
            remedy="Only the prompt of `answer` holds it, where the question is to stand.",
        )
    return prompt

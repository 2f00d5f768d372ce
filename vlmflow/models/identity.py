"""What a model is, for the ledger: two runs whose identities agree compute the same columns."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

# Raised by hand, per family, when the adapter's outputs move for equal weights and pixels. A golden test compares
# outputs with those recorded for the version.
CODE_VERSIONS = {
    "open_clip": 1,
    "blip_caption": 1,
    "blip_itm": 1,
    "vilt": 1,
    "blip_vqa": 1,
    "vlm": 2,
    "vllm": 1,
    "endpoint": 1,
    "vilbert": 1,
    "opennsfw": 1,
    "image_classification": 1,
    "vlm_judge": 2,
    "blip2_caption": 1,
    "blip2_itm": 1,
    "git": 1,
    "flava": 1,
    "align": 1,
}


@dataclass(frozen=True)
class ModelIdentity:
    """A model as rows remember it: never the device, the dtype, or the path it was loaded from."""

    id: str  # the hub repository, or the name of the folder
    revision: str  # commit hash of the hub, or "local"
    weights_digest: str  # SHA-256 of the weights, configuration and tokenizer files
    preprocessing: str  # logical: size, interpolation, mean, std
    code_version: int  # of the adapter

    def fingerprint(self, task: str) -> str:
        """A short digest of all of it and of the task."""
        return short_digest({"task": task, "model": asdict(self)})


def short_digest(content: object) -> str:
    """32 hexadecimal digits of the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]

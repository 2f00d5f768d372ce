"""What a model is, for the ledger: two runs whose identities agree compute the same columns."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """A model as rows remember it: never the device, the dtype, or the path it was loaded from."""

    id: str  # the hub repository, or the name of the folder; of one's own family with the class: module:Class(folder)
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

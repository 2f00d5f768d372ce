"""Vectors of prompts that a cluster keeps from one dry run to the next.

The partitions of a backfill are processes of their own where they are submitted to a cluster, and dry runs archive
nothing: each would load the text model again. The cluster's store of keys and values keeps one policy's for each model,
some hundred kilobytes, as long as it lives.
"""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from vlmflow.engine.archive import prompts_name, read_vectors
from vlmflow.engine.faults import told
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import Policy
from vlmflow.moderation.prompts import PromptVectors

_PREFIX = "vlmflow-dry-1-"  # of this form of entries


@told()
def handed_on(policy: Policy, identity: ModelIdentity) -> PromptVectors | None:
    """Vectors of these prompts by this model that a dry run before has left; None: none can be read."""
    data = _internal_kv_get(_PREFIX + prompts_name(identity))
    return None if data is None else read_vectors(data, policy)


@told()
def hand_on(prompts: PromptVectors, identity: ModelIdentity) -> None:
    """Leaves vectors to the next dry run, in place of those of another policy."""
    _internal_kv_put(_PREFIX + prompts_name(identity), prompts.to_bytes())

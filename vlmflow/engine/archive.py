"""The policies that a catalog keeps: what a decision rested on can be read, and computed again, in a year."""

from __future__ import annotations

import itertools
import logging

import numpy as np

from vlmflow.catalog import Catalog
from vlmflow.errors import ConfigError, PolicyError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import Policy, prompts_digest
from vlmflow.moderation.prompts import PromptVectors

logger = logging.getLogger("vlmflow")

_POLICY = "policy.json"


def archive_policy(
    catalog: Catalog, policy: Policy, prompts: PromptVectors | None = None, identity: ModelIdentity | None = None
) -> None:
    """Keeps a policy under its digest, and the vectors of its prompts under the model that made them."""
    files = {_POLICY: policy.model_dump_json(indent=2).encode()}
    damaged: set[str] = set()
    if prompts is not None and identity is not None:
        name = _prompts_name(identity)
        files[name] = prompts.to_bytes()
        kept = catalog.policies.read(policy.digest, name)
        if kept is not None and _vectors(kept, policy) is None:
            damaged.add(name)
    catalog.policies.put(policy.digest, files, replaced=damaged)


def archived_policy(catalog: Catalog, digest: str) -> Policy:
    """A policy of the archive.

    Raises:
        CatalogError: none of this digest is archived.
    """
    return Policy.model_validate_json(catalog.policies.get(digest)[_POLICY], strict=False)


def archived_policies(catalog: Catalog) -> dict[str, Policy]:
    """All of them, by digest."""
    return {digest: archived_policy(catalog, digest) for digest in catalog.policies.digests()}


def archived_prompts(catalog: Catalog, policy: Policy, identity: ModelIdentity) -> PromptVectors | None:
    """Vectors of these prompts by this model, kept with any policy that has the same; None: none can be read."""
    name = _prompts_name(identity)
    others = (digest for digest in catalog.policies.digests() if digest != policy.digest)
    for digest in itertools.chain([policy.digest], others):
        data = catalog.policies.read(digest, name)
        vectors = None if data is None else _vectors(data, policy)
        if vectors is not None:
            return vectors
        if data is not None and digest == policy.digest:
            logger.warning("policy %s: its archived prompt vectors are damaged, and replaced", digest[:12])
    return None


def _vectors(data: bytes, policy: Policy) -> PromptVectors | None:
    """Vectors of the policy's prompts; None: of another's, or damaged, which must decide nothing."""
    try:
        vectors = PromptVectors.from_bytes(data)
    except PolicyError:
        return None
    counts = len(list(policy.each_label())), len(policy.neutral)
    fits = vectors.digest == prompts_digest(policy) and (len(vectors.labels), len(vectors.neutral)) == counts
    return vectors if fits and np.isfinite(vectors.labels).all() and np.isfinite(vectors.neutral).all() else None


def full_digest(catalog: Catalog, beginning: str) -> str:
    """The digest of the one archived policy that begins so.

    Raises:
        ConfigError: none does, or several do.
    """
    found = [digest for digest in catalog.policies.digests() if digest.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    state = "none" if not found else f"{len(found)}"
    raise ConfigError(
        f"{catalog.uri}: {state} of the archived policies begins with {beginning!r}",
        remedy="The column policy_digest of the images table holds the digests.",
    )


def _prompts_name(identity: ModelIdentity) -> str:
    # The first version's files have no number.
    version = "" if identity.code_version == 1 else f"-v{identity.code_version}"
    return f"prompts-{identity.weights_digest[:16]}{version}.safetensors"

"""The policies that a catalog keeps: what a decision rested on can be read, and computed again, in a year."""

from __future__ import annotations

import itertools
import logging

import numpy as np
from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.errors import CatalogError, ConfigError, PolicyError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import Policy, prompts_digest
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.threads import Threads

logger = logging.getLogger("vlmflow")

_POLICY = "policy.json"
_READ_AT_ONCE = 16  # files


def archive_policy(
    catalog: Catalog, policy: Policy, prompts: PromptVectors | None = None, identity: ModelIdentity | None = None
) -> None:
    """Keeps a policy under its digest, and the vectors of its prompts under the model that made them."""
    files = {_POLICY: policy.model_dump_json(indent=2).encode()}
    damaged: set[str] = set()
    kept = catalog.policies.read(policy.digest, _POLICY)
    if kept is not None and _policy(kept, policy.digest) is None:
        damaged.add(_POLICY)
    if prompts is not None and identity is not None:
        name = prompts_name(identity)
        files[name] = prompts.to_bytes()
        vectors = catalog.policies.read(policy.digest, name)
        if vectors is not None and read_vectors(vectors, policy) is None:
            damaged.add(name)
    catalog.policies.put(policy.digest, files, replaced=damaged)


def archived_policy(catalog: Catalog, digest: str) -> Policy:
    """A policy of the archive.

    Raises:
        CatalogError: none of this digest is archived, or what is there is damaged, or of a later version.
    """
    policy = _policy(catalog.policies.read(digest, _POLICY) or b"", digest)
    if policy is None:
        raise CatalogError(
            f"{catalog.uri}: the archived policy {digest} cannot be read",
            remedy=f"Put policies/{digest}/{_POLICY} back as it was, or use the version of vlmflow that wrote it.",
        )
    return policy


def archived_policies(catalog: Catalog) -> dict[str, Policy]:
    """All that can be read, by digest; of the others it is said that they are left out."""

    def read(digest: str) -> Policy | None:
        try:
            return archived_policy(catalog, digest)
        except CatalogError as error:
            logger.warning("%s: margins stored under it are not used", error)
            return None

    digests = catalog.policies.digests()
    with Threads(_READ_AT_ONCE) as pool:
        found = dict(zip(digests, pool.map(read, digests), strict=True))
    return {digest: policy for digest, policy in found.items() if policy is not None}


def _policy(data: bytes, digest: str) -> Policy | None:
    """The policy of this digest; None: another, or none at all, which must decide nothing."""
    try:
        policy = Policy.model_validate_json(data, strict=False)
    except ValidationError:
        return None
    return policy if policy.digest == digest else None


def archived_prompts(catalog: Catalog, policy: Policy, identity: ModelIdentity) -> PromptVectors | None:
    """Vectors of these prompts by this model, kept with any policy that has the same; None: none can be read."""
    name = prompts_name(identity)
    data = catalog.policies.read(policy.digest, name)
    vectors = None if data is None else read_vectors(data, policy)
    if vectors is not None:
        return vectors
    if data is not None:
        logger.warning("policy %s: its archived prompt vectors are damaged, and replaced", policy.digest[:12])
    others = (digest for digest in catalog.policies.digests() if digest != policy.digest)
    with Threads(_READ_AT_ONCE) as pool:
        while some := list(itertools.islice(others, _READ_AT_ONCE)):
            for data in pool.map(lambda digest: catalog.policies.read(digest, name), some):
                vectors = None if data is None else read_vectors(data, policy)
                if vectors is not None:
                    return vectors
    return None


def read_vectors(data: bytes, policy: Policy) -> PromptVectors | None:
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
        ConfigError: none does, or several do; or the beginning is empty, which says nothing even where there is one.
    """
    if not beginning.strip():
        remedy = "Give the beginning of one, as `vlmflow show` has it; a variable that is not set leaves it empty."
        raise ConfigError(f"{catalog.uri}: the digest of a policy is empty", remedy=remedy)
    found = [digest for digest in catalog.policies.digests() if digest.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    state = "none" if not found else f"{len(found)}"
    raise ConfigError(
        f"{catalog.uri}: {state} of the archived policies begins with {beginning!r}",
        remedy="`vlmflow show` names the policies of its rows, each with its digest.",
    )


def prompts_name(identity: ModelIdentity) -> str:
    """What vectors of prompts are kept under: by the model that made them."""
    # The first version's files have no number.
    version = "" if identity.code_version == 1 else f"-v{identity.code_version}"
    return f"prompts-{identity.weights_digest[:16]}{version}.safetensors"

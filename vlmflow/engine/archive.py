"""The policies that a catalog keeps: what a decision rested on can be read, and computed again, in a year."""

from __future__ import annotations

from vlmflow.catalog import Catalog
from vlmflow.errors import ConfigError
from vlmflow.moderation.policy import Policy, prompts_digest
from vlmflow.moderation.prompts import PromptVectors

_POLICY = "policy.json"


def archive_policy(catalog: Catalog, policy: Policy, prompts: PromptVectors | None, weights_digest: str) -> None:
    """Keeps a policy under its digest, and the vectors of its prompts under that of the model that made them."""
    files = {_POLICY: policy.model_dump_json(indent=2).encode()}
    if prompts is not None:
        files[_prompts_name(weights_digest)] = prompts.to_bytes()
    catalog.policies.put(policy.digest, files)


def archived_policy(catalog: Catalog, digest: str) -> Policy:
    """A policy of the archive.

    Raises:
        CatalogError: none of this digest is archived.
    """
    return Policy.model_validate_json(catalog.policies.get(digest)[_POLICY], strict=False)


def archived_policies(catalog: Catalog) -> dict[str, Policy]:
    """All of them, by digest."""
    return {digest: archived_policy(catalog, digest) for digest in catalog.policies.digests()}


def archived_prompts(catalog: Catalog, policy: Policy, weights_digest: str) -> PromptVectors | None:
    """Vectors of these prompts by this model, kept with any policy that has the same; None: there are none."""
    wanted = prompts_digest(policy)
    for digest, other in archived_policies(catalog).items():
        data = catalog.policies.get(digest).get(_prompts_name(weights_digest))
        if data is not None and prompts_digest(other) == wanted:
            return PromptVectors.from_bytes(data)
    return None


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


def _prompts_name(weights_digest: str) -> str:
    return f"prompts-{weights_digest[:16]}.safetensors"

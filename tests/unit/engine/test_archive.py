"""Prompt vectors that a catalog keeps: found by prompts and model, and nothing beside them stands in the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.catalog_samples import open_catalog
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.engine.archive import archive_policy, archived_policies, archived_policy, archived_prompts, full_digest
from vlmflow.errors import CatalogError, ConfigError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import Policy, load_policy, prompts_digest
from vlmflow.moderation.prompts import PromptVectors

MODEL = ModelIdentity("model", "local", "a" * 64, "squash 224", 1)


def vectors_of(policy: Policy) -> PromptVectors:
    random = np.random.default_rng(0)
    labels, neutral = (
        random.normal(size=(count, 4)).astype(np.float32)
        for count in (len(list(policy.each_label())), len(policy.neutral))
    )
    return PromptVectors(labels, neutral, policy.temperature, prompts_digest(policy))


@pytest.fixture
def policy() -> Policy:
    return load_policy("demo")


@pytest.fixture
def catalog(tmp_path: Path, policy: Policy) -> Catalog:
    catalog = open_catalog(tmp_path / "catalog")
    archive_policy(catalog, policy, vectors_of(policy), MODEL)
    return catalog


def next_version(policy: Policy) -> Policy:
    """With the same prompts."""
    return Policy.model_validate(policy.model_dump() | {"version": policy.version + "-next"})


def is_found(catalog: Catalog, policy: Policy) -> bool:
    found = archived_prompts(catalog, policy, MODEL)
    return found is not None and np.array_equal(found.labels, vectors_of(policy).labels)


def test_vectors_are_those_of_the_prompts_and_the_model_whatever_the_thresholds(
    catalog: Catalog, policy: Policy
) -> None:
    assert is_found(catalog, policy)
    renamed = next_version(policy)
    assert renamed.digest != policy.digest
    assert is_found(catalog, renamed)
    assert archived_prompts(catalog, load_policy("marketplace"), MODEL) is None
    for other in ({"weights_digest": "b" * 64}, {"code_version": 2}):
        assert archived_prompts(catalog, policy, dataclasses.replace(MODEL, **other)) is None


def test_what_else_lies_there_is_in_nobodys_way(catalog: Catalog, policy: Policy, tmp_path: Path) -> None:
    folder = tmp_path / "catalog" / "policies"
    (folder / ".DS_Store").write_bytes(b"x")
    for name, text in (("0" * 64, "{"), ("1" * 64, '{"from": "a later version"}')):
        (folder / name).mkdir()
        (folder / name / "policy.json").write_text(text)
    (folder / ("2" * 64)).mkdir()
    (folder / ("2" * 64) / f"prompts-{'a' * 16}.safetensors").write_bytes(b"cut")
    renamed = next_version(policy)
    assert is_found(catalog, policy)
    assert is_found(catalog, renamed)
    assert archived_prompts(catalog, load_policy("marketplace"), MODEL) is None


def cut(vectors: PromptVectors) -> bytes:
    return vectors.to_bytes()[:100]


def without_a_label(vectors: PromptVectors) -> bytes:
    return dataclasses.replace(vectors, labels=vectors.labels[1:]).to_bytes()


def not_a_number(vectors: PromptVectors) -> bytes:
    return dataclasses.replace(vectors, neutral=vectors.neutral * np.float32(np.nan)).to_bytes()


@pytest.mark.parametrize("damage", [cut, without_a_label, not_a_number])
def test_damaged_vectors_are_told_of_and_replaced(
    catalog: Catalog,
    policy: Policy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[PromptVectors], bytes],
) -> None:
    (path,) = (tmp_path / "catalog" / "policies").rglob("*.safetensors")
    path.write_bytes(damage(vectors_of(policy)))
    assert archived_prompts(catalog, policy, MODEL) is None
    assert f"policy {policy.digest[:12]}: its archived prompt vectors are damaged" in caplog.text
    archive_policy(catalog, policy, vectors_of(policy), MODEL)
    assert is_found(catalog, policy)

    whole = path.read_bytes()
    archive_policy(catalog, policy, dataclasses.replace(vectors_of(policy), temperature=0.5), MODEL)
    assert path.read_bytes() == whole, "what can be read is never changed"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"from": "a later version"}', None], ids=str)
def test_a_policy_that_cannot_be_read_is_named_and_the_others_count(
    catalog: Catalog, policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes | None
) -> None:
    other = next_version(policy)
    archive_policy(catalog, other, vectors_of(other), MODEL)
    path = tmp_path / "catalog" / "policies" / other.digest / "policy.json"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(CatalogError, match=f"the archived policy {other.digest} cannot be read") as caught:
        archived_policy(catalog, other.digest)
    assert "policy.json" in caught.value.remedy
    assert archived_policies(catalog) == {policy.digest: policy}
    assert f"the archived policy {other.digest} cannot be read: margins stored under it are not used" in caplog.text
    archive_policy(catalog, other)
    assert archived_policy(catalog, other.digest) == other, "whoever has it puts it back"


def test_a_policy_under_the_digest_of_another_decides_nothing(catalog: Catalog, policy: Policy, tmp_path: Path) -> None:
    folder = tmp_path / "catalog" / "policies"
    (folder / ("3" * 64)).mkdir()
    (folder / ("3" * 64) / "policy.json").write_bytes((folder / policy.digest / "policy.json").read_bytes())
    with pytest.raises(CatalogError, match="cannot be read"):
        archived_policy(catalog, "3" * 64)


def test_an_empty_digest_names_no_policy_even_where_there_is_one(catalog: Catalog, policy: Policy) -> None:
    assert full_digest(catalog, policy.digest[:12]) == policy.digest
    for beginning in ("", " "):
        with pytest.raises(ConfigError, match="the digest of a policy is empty"):
            full_digest(catalog, beginning)


def test_of_many_policies_no_vectors_are_read(
    catalog: Catalog, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are large, and a catalog of years keeps hundreds."""
    renamed = next_version(policy)
    archive_policy(catalog, renamed, vectors_of(renamed), MODEL)
    original, asked = Folder.read, []

    def noted(self: Folder, path: str) -> bytes | None:
        asked.append(path.rpartition("/")[2])
        return original(self, path)

    monkeypatch.setattr(Folder, "read", noted)
    assert len(archived_policies(catalog)) == 2
    assert asked == ["policy.json"] * 2

"""Thresholds for a catalog's model from people's verdicts: ``vlmflow calibrate`` as a function. Needs no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import index_of, to_binary
from vlmflow.config import Job
from vlmflow.errors import CalibrationError, PolicyError
from vlmflow.moderation.calibrate import CalibrationReport, Targets, calibrate_labels
from vlmflow.moderation.policy import POLICY_SUFFIXES, find_binding, next_version, shipped_policies, write_version
from vlmflow.moderation.scoring import Scorer
from vlmflow.moderation.verdicts import (
    IMAGE_COLUMNS,
    VECTOR_COLUMNS,
    match_verdicts,
    read_verdicts,
    reviewed,
    worst_margins,
)
from vlmflow.paths import is_there
from vlmflow.tasks.setup import prepare_prompts, prepare_tasks


def calibrate(
    job: Job,
    verdicts: str | Path | None,
    *,
    output: str | Path | None = None,
    targets: Targets | None = None,
    accept_uncalibrated: bool = False,
    seed: int = 0,
) -> CalibrationReport:
    """Fits the labels of the job's policy to verdicts on images of its catalog, and writes the policy's next version.

    Margins are computed from the stored embeddings; no image is read, and the catalog is not changed.

    Args:
        job: catalog, profile and policy count; its source is not read.
        verdicts: Parquet or CSV: image_id or uri, label, value; weight and content_hash if there are any. None: those
            on labels that `review import` has brought into the catalog.
        output: the new policy file; None: ``NAME-vVERSION.yaml`` beside the old one, or, of a policy that ships,
            in the current folder.
        targets: precision to block at, and recall to review at.
        accept_uncalibrated: of a policy without thresholds for the model, labels without verdicts keep the policy's.
        seed: of the bootstrap.

    Raises:
        ConfigError: the job names no policy, or an unknown profile.
        CalibrationError: verdicts that cannot be used or do not suffice, or embeddings of another model.
        PolicyError: the policy cannot be used, or the output is no YAML file by its name, or is there already.
        CatalogError: there is no catalog.
        WeightsError: the embedder's weights are absent or do not fit.
    """
    job = job.model_copy(update={"tasks": ("embed", "moderate"), "accept_unbound": True})
    setup = prepare_tasks(job)
    policy = setup.policy
    assert policy is not None
    assert job.policy is not None
    source = shipped_policies().get(job.policy, Path(job.policy))
    identity, fingerprint = setup.identities["embed"], setup.fingerprints(("embed",))["embed"]
    if output is None:
        folder = Path() if job.policy in shipped_policies() else source.parent
        output = folder / f"{policy.name}-v{next_version(policy.version)}.yaml"
    output = _new_file(Path(output))  # before all else: it would be in vain
    catalog = Catalog.open(job.catalog)
    labels = tuple(ref.label for ref in policy.labels)
    source_name = str(verdicts) if verdicts is not None else f"reviews of {catalog.uri}"
    given = read_verdicts(Path(verdicts)) if verdicts is not None else reviewed(catalog.reviews.events())
    matched = match_verdicts(given, catalog.image_batches(IMAGE_COLUMNS), labels)
    if not matched.ids:
        reasons = (
            ", ".join(f"{reason}: {num}" for reason, num in matched.left_out.items()) or "none has a label and a value"
        )
        raise CalibrationError(f"{source_name}: no verdict counts ({reasons})", remedy="Label images of this catalog.")
    prompts = prepare_prompts(setup)
    assert prompts is not None
    vectors = catalog.embedding_batches(VECTOR_COLUMNS, of=index_of(to_binary(pa.array(matched.ids, pa.string()))))
    margins = worst_margins(matched.ids, vectors, fingerprint, Scorer(prompts), len(labels))
    before = find_binding(policy, identity)
    done = calibrate_labels(
        policy,
        identity,
        before,
        matched,
        margins,
        targets or Targets(),
        accept_uncalibrated=accept_uncalibrated,
        seed=seed,
    )
    unscored = int(((matched.values >= 0) & ~np.isfinite(margins)).sum())
    written = write_version(source, output, done.binding)
    return CalibrationReport(
        catalog=job.catalog.uri,
        verdicts=source_name,
        policy=policy.full_name,
        new_policy=written.full_name,
        output=str(output),
        model=identity.id,
        num_images=len(matched.ids),
        num_verdicts=int((matched.values >= 0).sum()) - unscored,
        left_out=dict(matched.left_out) | ({"image has no vector of this model": unscored} if unscored else {}),
        is_weighted=matched.is_weighted,
        labels=tuple(done.labels),
        warnings=tuple(done.warnings),
    )


def _new_file(output: Path) -> Path:
    if output.suffix not in POLICY_SUFFIXES:
        remedy = "End its name with .yaml: no policy is read from another file."
        raise PolicyError(f"policy {output}: neither {' nor '.join(POLICY_SUFFIXES)}", remedy=remedy)
    if is_there(output):
        raise PolicyError(f"policy {output}: is there already", remedy="Name another file with --output.")
    return output

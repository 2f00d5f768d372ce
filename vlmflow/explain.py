"""Why an image was decided as it was: the evidence in its row, and on request a map of the regions that count."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.read import images_named
from vlmflow.config import CatalogConfig, Frozen, Job
from vlmflow.errors import ExplainError, ImageError, StoreLostError
from vlmflow.files import put_file
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.frames import split_views
from vlmflow.moderation.detections import name_of
from vlmflow.search.thumbnails import why_lost
from vlmflow.sources import normalise_uri
from vlmflow.sources.again import RowReader
from vlmflow.sources.uris import spelled

if TYPE_CHECKING:
    from vlmflow.models.detectors import DetectorSetup

EVIDENCE_COLUMNS = (
    "image_id",
    "uri",
    "object_version",
    "content_hash",
    "status",
    "errors",
    "decision",
    "decision_reason",
    "verdict",
    "labels",
    "detections",
    "policy_name",
    "policy_version",
    "policy_digest",
    "embed_model",
    schema.fingerprint_column("embed"),
    "caption",
    "run_id",
    "updated_at",
)


_MAP_SIDE = 448


class Evidence(Frozen):
    """What a decision rests on.

    Attributes:
        labels: as in the images table, the gravest first.
        detections: scores of the policy's detectors, as in the images table.
        verdict: of a person or of a list of known images; None: there is none.
        policy: name, version and the beginning of the digest; None: it was never moderated.
    """

    image_id: str
    uri: str
    object_version: str | None
    content_hash: str | None
    status: str
    errors: tuple[dict[str, Any], ...]
    decision: str
    decision_reason: str | None
    verdict: dict[str, Any] | None
    labels: tuple[dict[str, Any], ...]
    detections: tuple[dict[str, Any], ...]
    policy: str | None
    policy_digest: str | None
    embed_model: str | None
    embed_fingerprint: str | None
    caption: str | None
    run_id: str
    updated_at: str

    @property
    def by_model(self) -> tuple[str, str | None]:
        """Decision and reason as they would be without a verdict."""
        said = self.verdict
        return (self.decision, self.decision_reason) if said is None else (said["model_decision"], said["model_reason"])


def find_evidence(config: CatalogConfig, image: str) -> Evidence:
    """Reads what a decision rests on.

    Args:
        image: an image_id, or a uri.

    Raises:
        ExplainError: the catalog holds no such image, or several of this uri.
        CatalogError: there is no catalog.
    """
    image = spelled(image)
    names = pa.array(sorted({image, _normalised(image)}))
    rows = images_named(Folder(config), Catalog.open(config).newest_images, names, EVIDENCE_COLUMNS).to_pylist()
    if len(rows) != 1:
        found = "no image" if not rows else f"{len(rows)} images"
        raise ExplainError(
            f"{config.uri}: {found} {image}", remedy="Give the image_id, or the uri as the catalog has it."
        )
    return evidence_of(rows[0])


def evidence_of(row: dict[str, Any]) -> Evidence:
    """What a decision rests on, of a row with :data:`EVIDENCE_COLUMNS`."""
    order = ("allow", "review", "block")
    labels = sorted(row["labels"] or [], key=lambda label: (-order.index(label["decision"]), -_value(label)))
    digest = row["policy_digest"]
    policy = None if digest is None else f"{row['policy_name']} {row['policy_version']} ({digest[:12]})"
    return Evidence(
        **{name: row[name] for name in Evidence.model_fields if name in row}
        | {name: tuple(row[name] or ()) for name in ("errors", "detections")}
        | {"updated_at": str(row["updated_at"]), "labels": tuple(labels), "policy": policy},
    )


def write_heatmap(
    job: Job, evidence: Evidence, output: Path, *, label: str | None = None, show_flagged: bool = False
) -> dict[str, Any]:
    """Draws a map into a file; see :func:`draw_heatmap`.

    Args:
        output: a .png file.

    Returns:
        The label, as it stands in the row.

    Raises:
        ExplainError: there can be no map, or the file is no .png file, or cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise ExplainError(f"{output}: a map is written as PNG", remedy="Name a file that ends in .png.")
    chosen, picture = draw_heatmap(job, evidence, label=label, show_flagged=show_flagged)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    try:
        put_file(output, encoded.getvalue())
    except OSError as error:
        raise ExplainError(f"{output}: {error.strerror or error}", remedy="Name another file.") from error
    return chosen


def draw_heatmap(
    job: Job, evidence: Evidence, *, label: str | None = None, show_flagged: bool = False
) -> tuple[dict[str, Any], Image.Image]:
    """Reads an image again and draws which of its regions raise a label's score, on the view that decided.

    The picture underneath is blurred where the image is not allowed, unless ``show_flagged``.

    Args:
        job: profile and catalog count; the policy is the one that the row was moderated under.
        label: as its prompts scored it, or ``label (detector)``, with or without its category before a slash; None:
            the one that decided, else the highest.

    Returns:
        The label, as it stands in the row, and the picture.

    Raises:
        ExplainError: the row has no such label, the image cannot be read or has changed, or the model is another one.
        StoreLostError: the store or the disk of the image is out of reach.
    """
    from vlmflow.moderation.heatmap import draw, occlusion_map

    chosen = _chosen(evidence, label)
    request, score = _scorer(job, evidence, chosen)
    data = _read(job, evidence)
    try:
        views = decode(data, [request], job.limits).pixels[request.key]
    except ImageError as error:
        raise ExplainError(f"{evidence.uri}: {error}", remedy="Only images that decode can be explained.") from error
    names = split_views(pa.array([name for name, _ in views], pa.string()))[0].to_pylist()
    if chosen["view"] not in names:
        raise ExplainError(
            f"{evidence.uri}: it has no view {chosen['view']} now (it has {', '.join(names)})",
            remedy="Enrich it again: it was decided with other views.",
        )
    pixels = views[names.index(chosen["view"])][1]
    heat = occlusion_map(np.array(pixels), score)
    picture = draw(np.array(pixels), heat, blurred=evidence.decision != "allow" and not show_flagged)
    return chosen, picture.resize((_MAP_SIDE, _MAP_SIDE))


def _chosen(evidence: Evidence, label: str | None) -> dict[str, Any]:
    if not evidence.labels:
        if evidence.status in ("unreadable", "missing"):
            classes = ", ".join(dict.fromkeys(str(error["class"]) for error in evidence.errors))
            raise ExplainError(
                f"{evidence.uri} could not be read: {classes or evidence.status}",
                remedy="Only images that decode have labels, and can be explained.",
            )
        raise ExplainError(f"{evidence.uri} has no labels", remedy="Moderate it first: `vlmflow enrich`.")
    decision, reason = evidence.by_model
    wanted = label or (reason or "").rpartition("/")[2]
    # A label by its prompts and by detectors are as many entries: a detector's by the label alone is the second choice.
    found = [one for one in evidence.labels if label in (name_of(one), f"{one['category']}/{name_of(one)}")]
    found += [one for one in evidence.labels if wanted in (one["label"], f"{one['category']}/{one['label']}")]
    if label is None:  # prompts that a detector replaces may be graver, and have decided nothing
        found.sort(key=lambda one: one["decision"] != decision)
    if found:
        return found[0]
    if label is not None:
        there = ", ".join(dict.fromkeys(name_of(one) for one in evidence.labels))
        raise ExplainError(f"{evidence.uri} has no label {label}", remedy=f"Name one of {there}.")
    return evidence.labels[0]


def _scorer(job: Job, evidence: Evidence, label: dict[str, Any]) -> tuple[PixelRequest, Any]:
    """What the model behind a label is shown, and how it scores that."""
    from vlmflow.engine.archive import archived_policy, archived_prompts
    from vlmflow.models import load_embedder
    from vlmflow.models.detectors import load_detector, prepare_detectors
    from vlmflow.moderation.prompts import encode_prompts
    from vlmflow.moderation.scoring import Scorer
    from vlmflow.tasks.setup import check_unchanged, prepare_tasks

    assert evidence.policy_digest is not None
    catalog = Catalog.open(job.catalog)
    policy = archived_policy(catalog, evidence.policy_digest)
    if label["detector"] is not None:
        (setup,) = [one for one in prepare_detectors(policy, job.views) if one.name == label["detector"]]
        output = _output_behind(evidence, label, setup)
        _check_detector(evidence, setup, output)
        number = setup.outputs.index(output)
        detector = load_detector(setup, "cpu")
        return setup.request, lambda pixels: detector.score(pixels)[:, number]
    ours = prepare_tasks(job.model_copy(update={"tasks": ("embed",), "policy": None}))
    config, identity = ours.models["embed"], ours.identities["embed"]
    if evidence.embed_fingerprint not in ours.embed_fingerprints():
        here = f"{identity.id}@{identity.revision}"
        what = "other weights or code of " if evidence.embed_model == here else ""
        raise ExplainError(
            f"{evidence.uri} was scored by {what}{evidence.embed_model}, not by {here} of the profile as it is now",
            remedy="Give the --profile that the catalog was enriched with, and its weights as they were.",
        )
    embedder = load_embedder(config, "cpu")
    check_unchanged(ours)
    prompts = archived_prompts(catalog, policy, identity) or encode_prompts(policy, embedder)
    scorer = Scorer(prompts)
    number = [ref.label for ref in policy.labels].index(label["label"])
    return ours.requests["embed"], lambda pixels: scorer.score(embedder.embed_images(pixels))[:, number]


def _output_behind(evidence: Evidence, label: dict[str, Any], setup: DetectorSetup) -> str:
    """The output whose score a label has: several of one detector may feed it."""
    what = ("score", "view", "time_s")
    feeding = [name for name, output in setup.config.outputs.items() if output.label == label["label"]]
    scored = {
        found["output"]
        for found in evidence.detections
        if found["detector"] == setup.name and all(found[name] == label[name] for name in what)
    }
    return next((name for name in feeding if name in scored), feeding[0])


def _check_detector(evidence: Evidence, setup: DetectorSetup, output: str) -> None:
    wanted = (setup.name, output)
    models = [found["model"] for found in evidence.detections if (found["detector"], found["output"]) == wanted]
    if models and models[0] != setup.fingerprint:
        raise ExplainError(
            f"{evidence.uri} was scored by another model than the {setup.name} that is here ({setup.identity.id})",
            remedy="Put its weights back as they were, or run `vlmflow enrich` with the policy first.",
        )


def _read(job: Job, evidence: Evidence) -> bytes:
    from vlmflow.imaging import hash_of

    if evidence.content_hash is None:  # its address may have been refused: nothing is asked of it
        raise ExplainError(f"{evidence.uri} could not be read", remedy="Only images that decode can be explained.")
    reader = RowReader(job.catalog, job.limits, job.source)
    try:
        (fetched,) = reader.read([(evidence.uri, evidence.object_version)])
    except StoreLostError as error:
        raise StoreLostError(f"{evidence.uri}: {why_lost(error)}", remedy=error.remedy) from error
    if fetched.data is None:
        raise ExplainError(f"{evidence.uri}: {fetched.message}", remedy="The image itself is needed for a map.")
    if hash_of(fetched.data) != evidence.content_hash:
        raise ExplainError(f"{evidence.uri} has changed since it was moderated", remedy="Run `vlmflow enrich` first.")
    return fetched.data


def _normalised(image: str) -> str:
    from vlmflow.errors import SourceError

    try:
        return normalise_uri(image)
    except SourceError:
        return image


def _value(label: dict[str, Any]) -> float:
    for name in ("probability", "score"):
        if label[name] is not None:
            return float(label[name])
    return -1.0

"""What is wrong or doubtful about a policy file, found before any image is moderated under it.

Without a model: what the text of the file shows. With one: prompts that the model's own text tower hardly tells
apart, so that labels would be scored alike, or a label be drowned by a neutral prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vlmflow.config import Frozen
from vlmflow.errors import PolicyError
from vlmflow.models.identity import ModelIdentity
from vlmflow.moderation.policy import Policy, Thresholds, find_binding, load_policy, prompts_digest

if TYPE_CHECKING:
    from vlmflow.models import ImageEmbedder

Level = Literal["error", "warning", "note"]

# Cosines of a model's texts are all high, so only the model itself can say what is close. Its neutral prompts are
# about different things: two prompts closer than all but 1% of the pairs of neutral ones are hardly told apart.
_QUANTILE = 0.99
_MIN_NEUTRAL = 10  # 45 pairs: with fewer, the quantile is the most extreme pair or two

Vectors = NDArray[np.float64]


class Finding(Frozen):
    """One thing about a policy. ``where``: a label, ``neutral``, ``bindings`` or ``file``."""

    level: Level
    where: str
    text: str
    remedy: str


class PolicyCheck(Frozen):
    """What a check found.

    Attributes:
        policy: name and version; None: the file cannot be read as a policy.
        model: whose text tower judged the prompts; None: no model was asked.
        limit: cosine above which two prompts count as hardly told apart by the model.
        findings: the gravest first.
    """

    file: str
    policy: str | None
    digest: str | None
    model: str | None
    limit: float | None
    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)


def check_policy(
    name_or_path: str, *, embedder: ImageEmbedder | None = None, identity: ModelIdentity | None = None
) -> PolicyCheck:
    """Checks a policy file; what makes it unusable is a finding too, not an exception.

    Args:
        embedder: whose text tower judges how close prompts are; None: the text of the file alone is checked.
        identity: of the embedder, for its binding.
    """
    try:
        policy = load_policy(name_or_path)
    except PolicyError as error:
        finding = Finding(level="error", where="file", text=str(error), remedy=error.remedy)
        return PolicyCheck(file=name_or_path, policy=None, digest=None, model=None, limit=None, findings=(finding,))
    findings = [*_repeated_prompts(policy), *_labels(policy), *_bindings(policy, identity)]
    limit = None
    if embedder is not None:
        limit, close = _close_prompts(policy, embedder)
        findings += close
    order = {"error": 0, "warning": 1, "note": 2}
    return PolicyCheck(
        file=name_or_path,
        policy=f"{policy.name} {policy.version}",
        digest=policy.digest,
        model=identity.id if identity else None,
        limit=limit,
        findings=tuple(sorted(findings, key=lambda finding: order[finding.level])),
    )


def _repeated_prompts(policy: Policy) -> Iterator[Finding]:
    places: dict[str, list[str]] = {}
    for where, prompts in _prompts(policy).items():
        for prompt in prompts:
            places.setdefault(" ".join(prompt.casefold().split()), []).append(where)
    for prompt, found in places.items():
        if len(found) == 1:
            continue
        names = sorted(set(found))
        if len(names) == 1:
            text = f"prompt {prompt!r} stands {len(found)} times, so it weighs {len(found)} times"
            yield Finding(level="warning", where=names[0], text=text, remedy="Keep one of them.")
        else:
            effect = "the label can hardly score" if "neutral" in names else "the labels cannot be told apart by it"
            text = f"prompt {prompt!r} stands under {' and '.join(names)}: {effect}"
            yield Finding(level="error", where=names[0], text=text, remedy="Keep it in one place.")


def _prompts(policy: Policy) -> dict[str, tuple[str, ...]]:
    """Prompts by label, and the neutral ones; a label's own name may be `neutral`, so it carries its category."""
    labelled = zip(policy.labels, policy.each_label(), strict=True)
    return {"/".join(ref): label.prompts for ref, label in labelled} | {"neutral": policy.neutral}


def _labels(policy: Policy) -> Iterator[Finding]:
    lone, unmapped = [], []
    present = [binding for binding in policy.bindings if binding.prompts == prompts_digest(policy)]
    for ref, label in zip(policy.labels, policy.each_label(), strict=True):
        where = "/".join(ref)
        yield from _thresholds(where, label)
        # Of a binding that counts they decide in place of the label's own.
        for binding in present:
            if ref.label in binding.thresholds:
                yield from _thresholds(where, binding.thresholds[ref.label], f"binding of {binding.model}: ")
        if len(label.prompts) == 1:
            lone.append(where)
        if not label.external:
            unmapped.append(where)
    for detector in policy.detectors:
        for name, output in detector.outputs.items():
            if output.combine != "confirm":  # by itself that blocks nothing
                where = f"{output.category}/{output.label}"
                yield from _thresholds(where, output, f"detector {detector.name}, output {name}: ")
    if lone:
        text = f"labels with one prompt, whose wording alone then decides: {', '.join(lone)}"
        yield Finding(level="note", where="file", text=text, remedy="Say the same in two or three other ways.")
    if unmapped:
        text = f"labels without names at other services: {', '.join(unmapped)}"
        yield Finding(level="note", where="file", text=text, remedy="Name the like of each under `external`, if any.")


def _thresholds(where: str, limits: Thresholds, whose: str = "") -> Iterator[Finding]:
    if limits.block == 0:
        text, remedy = f"{whose}block 0.0 blocks every image", "Raise it, or write null for a label that never blocks."
        yield Finding(level="warning", where=where, text=text, remedy=remedy)
    elif limits.review == 0:
        text = f"{whose}review 0.0 sends every image to review"
        yield Finding(level="warning", where=where, text=text, remedy="Raise it.")
    elif limits.review == limits.block:
        text = f"{whose}review and block are both {limits.block}: nothing is left to review"
        yield Finding(level="note", where=where, text=text, remedy="Lower review, if people are to look first.")


def _bindings(policy: Policy, identity: ModelIdentity | None) -> Iterator[Finding]:
    present = prompts_digest(policy)
    for binding in policy.bindings:
        if binding.prompts != present:
            text = f"the binding of {binding.model} was set for other prompts and does not count"
            yield Finding(level="warning", where="bindings", text=text, remedy="Calibrate anew: `vlmflow calibrate`.")
    if not policy.bindings:
        text = "thresholds are set for no model: every decision would be `review`"
        yield Finding(level="note", where="bindings", text=text, remedy="`vlmflow calibrate` sets them.")
    elif identity is not None and find_binding(policy, identity) is None:
        text = f"thresholds are not set for {identity.id}: every decision would be `review`"
        yield Finding(level="warning", where="bindings", text=text, remedy="`vlmflow calibrate` sets them.")


def _close_prompts(policy: Policy, embedder: ImageEmbedder) -> tuple[float | None, list[Finding]]:
    """The limit of closeness, and the prompts and labels beyond it."""
    if len(policy.neutral) < _MIN_NEUTRAL:
        text = f"{len(policy.neutral)} neutral prompts are too few to say what is close for the model"
        remedy = f"Name {_MIN_NEUTRAL} harmless things or more that the images show."
        return None, [Finding(level="note", where="neutral", text=text, remedy=remedy)]
    groups = _prompts(policy)
    encoded = np.asarray(embedder.embed_texts([text for group in groups.values() for text in group]), np.float64)
    ends = np.cumsum([len(group) for group in groups.values()])
    vectors: dict[str, Vectors] = dict(zip(groups, np.split(encoded, ends[:-1]), strict=True))
    neutral = vectors.pop("neutral")
    pairs = (neutral @ neutral.T)[np.triu_indices(len(neutral), 1)]
    limit = float(np.quantile(pairs, _QUANTILE))
    found = [*_near_neutral(policy, groups, vectors, neutral, limit), *_near_labels(groups, vectors, limit)]
    return round(limit, 4), found


def _near_neutral(
    policy: Policy,
    groups: Mapping[str, tuple[str, ...]],
    vectors: Mapping[str, Vectors],
    neutral: Vectors,
    limit: float,
) -> Iterator[Finding]:
    for where, own in vectors.items():
        to_mean = own @ _mean(own)
        cosines = own @ neutral.T
        for number, prompt in enumerate(groups[where]):
            nearest = int(cosines[number].argmax())
            cosine = cosines[number, nearest]
            if cosine > limit or cosine > to_mean[number]:
                than = "the label's own mean is" if cosine > to_mean[number] else f"the limit of {limit:.3f}"
                text = (
                    f"prompt {prompt!r} is nearer to the neutral {policy.neutral[nearest]!r} ({cosine:.3f}) than {than}"
                )
                remedy = "Word one of the two differently, or drop the neutral one."
                yield Finding(level="warning", where=where, text=text, remedy=remedy)


def _near_labels(
    groups: Mapping[str, tuple[str, ...]], vectors: Mapping[str, Vectors], limit: float
) -> Iterator[Finding]:
    """Pairs of labels whose means nearly coincide; else the closest prompts of a pair, if they are too close."""
    for one, other in combinations(vectors, 2):
        of_means = float(_mean(vectors[one]) @ _mean(vectors[other]))
        cosines = vectors[one] @ vectors[other].T
        row, column = np.unravel_index(int(cosines.argmax()), cosines.shape)
        if of_means > limit:
            text = f"nearly coincides with {other}: the cosine of their means is {of_means:.3f}, the limit {limit:.3f}"
            remedy = "Make it one label, or word the prompts so that they differ."
        elif cosines[row, column] > limit:
            first, second = groups[one][row], groups[other][column]
            text = f"prompt {first!r} is close to {second!r} of {other} ({cosines[row, column]:.3f}, limit {limit:.3f})"
            remedy = "Word one of the two differently."
        else:
            continue
        yield Finding(level="warning", where=one, text=text, remedy=remedy)


def _mean(vectors: Vectors) -> Vectors:
    """(D,) of unit length."""
    mean: Vectors = vectors.mean(axis=0)
    return mean / np.linalg.norm(mean)

"""Two policies compared: what changed, and what a catalog needs for the change to take effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from vlmflow.config import Frozen
from vlmflow.moderation.policy import Binding, Label, Policy, prompts_digest

Effect = Literal["none", "margins", "text", "pixels"]
Value = str | float | None

_EFFECTS: dict[Effect, str] = {
    "none": "Nothing that decides changed: `vlmflow remoderate` only writes the new policy's name into the rows.",
    "margins": "Prompts are the same: `vlmflow remoderate` decides by the stored margins, without any model.",
    "text": (
        "Prompts changed: `vlmflow remoderate` runs the text encoder once over the prompts and scores the stored "
        "embeddings; no image is read."
    ),
    "pixels": (
        "A detector, or an output of one, is new or another one: `vlmflow enrich` with the new policy shows it the "
        "images and moderates them; `vlmflow remoderate` leaves rows alone that it has not seen."
    ),
}


class Change(Frozen):
    """One value that differs. ``where``: a label, a binding or ``policy``; a value of None: there is none."""

    where: str
    what: str
    before: Value
    after: Value


class PromptChange(Frozen):
    """Prompts of a label, or the neutral ones."""

    where: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reordered: bool = False


class PolicyDiff(Frozen):
    """What leads from one policy to another.

    Attributes:
        before, after: name, version and the first 12 digits of the digest.
        renamed: labels with the same prompts under another name, as (before, after).
        effect: ``none``; ``margins``: stored margins will do; ``text``: prompts are encoded anew; ``pixels``:
            a detector must see the images.
        lost_bindings: models whose thresholds were set before and are not for the prompts after.
    """

    before: str
    after: str
    labels_added: tuple[str, ...]
    labels_removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    prompts: tuple[PromptChange, ...]
    changes: tuple[Change, ...]
    lost_bindings: tuple[str, ...]
    effect: Effect
    implies: str


def diff_policies(before: Policy, after: Policy) -> PolicyDiff:
    """Compares two policies, label by label."""
    old, new = _by_name(before), _by_name(after)
    renamed = _renamed(before, after)
    pairs = [(name, name) for name in old if name in new] + list(renamed)
    prompts = [_prompt_change(after_name, old[one].prompts, new[after_name].prompts) for one, after_name in pairs]
    prompts.append(_prompt_change("neutral", before.neutral, after.neutral))
    changes = [change for one, other in pairs for change in _label_changes(before, after, old[one], new[other])]
    changes += _changes("policy", _settings(before), _settings(after)) + _binding_changes(before, after)
    effect: Effect = "margins" if _decides(before) != _decides(after) else "none"
    if prompts_digest(before) != prompts_digest(after):
        effect = "text"
    if _detects_anew(before, after):
        effect = "pixels"
    return PolicyDiff(
        before=before.full_name,
        after=after.full_name,
        labels_added=tuple(name for name in new if name not in old and name not in dict(renamed).values()),
        labels_removed=tuple(name for name in old if name not in new and name not in dict(renamed)),
        renamed=renamed,
        prompts=tuple(change for change in prompts if change.added or change.removed or change.reordered),
        changes=tuple(changes),
        lost_bindings=_lost_bindings(before, after),
        effect=effect,
        implies=_EFFECTS[effect],
    )


def _by_name(policy: Policy) -> dict[str, Label]:
    return {label.name: label for label in policy.each_label()}


def _decides(policy: Policy) -> dict[str, Any]:
    """What decisions and rows depend on besides prompts."""
    kept = policy.model_dump(exclude={"description", "name", "version"})
    for category in kept["categories"]:
        for label in category["labels"]:
            for carried in ("severity", "actions", "external"):
                del label[carried]
    return kept


def _renamed(before: Policy, after: Policy) -> tuple[tuple[str, str], ...]:
    old, new = _by_name(before), _by_name(after)
    gone = {label.prompts: name for name, label in old.items() if name not in new}
    come = {label.prompts: name for name, label in new.items() if name not in old}
    return tuple((name, come[prompts]) for prompts, name in gone.items() if prompts in come)


def _prompt_change(where: str, old: Sequence[str], new: Sequence[str]) -> PromptChange:
    added, removed = [text for text in new if text not in old], [text for text in old if text not in new]
    moved = not added and not removed and tuple(old) != tuple(new)
    return PromptChange(where=where, added=tuple(added), removed=tuple(removed), reordered=moved)


def _label_changes(before: Policy, after: Policy, old: Label, new: Label) -> list[Change]:
    def values(policy: Policy, label: Label) -> dict[str, Value]:
        category = next(ref.category for ref in policy.labels if ref.label == label.name)
        carried = {"severity": label.severity, "category": category}
        actions = {
            "actions on review": ", ".join(label.actions.review) or None,
            "actions on block": ", ".join(label.actions.block) or None,
        }
        external = {f"name at {provider}": ", ".join(names) for provider, names in label.external.items()}
        return {"review": label.review, "block": label.block} | carried | actions | external

    return _changes(new.name, values(before, old), values(after, new))


def _settings(policy: Policy) -> dict[str, Value]:
    logistic = policy.logistic
    values: dict[str, Value] = {"temperature": policy.temperature, "scale": logistic.scale, "offset": logistic.offset}
    for detector in policy.detectors:
        values[f"detector {detector.name}"] = detector.path or detector.repo or detector.family
        values[f"{detector.name} family"] = detector.family
        values[f"{detector.name} revision"] = detector.revision
        values[f"{detector.name} weights"] = detector.weights and detector.weights[:12]
        for name, output in detector.outputs.items():
            where = f"{detector.name}.{name}"
            values |= {f"{where} label": f"{output.category}/{output.label}", f"{where} combine": output.combine}
            values |= {f"{where} review": output.review, f"{where} block": output.block}
            values |= {f"{where} question": output.question} if output.question else {}
    return values


def _detects_anew(before: Policy, after: Policy) -> bool:
    """Whether a detector gives scores after that rows under the policy before do not hold."""
    held = _detecting(before)
    for asked, weights in _detecting(after).items():
        # Weights that only one of the policies names may be those that the other meant.
        if asked not in held or (weights and held[asked] and weights != held[asked]):
            return True
    return False


def _detecting(policy: Policy) -> dict[tuple[str | None, ...], str | None]:
    """What is asked of which detectors, and the weights that each is to have."""
    return {
        (d.name, d.family, d.path, d.repo, d.revision, name, output.question): d.weights
        for d in policy.detectors
        for name, output in d.outputs.items()
    }


def _binding_changes(before: Policy, after: Policy) -> list[Change]:
    changes: list[Change] = []
    several = any(len({b.weights for b in policy.bindings}) < len(policy.bindings) for policy in (before, after))
    for old, new in _binding_pairs(before, after):
        one = old or new
        assert one is not None
        where = f"binding of {one.model} ({one.weights[:12]}" + (f", prompts {one.prompts[:12]})" if several else ")")
        changes += _changes(where, _bound(old), _bound(new))
    return changes


def _binding_pairs(before: Policy, after: Policy) -> Iterator[tuple[Binding | None, Binding | None]]:
    """Bindings that belong together: for the same weights and prompts, then for the same weights."""
    new = list(after.bindings)
    pairs: dict[int, Binding] = {}
    for same in ((lambda b: (b.weights, b.prompts)), (lambda b: b.weights)):
        for number, old in enumerate(before.bindings):
            found = next((other for other in new if same(other) == same(old)), None)
            if number not in pairs and found is not None:
                pairs[number] = found
                new.remove(found)
    for number, old in enumerate(before.bindings):
        yield old, pairs.get(number)
    for other in new:
        yield None, other


def _bound(binding: Binding | None) -> dict[str, Value]:
    if binding is None:
        return {}
    values: dict[str, Value] = {"model": binding.model, "prompts": binding.prompts[:12]}
    if binding.logistic:
        values |= {"scale": binding.logistic.scale, "offset": binding.logistic.offset}
    for label, limits in binding.thresholds.items():
        values |= {f"{label} review": limits.review, f"{label} block": limits.block}
    for label, curve in binding.calibration.items():
        values |= {f"{label} calibrated scale": curve.scale, f"{label} calibrated offset": curve.offset}
    return values


def _changes(where: str, old: Mapping[str, Value], new: Mapping[str, Value]) -> list[Change]:
    names = [*old, *(name for name in new if name not in old)]
    return [
        Change(where=where, what=name, before=old.get(name), after=new.get(name))
        for name in names
        if old.get(name) != new.get(name)
    ]


def _lost_bindings(before: Policy, after: Policy) -> tuple[str, ...]:
    def valid(policy: Policy) -> dict[str, str]:
        present = prompts_digest(policy)
        return {binding.weights: binding.model for binding in policy.bindings if binding.prompts == present}

    kept = valid(after)
    return tuple(model for weights, model in valid(before).items() if weights not in kept)

"""The moderation policy: categories, labels, prompts, thresholds, and the models they were set for.

A policy is one YAML file. Thresholds mean something only for the model and the prompts they were chosen on, so a
policy lists *bindings*: the digests of a model's weights and of the prompts, with what was set for that pair.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from vlmflow.errors import PolicyError, UnboundPolicyError
from vlmflow.files import put_file
from vlmflow.models.identity import ModelIdentity
from vlmflow.moderation.policy_text import with_last, with_text
from vlmflow.paths import is_there
from vlmflow.validation import describe_validation, read_yaml

POLICY_SUFFIXES = (".yaml", ".yml")
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Score = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """A part of a policy: immutable, an unknown key is an error, and nothing is coerced (``"0.5"`` is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LabelRef(NamedTuple):
    """A label's place in the hierarchy."""

    category: str
    label: str


class Logistic(_Part):
    """``1 / (1 + exp(-scale * (margin - offset)))``: 0.5 where the margin equals ``offset``."""

    scale: Annotated[float, Field(gt=0)]
    offset: float  # in margin units: differences of cosines


class Thresholds(_Part):
    """From where on a label means `review` and `block`: its probability where it is calibrated, else its score."""

    review: Score
    block: Score | None  # None: the label never blocks

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.block is not None and self.review > self.block:
            raise ValueError(f"review {self.review} exceeds block {self.block}")
        return self


class Actions(_Part):
    """What a platform does about an image, in its own words (``queue``, ``hide``). For readers: nothing is executed."""

    review: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    block: Annotated[tuple[Name, ...], Field(strict=False)] = ()


class Label(Thresholds):
    """One thing to look for: scored on its own, so an image can carry several."""

    name: Name
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, strict=False)]
    severity: Literal["low", "medium", "high", "critical"] | None = None
    actions: Actions = Actions()
    # Provider -> its names for the like; a provider without a name for it is left out.
    external: dict[Name, Annotated[tuple[Prompt, ...], Field(min_length=1, strict=False)]] = {}


class Category(_Part):
    """A group of labels."""

    name: Name
    labels: Annotated[tuple[Label, ...], Field(min_length=1, strict=False)]


class DetectorOutput(Thresholds):
    """What one score of a detector means: the label that it feeds, and from where on.

    ``combine`` says how it goes together with the prompts of the same label: with ``any`` each decides and the graver
    counts; with ``confirm`` the detector blocks only where the prompts find at least `review`; with ``replace`` the
    prompts count only where the detector gave no score.
    """

    category: Name
    label: Name
    combine: Literal["any", "confirm", "replace"] = "any"
    question: Prompt | None = None  # of a judge: what it is asked, of ShieldGemma 2 a policy's text; "yes" counts


class Detector(_Part):
    """A classifier that looks at the pixels itself. Its scores are stored, so that a later policy can use them."""

    name: Name
    family: Literal["opennsfw", "image_classification", "vlm_judge"]
    path: str | None = None  # a local folder
    repo: str | None = None  # a hub repository; needs `revision`
    revision: str | None = None
    weights: Digest | None = None  # weights digest that the thresholds were set for; another one is refused
    outputs: Annotated[dict[str, DetectorOutput], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_family(self) -> Self:
        asked = [name for name, output in self.outputs.items() if output.question is not None]
        if self.family == "vlm_judge" and len(asked) < len(self.outputs):
            raise ValueError(f"detector {self.name}: every output of a judge needs a question")
        if self.family != "vlm_judge" and asked:
            raise ValueError(f"detector {self.name}: only a vlm_judge is asked questions, not {self.family}")
        return self


class Binding(_Part):
    """What was set for one model and one set of prompts."""

    model: str  # id of the model, for people
    weights: Digest  # weights digest of the embedder
    prompts: Digest  # :func:`prompts_digest` of the policy
    logistic: Logistic | None = None  # instead of the policy's
    thresholds: dict[str, Thresholds] = {}  # instead of the labels' own
    calibration: dict[str, Logistic] = {}  # margin to probability, by label


class Policy(_Part):
    """A whole policy file."""

    name: Name
    version: Annotated[str, StringConstraints(min_length=1)]
    description: str = ""
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the log-mean-exp over the neutral prompts, in cosine units
    neutral: Annotated[tuple[Prompt, ...], Field(min_length=1, strict=False)]
    categories: Annotated[tuple[Category, ...], Field(min_length=1, strict=False)]
    logistic: Logistic
    detectors: Annotated[tuple[Detector, ...], Field(strict=False)] = ()
    bindings: Annotated[tuple[Binding, ...], Field(strict=False)] = ()

    @field_validator("categories")
    @classmethod
    def _names_unique(cls, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        for names in ([c.name for c in categories], [label.name for c in categories for label in c.labels]):
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"named twice: {', '.join(doubled)}")
        return categories

    @model_validator(mode="after")
    def _detectors_fit(self) -> Self:
        categories = {ref.label: ref.category for ref in self.labels}
        names = [detector.name for detector in self.detectors]
        if len(set(names)) != len(names):
            raise ValueError("two detectors of the same name")
        for detector in self.detectors:
            for name, output in detector.outputs.items():
                category = categories.get(output.label)
                what = f"detector {detector.name}, output {name}: label {output.label}"
                if category is None and output.combine != "any":
                    raise ValueError(f"{what} has no prompts to {output.combine}")
                if category not in (None, output.category):
                    raise ValueError(f"{what} is of category {category}, not {output.category}")
        return self

    @model_validator(mode="after")
    def _bindings_fit(self) -> Self:
        known = {ref.label for ref in self.labels}
        for binding in self.bindings:
            unknown = sorted((binding.thresholds.keys() | binding.calibration.keys()) - known)
            if unknown:
                raise ValueError(f"binding of {binding.model} names labels that the policy lacks: {', '.join(unknown)}")
        pairs = [(binding.weights, binding.prompts) for binding in self.bindings]
        if len(set(pairs)) != len(pairs):
            raise ValueError("two bindings for the same weights and prompts")
        return self

    @cached_property
    def labels(self) -> tuple[LabelRef, ...]:
        """Every label in file order: the order of the columns of margins and scores."""
        return tuple(LabelRef(c.name, label.name) for c in self.categories for label in c.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parsed content: comments, layout and key order do not move it.

        Nor does a key that a later version knows and the file does not use. So no default may ever change.
        """
        return _digest(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def full_name(self) -> str:
        """``name version (digest)``, by which it is told from another that somebody gave the same version."""
        return f"{self.name} {self.version} ({self.digest[:12]})"

    def each_label(self) -> tuple[Label, ...]:
        """The labels with prompts and thresholds, in the order of :attr:`labels`."""
        return tuple(label for category in self.categories for label in category.labels)


def load_policy(name_or_path: str) -> Policy:
    """Loads a policy that ships by its name, or any other by its path.

    Raises:
        PolicyError: there is no such file, it is not YAML, or a key does not fit; one line names the key and why.
    """
    path = _path(name_or_path)
    return _validated(_read_yaml(path), path)


def _validated(data: Any, path: Path) -> Policy:
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise PolicyError(
            describe_validation(error, what=f"policy {path}", of=Policy), remedy="Fix the keys named."
        ) from error


def read_text(name_or_path: str) -> str:
    """The file of a policy, with its comments, once it has been seen to be one.

    Raises:
        PolicyError: as :func:`load_policy`.
    """
    load_policy(name_or_path)
    return _path(name_or_path).read_text(encoding="utf-8")


def to_yaml(policy: Policy) -> str:
    """A policy as a file, of the same digest and ready for :func:`write_binding`: without the comments it once had."""
    content = {"bindings": [], **policy.model_dump(mode="json", exclude_defaults=True)}
    content["bindings"] = content.pop("bindings")  # last
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _path(name_or_path: str) -> Path:
    path, shipped = Path(name_or_path), shipped_policies()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if path.suffix not in POLICY_SUFFIXES:
        raise PolicyError(
            f"policy {name_or_path}: no policy of this name ships",
            remedy=f"Name one of {', '.join(shipped)}, or the path of a .yaml file.",
        )
    return path


def shipped_policies() -> dict[str, Path]:
    """The policies that come with the package, by name."""
    folder = Path(str(resources.files("vlmflow.moderation"))) / "policies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def prompts_digest(policy: Policy) -> str:
    """SHA-256 of what margins are made of besides the model: labels, prompts, neutral prompts, temperature."""
    labels = [[label.name, list(label.prompts)] for label in policy.each_label()]
    return _digest({"labels": labels, "neutral": list(policy.neutral), "temperature": policy.temperature})


def find_binding(policy: Policy, identity: ModelIdentity) -> Binding | None:
    """The binding for this model and the policy's present prompts; None: there is none."""
    wanted = (identity.weights_digest, prompts_digest(policy))
    return next((binding for binding in policy.bindings if (binding.weights, binding.prompts) == wanted), None)


def check_binding(policy: Policy, identity: ModelIdentity, *, accept_unbound: bool = False) -> Binding | None:
    """The binding to moderate with.

    Returns:
        None only where ``accept_unbound``: every decision is then `review`, with the reason `unbound`.

    Raises:
        UnboundPolicyError: no binding fits, and that was not accepted.
    """
    binding = find_binding(policy, identity)
    if binding is not None or accept_unbound:
        return binding
    bound = ", ".join(sorted({b.model for b in policy.bindings})) or "none"
    same_weights = any(b.weights == identity.weights_digest for b in policy.bindings)
    reason = "its prompts changed since it was bound to" if same_weights else "it has no thresholds set for"
    raise UnboundPolicyError(
        f"policy {policy.name} {policy.version}: {reason} {identity.id} "
        f"(weights {identity.weights_digest[:12]}; bound: {bound})",
        remedy="Begin with --accept-unbound, or `accept_unbound: true` in the job: every decision is `review` until "
        "`vlmflow calibrate` has set them.",
    )


def bind(
    policy: Policy,
    identity: ModelIdentity,
    *,
    logistic: Logistic | None = None,
    thresholds: Mapping[str, Thresholds] | None = None,
    calibration: Mapping[str, Logistic] | None = None,
) -> Binding:
    """States that thresholds were chosen for this model and the policy's present prompts."""
    return Binding(
        model=identity.id,
        weights=identity.weights_digest,
        prompts=prompts_digest(policy),
        logistic=logistic,
        thresholds=dict(thresholds or {}),
        calibration=dict(calibration or {}),
    )


def write_binding(path: Path, binding: Binding) -> None:
    """Writes a binding into a policy file, in place of any other of the same weights; the rest stays as it is.

    Raises:
        PolicyError: ``bindings`` is not the last key of the file, the result is no valid policy, the file is spelled
            so that nothing can be put into it, or it cannot be written.
    """
    text = _changed(path, binding, None)
    try:
        put_file(path, text)
    except OSError as error:
        remedy = "Make room, or the file one that can be written."
        raise PolicyError(f"policy {path}: {error.strerror}", remedy=remedy) from error


def write_version(path: Path, output: Path, binding: Binding) -> Policy:
    """Writes the next version of a policy, with a binding, to another file; comments are kept.

    Raises:
        PolicyError: ``output`` is there already, or as :func:`write_binding` says.
    """
    text = _changed(path, binding, next_version(load_policy(str(path)).version))
    if is_there(output):
        raise PolicyError(f"policy {output}: is there already", remedy="Name another file with --output.")
    try:
        put_file(output, text)  # never half a policy, which would stand in the way of the next try
    except OSError as error:
        raise PolicyError(f"policy {output}: {error.strerror}", remedy="Name another file with --output.") from error
    return load_policy(str(output))


def next_version(version: str) -> str:
    """The last number of a version raised by one: ``1`` -> ``2``, ``2.9`` -> ``2.10``, ``beta`` -> ``beta.1``."""
    head, number, tail = re.fullmatch(r"(.*?)(\d+)?(\D*)", version, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{head}{int(number) + 1:0{len(number)}d}{tail}" if number else f"{version}.1"


def _changed(path: Path, binding: Binding, version: str | None) -> str:
    """The file with a binding, and with another version unless that is None."""
    data = _read_yaml(path)
    if not isinstance(data, dict) or not data or list(data)[-1] != "bindings":
        raise PolicyError(f"policy {path}: bindings is not its last key", remedy="End the file with `bindings: []`.")
    _validated(data, path)
    kept = [old for old in data["bindings"] or [] if old.get("weights") != binding.weights]
    wanted = data | {"bindings": [*kept, binding.model_dump(mode="json", exclude_defaults=True)]}
    wanted |= {} if version is None else {"version": version}
    _validated(wanted, path)
    text = _put_in(path.read_text(encoding="utf-8"), wanted["bindings"], version)
    if text is None or read_yaml(text) != wanted:  # by an alias, say, or all of it in braces
        what = "binding" if version is None else "version"
        raise PolicyError(
            f"policy {path}: its keys are spelled so that no {what} can be put in",
            remedy='Write `version: "1"` on a line of its own, and end the file with `bindings: []`.',
        )
    return text


def _put_in(text: str, bindings: list[Any], version: str | None) -> str | None:
    try:
        changed = text if version is None else with_text(text, "version", version)
        changed = None if changed is None else with_last(changed, "bindings", bindings)
        return changed if changed is not None and read_yaml(changed) else None
    except (yaml.YAMLError, ValueError):
        return None


def _read_yaml(path: Path) -> Any:
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"policy {path}: {error.strerror}", remedy="Name an existing YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a date that there is not
        reason = " ".join(str(error).split())[:200]
        raise PolicyError(f"policy {path} is no YAML mapping: {reason}", remedy="Fix the line named.") from error


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

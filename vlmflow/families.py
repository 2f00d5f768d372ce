"""The families of models: one table of what is known of each.

A family is one architecture behind one role or several. What its adapter does stands in the adapter's module, which is
imported when a model is loaded; what others have to know of it stands here, and everything else asks.

A family of one's own is a class in a module that can be imported, named as ``module:Class``, with its entry in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields, replace
from importlib import import_module
from typing import Any, Literal, get_args

from vlmflow.errors import FamilyError, VlmflowError

Role = Literal["embed", "caption", "match", "answer"]
# How what a model is shown is told from the files of its folder: see `vlmflow.models.preprocessing`.
Reader = Literal["processor", "classifier", "open_clip", "chat", "blip", "align"]

# Of the protocols in `vlmflow.models`.
_METHODS: dict[Role, tuple[str, ...]] = {
    "embed": ("embed_images", "embed_texts"),
    "caption": ("caption",),
    "match": ("encode_images", "match_itm", "match_itc"),
    "answer": ("answer", "check_questions"),
}
_OWN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
# Facts of our adapters, whose `load` is not that of others.
_OURS_ALONE = ("adapters", "shares_tower", "is_packaged")
_MAX_REASON_CHARS = 200
# What the processor of a prompted model makes of images and questions.
_PROCESSOR_NAMES = ("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Family:
    """What is known of a family before a model of it is loaded.

    Attributes:
        roles: that its models can play; none: they are detectors of a policy.
        adapters: of each role the class that plays it, as ``module:Class``; none: its models are asked in words, and
            what writes is loaded apart.
        code_version: raised by hand when the adapter's outputs move for equal weights and pixels. A golden test
            compares outputs with those recorded for the version.
        weight_names: of the files of weights, in the order of preference; an index names its shards.
        config_name: of the configuration file.
        companion_names: of further files that loading reads.
        reader: of the preprocessing.
        processor: the image processor of the reader of that name, for files that name none.
        image_section: where config.json says which pixels the vision tower takes, for families whose processors are
            transformers' own.
        model_types: of config.json, those that its adapters read; none: it is not looked at.
        takes_prompt: what its models are asked stands in a prompt.
        has_beams: its captioners search with beams; others decode greedily, whatever the job says.
        shares_tower: its adapters take the vision towers of a worker, and share one with equal weights.
        is_small: its models take some hundred MB, and large batches make them fast.
        is_packaged: the weights come with a package; a job names no model of it.

    Raises:
        ValueError: a fact is none that there can be.
    """

    roles: tuple[Role, ...] = ()
    adapters: tuple[str, ...] = ()
    _: KW_ONLY
    code_version: int = 1
    weight_names: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")
    config_name: str = "config.json"
    companion_names: tuple[str, ...] = ()
    reader: Reader = "processor"
    processor: str | None = None
    image_section: str | None = None
    model_types: tuple[str, ...] = ()
    takes_prompt: bool = False
    has_beams: bool = True
    shares_tower: bool = False
    is_small: bool = False
    is_packaged: bool = False

    def __post_init__(self) -> None:
        unknown = [repr(role) for role in self.roles if role not in get_args(Role)]
        if isinstance(self.roles, str) or unknown or len(set(self.roles)) != len(self.roles):
            raise ValueError(f"roles {self.roles!r}: a tuple of {', '.join(get_args(Role))}, each once")
        if self.adapters and len(self.adapters) != len(self.roles):
            raise ValueError(f"{len(self.adapters)} adapters for {len(self.roles)} roles")
        if type(self.code_version) is not int or self.code_version < 1:
            raise ValueError(f"code_version {self.code_version!r}: a number from 1 on")
        tuples = (self.weight_names, self.companion_names, self.model_types)
        if any(isinstance(names, str) for names in tuples) or not self.weight_names:
            raise ValueError("weight_names, companion_names, model_types: tuples of names, of weights at least one")
        for name in (*self.weight_names, self.config_name, *self.companion_names):
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
                raise ValueError(f"file {name!r}: the name of a file in the folder of the weights")
        if self.reader not in get_args(Reader):
            raise ValueError(f"reader {self.reader!r}: one of {', '.join(get_args(Reader))}")
        if self.takes_prompt and not set(self.roles) <= {"caption", "answer"}:
            raise ValueError("takes_prompt: only what captions or answers is asked in words")

    def adapter(self, role: Role) -> Any:
        """The class that plays a role; its module is imported."""
        module, _, name = self.adapters[self.roles.index(role)].partition(":")
        return getattr(import_module(module), name)


_BLIP: dict[str, Any] = {"reader": "blip", "model_types": ("blip",), "shares_tower": True, "is_small": True}
_DUAL_ENCODER = ("vlmflow.models.dual_encoder:DualEmbedder", "vlmflow.models.dual_encoder:DualMatcher")

# By role, the first is the family of a profile's model which names none.
FAMILIES = {
    "open_clip": Family(
        ("embed",),
        ("vlmflow.models.clip:ClipEmbedder",),
        # A CLIP repository of the hub often holds the same weights twice: in open_clip's names, and as
        # `model.safetensors` in those of transformers, which open_clip does not read.
        weight_names=("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
        config_name="open_clip_config.json",
        reader="open_clip",
        is_small=True,
    ),
    "blip_caption": Family(("caption",), ("vlmflow.models.blip:BlipCaptioner",), **_BLIP),
    "blip_itm": Family(("match",), ("vlmflow.models.blip:BlipMatcher",), **_BLIP),
    "vilt": Family(
        ("answer",),
        ("vlmflow.models.vilt:ViltAnswerer",),
        processor="ViltImageProcessor",
        model_types=("vilt",),
        is_small=True,
    ),
    "blip_vqa": Family(("answer",), ("vlmflow.models.blip_vqa:BlipAnswerer",), **_BLIP),
    "blip2_caption": Family(
        ("caption",),
        ("vlmflow.models.blip2:Blip2Captioner",),
        processor="BlipImageProcessor",
        image_section="vision_config",
        model_types=("blip-2",),
        shares_tower=True,
    ),
    "blip2_itm": Family(
        ("match",),
        ("vlmflow.models.blip2:Blip2Matcher",),
        processor="BlipImageProcessor",
        image_section="vision_config",
        model_types=("blip-2",),
        shares_tower=True,
    ),
    "git": Family(
        ("caption",),
        ("vlmflow.models.git:GitCaptioner",),
        processor="CLIPImageProcessor",
        image_section="vision_config",
        model_types=("git",),
    ),
    "flava": Family(
        ("embed", "match"),
        ("vlmflow.models.flava:FlavaEmbedder", "vlmflow.models.flava:FlavaMatcher"),
        processor="FlavaImageProcessor",
        image_section="image_config",
        model_types=("flava",),
        shares_tower=True,
    ),
    "align": Family(
        ("embed", "match"),
        _DUAL_ENCODER,
        reader="align",
        model_types=("align",),
        shares_tower=True,
    ),
    "dual_encoder": Family(
        ("embed", "match"),
        _DUAL_ENCODER,
        companion_names=("sentencepiece.bpe.model",),
        image_section="vision_config",
        model_types=("altclip", "chinese_clip", "clip", "metaclip_2", "siglip", "siglip2", "tipsv2"),
        shares_tower=True,
        is_small=True,
    ),
    "vilbert": Family(
        ("match", "answer"),
        ("vlmflow.models.vilbert.adapter:VilbertMatcher", "vlmflow.models.vilbert.adapter:VilbertAnswerer"),
        companion_names=("answers.json", "detector.safetensors", "regions.json", "regions.safetensors"),
    ),
    "vlm": Family(
        ("caption", "answer"),
        code_version=4,
        companion_names=(*_PROCESSOR_NAMES, "generation_config.json"),  # repetition penalties and the like
        reader="chat",
        takes_prompt=True,
    ),
    "vllm": Family(
        ("caption", "answer"),
        code_version=2,
        companion_names=(*_PROCESSOR_NAMES, "generation_config.json"),  # tokens that end a text
        reader="chat",
        takes_prompt=True,
        has_beams=False,
    ),
    "endpoint": Family(("caption", "answer"), takes_prompt=True, has_beams=False),
    "image_classification": Family(reader="classifier"),
    "vlm_judge": Family(code_version=4, companion_names=_PROCESSOR_NAMES, reader="chat"),
    "opennsfw": Family(is_packaged=True),
}


def families_of(role: str) -> tuple[str, ...]:
    """The names of the families that can play a role."""
    return tuple(name for name, family in FAMILIES.items() if role in family.roles)


def is_own(name: str) -> bool:
    """Whether a name is such as one's own families have; nothing is imported."""
    return _OWN_NAME.fullmatch(name) is not None


def family_of(name: str) -> Family:
    """What is known of a family; the module of one's own is imported.

    Args:
        name: of the table, or ``module:Class``.

    Raises:
        FamilyError: the module or class is not there, cannot be imported, or has no entry or methods that do.
    """
    return FAMILIES[name] if name in FAMILIES else _own_family(name)


@contextmanager
def told_of(name: str, what: str) -> Iterator[None]:
    """Tells in our words of what code of one's own raises in the block; of our families errors stay as they are.

    Args:
        name: of the family.
        what: is done in the block, such as ``load``.

    Raises:
        FamilyError: it raised something that is no error of ours.
    """
    try:
        yield
    except VlmflowError:
        raise
    except (Exception, SystemExit) as error:
        if name in FAMILIES:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_CHARS]
        remedy = "The error is in that module, or in what it needs: mend it there."
        raise FamilyError(f"family {name}: {what} raises {reason}", remedy=remedy) from error


def check_model(name: str, role: Role, model: Any) -> None:
    """Makes sure that what the class of one's own has loaded can play the role.

    Raises:
        FamilyError: a method is absent.
    """
    lacking = _lacking(model, _METHODS[role])
    if role == "embed" and type(getattr(model, "dim", None)) is not int:
        lacking.append("dim, the number of dimensions")
    if lacking:
        raise FamilyError(
            f"family {name}: load gives {_called(model)} without {', '.join(lacking)}",
            remedy=f"Return an object with what the protocol of `{role}` asks for (vlmflow/models/__init__.py).",
        )


def _own_family(name: str) -> Family:
    module_name, _, class_name = name.partition(":")
    with told_of(name, f"importing {module_name}"):
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):  # but one that it imports
                raise
            raise FamilyError(
                f"family {name}: there is no module {error.name}",
                remedy="Install it where vlmflow runs, on every node of a cluster, or name its folder in PYTHONPATH.",
            ) from error
    adapter = getattr(module, class_name, None)
    if not isinstance(adapter, type):
        state = "is no class" if hasattr(module, class_name) else "is not there"
        raise FamilyError(f"family {name}: {class_name} {state} in {module.__file__}", remedy="Name a class of it.")
    entry = _entry(name, adapter)
    return replace(entry, adapters=(name,) * len(entry.roles))


def _entry(name: str, adapter: type) -> Family:
    entry = getattr(adapter, "family", None)
    if not isinstance(entry, Family) or not entry.roles:
        state = "it names no role" if isinstance(entry, Family) else f"`family` is {_called(entry)}"
        raise FamilyError(
            f"family {name}: the class has no entry: {state}",
            remedy='Give it one: `family = Family(("caption",), code_version=1)`, of vlmflow.families.',
        )
    ours = [fact.name for fact in fields(entry) if fact.name in _OURS_ALONE and getattr(entry, fact.name)]
    if ours:
        raise FamilyError(f"family {name}: {', '.join(ours)} is for families of vlmflow", remedy="Leave it out.")
    lacking = _lacking(adapter, ("load", *(method for role in entry.roles for method in _METHODS[role])))
    if lacking:
        raise FamilyError(
            f"family {name}: the class has no method {', '.join(lacking)}, and its roles are {', '.join(entry.roles)}",
            remedy="Write it as the protocol of the role has it (vlmflow/models/__init__.py), or leave the role out.",
        )
    return entry


def _lacking(of: Any, methods: tuple[str, ...]) -> list[str]:
    return [method for method in methods if not callable(getattr(of, method, None))]


def _called(value: object) -> str:
    return "nothing" if value is None else f"an object of type {type(value).__name__}"

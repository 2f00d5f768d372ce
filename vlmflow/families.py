"""The families of models: one table of what is known of each.

A family is one architecture behind one role or several. What its adapter does stands in the adapter's module, which is
imported when a model is loaded; what others have to know of it stands here, and everything else asks.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from typing import Any, Literal

Role = Literal["embed", "caption", "match", "answer"]
# How what a model is shown is told from the files of its folder: see `vlmflow.models.preprocessing`.
Reader = Literal["processor", "open_clip", "chat", "blip", "align"]

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
        takes_prompt: what its models are asked stands in a prompt.
        has_beams: its captioners search with beams; others decode greedily, whatever the job says.
        shares_tower: its adapters take the vision towers of a worker, and share one with equal weights.
        is_small: its models take some hundred MB, and large batches make them fast.
        is_packaged: the weights come with a package; a job names no model of it.
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
    takes_prompt: bool = False
    has_beams: bool = True
    shares_tower: bool = False
    is_small: bool = False
    is_packaged: bool = False

    def adapter(self, role: Role) -> Any:
        """The class that plays a role; its module is imported."""
        module, _, name = self.adapters[self.roles.index(role)].partition(":")
        return getattr(import_module(module), name)


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
    "blip_caption": Family(
        ("caption",), ("vlmflow.models.blip:BlipCaptioner",), reader="blip", shares_tower=True, is_small=True
    ),
    "blip_itm": Family(
        ("match",), ("vlmflow.models.blip:BlipMatcher",), reader="blip", shares_tower=True, is_small=True
    ),
    "vilt": Family(("answer",), ("vlmflow.models.vilt:ViltAnswerer",), processor="ViltImageProcessor", is_small=True),
    "blip_vqa": Family(
        ("answer",), ("vlmflow.models.blip_vqa:BlipAnswerer",), reader="blip", shares_tower=True, is_small=True
    ),
    "blip2_caption": Family(
        ("caption",),
        ("vlmflow.models.blip2:Blip2Captioner",),
        processor="BlipImageProcessor",
        image_section="vision_config",
        shares_tower=True,
    ),
    "blip2_itm": Family(
        ("match",),
        ("vlmflow.models.blip2:Blip2Matcher",),
        processor="BlipImageProcessor",
        image_section="vision_config",
        shares_tower=True,
    ),
    "git": Family(
        ("caption",),
        ("vlmflow.models.git:GitCaptioner",),
        processor="CLIPImageProcessor",
        image_section="vision_config",
    ),
    "flava": Family(
        ("embed", "match"),
        ("vlmflow.models.flava:FlavaEmbedder", "vlmflow.models.flava:FlavaMatcher"),
        processor="FlavaImageProcessor",
        image_section="image_config",
    ),
    "align": Family(
        ("embed", "match"),
        ("vlmflow.models.align:AlignEmbedder", "vlmflow.models.align:AlignMatcher"),
        reader="align",
    ),
    "vilbert": Family(
        ("match", "answer"),
        ("vlmflow.models.vilbert.adapter:VilbertMatcher", "vlmflow.models.vilbert.adapter:VilbertAnswerer"),
        companion_names=("answers.json", "detector.safetensors", "regions.json", "regions.safetensors"),
    ),
    "vlm": Family(
        ("caption", "answer"),
        code_version=2,
        companion_names=(*_PROCESSOR_NAMES, "generation_config.json"),  # repetition penalties and the like
        reader="chat",
        takes_prompt=True,
    ),
    "vllm": Family(
        ("caption", "answer"),
        companion_names=(*_PROCESSOR_NAMES, "generation_config.json"),  # tokens that end a text
        reader="chat",
        takes_prompt=True,
        has_beams=False,
    ),
    "endpoint": Family(("caption", "answer"), takes_prompt=True, has_beams=False),
    "image_classification": Family(),
    "vlm_judge": Family(code_version=2, companion_names=_PROCESSOR_NAMES, reader="chat"),
    "opennsfw": Family(is_packaged=True),
}


def families_of(role: str) -> tuple[str, ...]:
    """The names of the families that can play a role."""
    return tuple(name for name, family in FAMILIES.items() if role in family.roles)

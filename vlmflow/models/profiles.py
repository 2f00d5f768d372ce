"""Profiles: named sets of models, what each is for, and where its weights are expected."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import get_args

from vlmflow.config import Job, ModelConfig, default_models_dir
from vlmflow.errors import ConfigError, FamilyError, WeightsError
from vlmflow.families import Role, families_of, family_of, is_own
from vlmflow.models.weights import find_weights, require_folder

STARTER = "starter"


@dataclass(frozen=True)
class ProfileModel:
    """One model of a profile."""

    repo: str  # of the hub; for the starter models, their name
    folder: str  # under the models folder; for the starter models, in the package
    licence: str
    num_parameters: int
    family: str | None = None  # None: the first that can play the role

    def family_as(self, role: Role) -> str:
        """The family of the model in a role."""
        return self.family or families_of(role)[0]


@dataclass(frozen=True)
class Profile:
    """A named set of models."""

    purpose: str
    models: dict[Role, ProfileModel]


_CLIP_LARGE = ProfileModel(
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "CLIP-ViT-L-14-laion2B-s32B-b82K", "MIT", 427_616_513
)
_BLIP_ITM_LARGE = ProfileModel(
    "Salesforce/blip-itm-large-coco", "blip-itm-large-coco", "BSD-3-Clause", 446_128_642, "blip_itm"
)
_GIT_BASE = ProfileModel("microsoft/git-base-coco", "git-base-coco", "MIT", 176_619_066, "git")
_FLAVA = ProfileModel("facebook/flava-full", "flava-full", "BSD-3-Clause", 357_645_303, "flava")
_ALIGN = ProfileModel("kakaobrain/align-base", "align-base", "none stated", 172_117_841, "align")

_VILT_VQA = ProfileModel("dandelin/vilt-b32-finetuned-vqa", "vilt-b32-finetuned-vqa", "Apache-2.0", 117_588_537)
_BLIP_VQA = ProfileModel("Salesforce/blip-vqa-base", "blip-vqa-base", "BSD-3-Clause", 361_230_140, "blip_vqa")

PROFILES: dict[str, Profile] = {
    STARTER: Profile(
        "ships with the package; drawings only: for the demo and tests, NOT for photographs",
        {
            "embed": ProfileModel("vlmflow/starter-clip", "clip", "Apache-2.0", 3_768_577),
            "caption": ProfileModel("vlmflow/starter-captioner", "captioner", "Apache-2.0", 4_180_254),
            "match": ProfileModel("vlmflow/starter-matcher", "matcher", "Apache-2.0", 4_216_898),
            "answer": ProfileModel("vlmflow/starter-vqa", "vqa", "Apache-2.0", 2_513_188),
        },
    ),
    "base": Profile(
        "photographs; a GPU of 8 GB, or a patient CPU",
        {
            "embed": ProfileModel(
                "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "CLIP-ViT-B-32-laion2B-s34B-b79K", "MIT", 151_277_313
            ),
            "caption": ProfileModel(
                "Salesforce/blip-image-captioning-base", "blip-image-captioning-base", "BSD-3-Clause", 223_971_644
            ),
            "match": ProfileModel("Salesforce/blip-itm-base-coco", "blip-itm-base-coco", "BSD-3-Clause", 223_744_258),
            "answer": _VILT_VQA,
        },
    ),
    "large": Profile(
        "photographs, the better captions and embeddings; a GPU of 16 GB",
        {
            "embed": _CLIP_LARGE,
            "caption": ProfileModel(
                "Salesforce/blip-image-captioning-large", "blip-image-captioning-large", "BSD-3-Clause", 446_290_492
            ),
            "match": _BLIP_ITM_LARGE,
            "answer": _BLIP_VQA,
        },
    ),
    "blip2": Profile(
        "photographs; BLIP-2 with Flan-T5 XL, captioner and matcher share one pass of ViT-g; a GPU of 24 GB",
        {
            "embed": _CLIP_LARGE,
            "caption": ProfileModel(
                "Salesforce/blip2-flan-t5-xl", "blip2-flan-t5-xl", "MIT", 3_942_446_592, "blip2_caption"
            ),
            "match": ProfileModel("Salesforce/blip2-itm-vit-g", "blip2-itm-vit-g", "MIT", 1_172_032_258, "blip2_itm"),
            "answer": _BLIP_VQA,
        },
    ),
    "git": Profile(
        "photographs; captions by GIT-large; a GPU of 16 GB",
        {
            "embed": _CLIP_LARGE,
            "caption": ProfileModel("microsoft/git-large-coco", "git-large-coco", "MIT", 394_196_026, "git"),
            "match": _BLIP_ITM_LARGE,
            "answer": _BLIP_VQA,
        },
    ),
    "flava": Profile(
        "photographs; embeddings and matches by FLAVA, captions by GIT-base; a GPU of 8 GB",
        {"embed": _FLAVA, "caption": _GIT_BASE, "match": _FLAVA, "answer": _VILT_VQA},
    ),
    "align": Profile(
        "photographs; embeddings and matches by ALIGN, which has no matching head: no caption_itm, no text_itm; "
        "captions by GIT-base; a GPU of 8 GB",
        {"embed": _ALIGN, "caption": _GIT_BASE, "match": _ALIGN, "answer": _VILT_VQA},
    ),
}


@dataclass(frozen=True)
class ModelStatus:
    """One model of a profile on this machine."""

    role: Role
    repo: str
    licence: str
    num_parameters: int
    size_bytes: int  # of the weights present, else of float32 weights
    folder: Path  # where the weights are expected
    present: bool
    problem: str = ""  # what is wrong with files that are there


@dataclass(frozen=True)
class ProfileStatus:
    """A profile on this machine."""

    name: str
    purpose: str
    models: tuple[ModelStatus, ...]


def resolve_models(job: Job) -> dict[str, ModelConfig]:
    """The model of each role that the job's tasks need: the profile's, unless the job names another.

    Raises:
        ConfigError: there is no such profile, it has no model for a role, or a model is of a family of another role.
        WeightsError: a local folder is absent, or holds no safetensors; it names the folder and what belongs there.
    """
    if job.profile not in PROFILES:
        raise ConfigError(f"profile {job.profile}: unknown", remedy=f"Use one of {', '.join(PROFILES)}.")
    configs: dict[str, ModelConfig] = {}
    for role in get_args(Role):
        if role not in job.tasks:
            continue
        config = job.models.get(role) or _profile_config(job.profile, role, job.models_dir)
        check_family(role, config)
        if config.path is not None:
            require_folder(config, licence=_licence(config))
        configs[role] = config
    return configs


def check_family(role: str, config: ModelConfig) -> None:
    """Refuses a model that cannot play its role.

    Raises:
        ConfigError: it belongs to the family of another role.
        FamilyError: the family is one's own, and cannot be used.
    """
    if is_own(config.family):
        roles = family_of(config.family).roles
        if role not in roles:
            raise FamilyError(
                f"models.{role}: family {config.family} is for {', '.join(roles)}",
                remedy=f"Name it under `models: {roles[0]}:`, or a class whose entry has the role {role}.",
            )
        return
    families = families_of(role)
    if config.family not in families:
        known = families[0] if len(families) == 1 else f"{', '.join(families[:-1])} or {families[-1]}"
        raise ConfigError(f"models.{role}: family {config.family}", remedy=f"Use a model of the family {known}.")


def describe_profiles(models_dir: Path | None = None) -> list[ProfileStatus]:
    """Every profile with its sizes, licences, and the folders where its weights are expected, present or not."""
    return [
        ProfileStatus(name, profile.purpose, tuple(_describe(name, role, models_dir) for role in profile.models))
        for name, profile in PROFILES.items()
    ]


def _describe(profile: str, role: Role, models_dir: Path | None) -> ModelStatus:
    model = PROFILES[profile].models[role]
    folder = Path(_profile_config(profile, role, models_dir).path or "")
    files, problem = [], ""
    try:
        files = find_weights(folder, model.family_as(role))
    except WeightsError as error:  # half-copied: the other models are told of all the same
        problem = str(error)
    size_bytes = sum(file.stat().st_size for file in files) if files else 4 * model.num_parameters
    return ModelStatus(role, model.repo, model.licence, model.num_parameters, size_bytes, folder, bool(files), problem)


def _profile_config(profile: str, role: Role, models_dir: Path | None) -> ModelConfig:
    model = PROFILES[profile].models.get(role)
    if model is None:
        raise ConfigError(
            f"profile {profile}: no model for {role}",
            remedy=f"Name one under `models: {role}:` in the job's file, leave {role} out, or use another profile.",
        )
    if profile == STARTER:
        root = Path(str(resources.files("vlmflow"))) / "starter"
    else:
        root = models_dir or default_models_dir()
    return ModelConfig(family=model.family_as(role), path=str(root / model.folder), repo=model.repo)


def _licence(config: ModelConfig) -> str | None:
    models = [model for profile in PROFILES.values() for model in profile.models.values()]
    return next((model.licence for model in models if model.repo == config.repo), None)

"""From a job to its tasks: what the driver settles once, and what a worker loads from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, assert_never

from vlmflow.catalog.detections import Detection
from vlmflow.config import Dtype, Job, ModelConfig, TaskName
from vlmflow.errors import ConfigError, WeightsError
from vlmflow.families import family_of
from vlmflow.imaging import PixelRequest, merge_requests
from vlmflow.imaging.pixels import VIEWS
from vlmflow.models import (
    ModelIdentity,
    identify,
    load_answerer,
    load_captioner,
    load_embedder,
    load_matcher,
    load_text_embedder,
    pixel_request,
    resolve_models,
)
from vlmflow.models.detectors import DetectorSetup, load_detector, prepare_detectors
from vlmflow.models.identity import short_digest
from vlmflow.models.prompts import prompt_of
from vlmflow.models.weights import expanded
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import Binding, Policy, check_binding, load_policy
from vlmflow.moderation.prompts import PromptVectors, encode_prompts
from vlmflow.moderation.scoring import SCORING_VERSION
from vlmflow.tasks import Task

if TYPE_CHECKING:
    from vlmflow.models.towers import VisionTowers

# Without --policy: the policy whose thresholds were set for the profile, else the general one.
_DEFAULT_POLICIES = {"starter": "demo"}
_GENERAL_POLICY = "marketplace"


@dataclass(frozen=True)
class TaskSetup:
    """What the files of models and policy say; made on the driver without loading a model, and can be pickled."""

    models: dict[str, ModelConfig]  # by role: embed, caption, match, answer
    identities: dict[str, ModelIdentity]
    requests: dict[str, PixelRequest]  # by role; none where the model reads regions of the source
    max_caption_tokens: int
    policy: Policy | None  # None: the job does not moderate
    binding: Binding | None  # None: every decision is `review`
    detectors: tuple[DetectorSetup, ...] = ()  # of the policy
    dtype: Dtype = "auto"
    questions: tuple[str, ...] = ()  # of the job
    num_beams: int = 1  # of a caption

    def read_regions(self, tasks: Collection[TaskName]) -> bool:
        """Whether a model of the tasks reads regions that the source has a column of."""
        return any(task in self.models and task not in self.requests for task in tasks)

    def fingerprints(self, tasks: tuple[TaskName, ...]) -> dict[str, str]:
        """What decides whether a task is due: its model and settings. The policy is compared apart from it."""
        return {task: self._fingerprint(task) for task in tasks}

    def embed_fingerprints(self) -> tuple[str, ...]:
        """Those of all vectors that the embedder makes, whatever the views of the job that stored them.

        The first is that of this job.
        """
        request = self.requests["embed"]
        whole = request.views[0]
        # In any order: before jobs put them into one, rows were marked with the order of their job file.
        chosen = (views for count in range(1, len(VIEWS) + 1) for views in permutations(VIEWS, count) if whole in views)
        others = [request, *(replace(request, views=views) for views in chosen)]
        setups = (replace(self, requests={**self.requests, "embed": other}) for other in others)
        return tuple(dict.fromkeys(other._fingerprint("embed") for other in setups))

    def pixel_requests(self) -> list[PixelRequest]:
        """What the models are shown."""
        return [*self.requests.values(), *(detector.request for detector in self.detectors)]

    def requests_of(self, tasks: Collection[TaskName]) -> list[PixelRequest]:
        """What the models of these tasks are shown, each once."""
        found = [self.requests[task] for task in tasks if task in self.requests]
        if "detect" in tasks:
            found += [detector.request for detector in self.detectors]
        return merge_requests(found)

    @property
    def detections(self) -> tuple[Detection, ...]:
        """What the detectors store of every image."""
        return tuple(
            Detection(detector.name, detector.fingerprint, output)
            for detector in self.detectors
            for output in detector.outputs
        )

    def _fingerprint(self, task: TaskName) -> str:
        match task:
            case "embed":
                views = self.requests["embed"].views
                return short_digest({"model": self.identities["embed"].fingerprint(task), "views": views})
            case "moderate":
                return short_digest({"embed": self._fingerprint("embed"), "scoring": SCORING_VERSION})
            case "detect":
                parts = [[detector.fingerprint, detector.request.views] for detector in self.detectors]
                return short_digest({"detectors": parts})
            case "caption":
                settings = {"max_tokens": self.max_caption_tokens} | self._asked("caption")
                if self.num_beams > 1:  # left out of greedy captions, which rows held before there were beams
                    settings["num_beams"] = self.num_beams
                return short_digest({"model": self.identities["caption"].fingerprint(task)} | settings)
            case "match":
                return self.identities["match"].fingerprint(task)
            case "answer":
                return short_digest({"model": self.identities["answer"].fingerprint(task)} | self._asked("answer"))
            case _:
                assert_never(task)

    @property
    def prompts(self) -> dict[str, str]:
        """What models are asked, by role; of those that take a prompt."""
        prompts = {role: prompt_of(role, config) for role, config in self.models.items()}
        return {role: prompt for role, prompt in prompts.items() if prompt is not None}

    def _asked(self, role: str) -> dict[str, object]:
        """What else decides the words of a model that takes a prompt; nothing for others."""
        if role not in self.prompts:
            return {}
        asked: dict[str, object] = {"prompt": self.prompts[role]}
        if role == "answer":
            asked["max_answer_tokens"] = self.models[role].max_answer_tokens
        return asked


def with_policy(job: Job) -> Job:
    """The job with the policy that it moderates under where it names none."""
    if "moderate" not in job.tasks or job.policy is not None:
        return job
    return job.model_copy(update={"policy": _DEFAULT_POLICIES.get(job.profile, _GENERAL_POLICY)})


def prepare_tasks(job: Job) -> TaskSetup:
    """Settles models and policy from their files, so that what is wrong with them shows before anything is read.

    Raises:
        ConfigError: unknown profile, `moderate` without a policy, a prompt that does not fit its role, or beams for a
            captioner that has none.
        WeightsError: weights that are absent, or files that cannot be used.
        PolicyError: the policy cannot be used.
        UnboundPolicyError: it was not set for the job's embedder, and ``accept_unbound`` is off.
        DetectorError: one of its detectors cannot run here.
    """
    models = resolve_models(job)
    for role, config in models.items():
        prompt_of(role, config)
    _check_beams(job, models)
    identities = {role: identify(role, config) for role, config in models.items()}
    policy = binding = None
    if "moderate" in job.tasks:
        if job.policy is None:
            raise ConfigError("policy: moderate needs one", remedy="Name it with --policy, or leave moderate out.")
        policy = load_policy(job.policy)
        binding = check_binding(policy, identities["embed"], accept_unbound=job.accept_unbound)
    detectors = prepare_detectors(policy, job.views) if policy else ()
    return TaskSetup(
        models={role: _wherever(config) for role, config in models.items()},
        identities=identities,
        requests=_requests(job, models),
        max_caption_tokens=job.max_caption_tokens,
        policy=policy,
        binding=binding,
        detectors=detectors,
        dtype=job.dtype,
        questions=job.questions,
        num_beams=job.num_beams,
    )


def _check_beams(job: Job, models: dict[str, ModelConfig]) -> None:
    captioner = models.get("caption")
    if job.num_beams > 1 and captioner is not None and not family_of(captioner.family).has_beams:
        raise ConfigError(
            f"num_beams: {job.num_beams}, but captioners of the family {captioner.family} search with no beams",
            remedy="Leave num_beams out, or caption with a model of another family.",
        )


def _wherever(config: ModelConfig) -> ModelConfig:
    """The model for processes that work in other folders: workers of a cluster are where it was started."""
    if config.path is None:
        return config
    return config.model_copy(update={"path": str(expanded(config.path).absolute())})


def _requests(job: Job, models: dict[str, ModelConfig]) -> dict[str, PixelRequest]:
    """The pixels of each role; none of those whose models read regions of the source."""
    requests = {}
    for role, config in models.items():
        request = pixel_request(role, config, job.views)
        if request is not None:
            requests[role] = request
        elif job.source.regions_column is None:
            raise ConfigError(
                f"models.{role}: {config.repo or config.path} reads regions from a column of the source",
                remedy="Name it with source.regions_column.",
            )
    return requests


def prepare_prompts(setup: TaskSetup) -> PromptVectors | None:
    """Encodes the policy's prompts, once per run: in float32 on the CPU, wherever the images are embedded.

    Returns:
        None: the job does not moderate.

    Raises:
        WeightsError: the embedder's weights do not fit, or were changed since the run was planned.
        FamilyError: the embedder is of one's own family, and fails.
    """
    if setup.policy is None:
        return None
    embedder = load_text_embedder(setup.models["embed"])
    check_unchanged(setup)
    return encode_prompts(setup.policy, embedder)


def check_unchanged(setup: TaskSetup) -> None:
    """Makes sure that models just loaded are those that were planned with: somebody may have written to their files.

    Raises:
        WeightsError: somebody has.
    """
    for role, config in setup.models.items():
        if identify(role, config) != setup.identities[role]:
            raise WeightsError(
                f"weights: {config.path or config.repo} has changed since it was looked at, before it was loaded",
                remedy="Try again, once nobody writes to the folder.",
            )


def load_task(
    name: TaskName, setup: TaskSetup, prompts: PromptVectors | None, device: str, towers: VisionTowers | None = None
) -> Task:
    """Loads a task and its model; in a worker.

    Args:
        towers: of the worker, given to all its tasks; None: the task shares no vision tower.

    Raises:
        WeightsError: the weights do not fit, or are not on this machine.
    """
    # Imported here: tasks import torch, which a driver that only plans does without.
    match name:
        case "embed":
            from vlmflow.tasks.embed import EmbedTask

            embedder = load_embedder(setup.models["embed"], device, setup.dtype, towers)
            return EmbedTask(embedder, setup.requests["embed"])
        case "moderate":
            from vlmflow.tasks.moderate import ModerateTask

            assert setup.policy is not None
            assert prompts is not None
            models = {detector.name: detector.fingerprint for detector in setup.detectors}
            return ModerateTask(Moderator(setup.policy, setup.binding, prompts, models))
        case "detect":
            from vlmflow.tasks.detect import DetectTask

            return DetectTask([(detector, load_detector(detector, device)) for detector in setup.detectors])
        case "caption":
            from vlmflow.tasks.caption import CaptionTask

            captioner = load_captioner(setup.models["caption"], device, setup.dtype, towers)
            return CaptionTask(captioner, setup.requests["caption"], setup.max_caption_tokens, setup.num_beams)
        case "match":
            from vlmflow.tasks.match import MatchTask

            matcher = load_matcher(setup.models["match"], device, setup.dtype, towers)
            return MatchTask(matcher, setup.requests.get("match"))
        case "answer":
            from vlmflow.tasks.answer import AnswerTask

            answerer = load_answerer(setup.models["answer"], device, setup.dtype, towers)
            return AnswerTask(answerer, setup.requests.get("answer"), setup.questions)
        case _:
            assert_never(name)

"""A family of one's own: what it may be, what is told of one that does not do, and what rows remember of it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.images import encode, scene
from tests.models import make_captioner, make_clip, random_pixels
from vlmflow.config import Job, ModelConfig, load_job
from vlmflow.engine.pipeline import _gpu_batch
from vlmflow.engine.prepare import prepare
from vlmflow.errors import ConfigError, FamilyError, ModelMemoryError, UnboundPolicyError, WeightsError
from vlmflow.families import family_of
from vlmflow.models import identify, load_captioner, load_embedder, load_matcher, resolve_models
from vlmflow.moderation.policy import bind, check_binding, load_policy
from vlmflow.search.query import Query, QueryEncoder
from vlmflow.tasks.setup import prepare_prompts, prepare_tasks

_NUMBERS = itertools.count()
CAPTIONER = """
from vlmflow.families import Family


class Captioner:
    family = Family(("caption",), code_version=1)

    def __init__(self, config):
        self.config = config

    @classmethod
    def load(cls, folder, config, device, dtype):
        return cls(config)

    def caption(self, pixels, max_tokens, num_beams=1):
        return [f"{self.config.prompt} {tuple(image.shape)}" for image in pixels]
"""
EMBEDDER = """
import numpy as np
from vlmflow.families import Family


class Embedder:
    family = Family(("embed",), code_version=1, weight_names=("open_clip_model.safetensors",), reader="open_clip")
    dim = 2

    @classmethod
    def load(cls, folder, config, device, dtype):
        return cls()

    def embed_images(self, pixels):
        return np.eye(1, 2, dtype=np.float32).repeat(len(pixels), 0)

    def embed_texts(self, texts):
        return np.eye(1, 2, dtype=np.float32).repeat(len(texts), 0)
"""


def with_fact(fact: str) -> str:
    """The captioner with another entry."""
    return CAPTIONER.replace("code_version=1", fact)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module, and gives its name, which no other test has."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def module(code: str) -> str:
        names.append(f"shop_{next(_NUMBERS)}")
        (tmp_path / f"{names[-1]}.py").write_text(code)
        return names[-1]

    yield module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioner(tmp_path_factory.mktemp("captioner") / "m")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "m")


def job(role: str, family: str, path: Path, **values: Any) -> Job:
    places = {"source": {"uri": "in"}, "catalog": {"uri": "out"}, "profile": "starter", "tasks": [role]}
    return Job.model_validate({**places, "models": {role: {"family": family, "path": str(path)}}, **values})


def test_it_captions_and_is_given_the_job_s_own_words(write: Callable[[str], str], folder: Path) -> None:
    name = f"{write(with_fact('code_version=1, takes_prompt=True'))}:Captioner"
    own = ModelConfig(family=name, path=str(folder), prompt="Sell it.")
    assert resolve_models(job("caption", name, folder))["caption"].family == name
    assert load_captioner(own, "cpu").caption(random_pixels(1), 8) == ["Sell it. (3, 32, 32)"]
    unsaid = load_captioner(own.model_copy(update={"prompt": None}), "cpu").caption(random_pixels(1), 8)
    assert unsaid == ["Describe this image in one sentence. (3, 32, 32)"], "what the fingerprint holds"
    settings = {
        prompt: prepare_tasks(
            job("caption", name, folder, models={"caption": own.model_copy(update={"prompt": prompt})})
        ).fingerprints(("caption",))["caption"]
        for prompt in ("Sell it.", "Praise it.")
    }
    assert len(set(settings.values())) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"class Captioner": "class Other"}, "Captioner is not there in"),
        ({"class Captioner:": "def Captioner():"}, "Captioner is no class"),
        ({"    family =": "    families ="}, "the class has no entry: `family` is nothing"),
        (
            {'Family(("caption",), code_version=1)': '"git"'},
            "the class has no entry: `family` is an object of type str",
        ),
        ({'("caption",)': "()"}, "the class has no entry: it names no role"),
        ({"def caption": "def describe"}, "the class has no method caption, and its roles are caption"),
        ({"def load": "def make"}, "the class has no method load"),
        ({'("caption",)': '("caption", "match")'}, "no method encode_images, match_itm, match_itc, and its roles are"),
        ({"code_version=1": "shares_tower=True"}, "shares_tower is for families of vlmflow"),
        ({"code_version=1": "adapters=('a:B',)"}, "adapters is for families of vlmflow"),
        ({"code_version=1": "version=1"}, "raises TypeError: Family.__init__() got an unexpected keyword"),
        ({"code_version=1": "code_version=0"}, "raises ValueError: code_version 0: a number from 1 on"),
        ({"code_version=1": "code_version='2'"}, "raises ValueError: code_version '2'"),
        ({'("caption",)': '("captions",)'}, "raises ValueError: roles ('captions',): a tuple of embed, caption,"),
        ({'("caption",)': '"caption"'}, "raises ValueError: roles 'caption'"),
        ({"code_version=1": "companion_names=('a/b',)"}, "raises ValueError: file 'a/b'"),
        ({"code_version=1": "weight_names='model.onnx'"}, "raises ValueError: weight_names, companion_names"),
        ({"code_version=1": "weight_names=()"}, "raises ValueError: weight_names, companion_names"),
        ({"code_version=1": "reader='mine'"}, "raises ValueError: reader 'mine': one of processor, classifier,"),
        ({"import Family": "import Family\nraise SystemExit(3)"}, "raises SystemExit: 3"),
        ({"import Family": "import Family\nimport no_such_package"}, "ModuleNotFoundError: No module named 'no_such"),
    ],
)
def test_what_does_not_do_is_told(write: Callable[[str], str], folder: Path, change: dict[str, str], told: str) -> None:
    code = CAPTIONER
    for old, new in change.items():
        assert old in code
        code = code.replace(old, new)
    if "no class" in told:
        code = "def Captioner():\n    pass\n"
    name = f"{write(code)}:Captioner"
    with pytest.raises(FamilyError) as caught:
        resolve_models(job("caption", name, folder))
    assert str(caught.value).startswith(f"family {name}: ")
    assert told in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("module", ["no_such_shop", "no_such_shop.models", "shop_of_nothing.captioner"])
def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop_of_nothing").mkdir()
    with pytest.raises(FamilyError, match=rf"family {module}:Captioner: there is no module (no_such_shop|{module})$"):
        family_of(f"{module}:Captioner")


def test_a_class_for_another_role(write: Callable[[str], str], folder: Path) -> None:
    name = f"{write(CAPTIONER)}:Captioner"
    with pytest.raises(FamilyError, match=rf"models\.match: family {name} is for caption") as caught:
        resolve_models(job("match", name, folder, source={"uri": "in", "text_column": "title"}))
    assert "models: caption:" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"models\.match: no adapter is loaded"):
        load_matcher(ModelConfig(family=name, path=str(folder)), "cpu")


@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        ("1 / 0", "load raises ZeroDivisionError: division by zero"),
        ("None", "load gives nothing without caption"),
        ("object()", "load gives an object of type object without caption"),
    ],
)
def test_a_load_that_fails(write: Callable[[str], str], folder: Path, loaded: str, told: str) -> None:
    name = f"{write(CAPTIONER.replace('cls(config)', loaded))}:Captioner"
    with pytest.raises(FamilyError, match=f"family {name}: {told}"):
        load_captioner(ModelConfig(family=name, path=str(folder)), "cpu")


def test_an_error_of_ours_that_load_meets_stays_what_it_is(write: Callable[[str], str], folder: Path) -> None:
    code = CAPTIONER.replace("return cls(config)", "from vlmflow.errors import WeightsError; raise WeightsError('no')")
    with pytest.raises(WeightsError, match=r"^no$"):
        load_captioner(ModelConfig(family=f"{write(code)}:Captioner", path=str(folder)), "cpu")


def test_a_load_that_finds_no_memory_is_no_fault_of_the_module(write: Callable[[str], str], folder: Path) -> None:
    name = f"{write(CAPTIONER.replace('return cls(config)', 'raise MemoryError'))}:Captioner"
    with pytest.raises(ModelMemoryError, match=r"^the model of caption does not fit in the memory of this machine$"):
        load_captioner(ModelConfig(family=name, path=str(folder)), "cpu")


def test_an_embedder_says_how_many_dimensions_it_has(write: Callable[[str], str], clip: Path) -> None:
    name = f"{write(EMBEDDER.replace('dim = 2', 'dim = None'))}:Embedder"
    with pytest.raises(
        FamilyError, match="load gives an object of type Embedder without dim, the number of dimensions"
    ):
        load_embedder(ModelConfig(family=name, path=str(clip)), "cpu")


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ("np.eye(1, 3, dtype=np.float32)", r"embed_texts raises ValueError: the model gave vectors of shape \(1, 3\)"),
        (
            "np.eye(1, 2, dtype=np.float32).repeat(len(texts), 0) * np.nan",
            "embed_texts raises ValueError: .* not finite",
        ),
        ("[]", r"embed_texts raises ValueError: the model gave vectors of shape \(0,\)"),
        ("1 / 0", "embed_texts raises ZeroDivisionError"),
    ],
)
def test_texts_that_are_not_embedded_end_the_run_and_the_query(
    write: Callable[[str], str], clip: Path, texts: str, told: str
) -> None:
    head, mark, tail = EMBEDDER.rpartition("return ")
    name = f"{write(head + mark + texts)}:Embedder"
    assert "texts" in tail
    own = job("embed", name, clip, tasks=["embed", "moderate"], policy="demo", accept_unbound=True)
    encoders = (
        lambda: prepare_prompts(prepare_tasks(own)),
        lambda: QueryEncoder(own).encode(Query(text="a dog")),
        lambda: load_embedder(own.models["embed"], "cpu").embed_texts(["a dog", "a cat"]),  # as `evaluate` does
    )
    for embed in encoders:
        with pytest.raises(FamilyError, match=f"family {name}: {told}") as caught:
            embed()
        assert caught.value.remedy


def test_an_image_that_is_looked_for_and_not_embedded(write: Callable[[str], str], clip: Path, tmp_path: Path) -> None:
    code = EMBEDDER.replace("return np.eye(1, 2, dtype=np.float32).repeat(len(pixels), 0)", "return 1 / 0")
    name = f"{write(code)}:Embedder"
    encoder = QueryEncoder(job("embed", name, clip))
    with pytest.raises(FamilyError, match=f"family {name}: embed_images raises ZeroDivisionError"):
        encoder.encode(Query(image=encode(scene(), "PNG")))


def test_thresholds_of_another_class_over_the_same_weights_are_not_its_own(
    write: Callable[[str], str], clip: Path
) -> None:
    ours = identify("embed", ModelConfig(family="open_clip", path=str(clip)))
    policy = load_policy("demo")
    policy = policy.model_copy(update={"bindings": (bind(policy, ours),)})
    assert check_binding(policy, ours) is not None
    name = f"{write(EMBEDDER)}:Embedder"
    own = identify("embed", ModelConfig(family=name, path=str(clip)))
    with pytest.raises(UnboundPolicyError):
        check_binding(policy, own)
    prompts = prepare_prompts(
        prepare_tasks(job("embed", name, clip, tasks=["embed", "moderate"], policy="demo", accept_unbound=True))
    )
    assert prompts is not None
    np.testing.assert_array_equal(prompts.labels[:, 0], 1)


def test_a_fingerprint_holds_name_version_and_files(write: Callable[[str], str], tmp_path: Path) -> None:
    path = make_captioner(tmp_path / "m")
    (path / "words.txt").write_text("cheap")
    codes = {
        "as it is": CAPTIONER,
        "in another module": CAPTIONER,
        "raised": with_fact("code_version=2"),
        "with words": with_fact("companion_names=('words.txt',)"),
    }
    configs = {what: ModelConfig(family=f"{write(code)}:Captioner", path=str(path)) for what, code in codes.items()}
    found = {what: identify("caption", config).fingerprint("caption") for what, config in configs.items()}
    assert len(set(found.values())) == len(codes)
    assert identify("caption", configs["as it is"]).fingerprint("caption") == found["as it is"]
    (path / "words.txt").write_text("dear")
    again = {what: identify("caption", config).fingerprint("caption") for what, config in configs.items()}
    assert [what for what in codes if again[what] != found[what]] == ["with words"]


def test_rows_and_records_tell_the_class(write: Callable[[str], str], folder: Path) -> None:
    name = f"{write(CAPTIONER)}:Captioner"
    assert prepare(job("caption", name, folder)).model_names() == {"caption": f"{name}(m)@local"}
    assert prepare(job("caption", "blip_caption", folder)).model_names() == {"caption": "m@local"}


def test_weights_of_another_kind_are_looked_for_by_their_name(write: Callable[[str], str], tmp_path: Path) -> None:
    path = make_captioner(tmp_path / "m")
    code = with_fact("weight_names=('model.onnx',)")
    name = f"{write(code)}:Captioner"
    with pytest.raises(WeightsError, match=r"no file model\.onnx in"):
        resolve_models(job("caption", name, path))
    (path / "model.onnx").write_bytes(b"onnx")
    before = identify("caption", ModelConfig(family=name, path=str(path)))
    (path / "model.onnx").write_bytes(b"other onnx")
    assert identify("caption", ModelConfig(family=name, path=str(path))).weights_digest != before.weights_digest


def test_facts_of_the_entry_count(write: Callable[[str], str], folder: Path) -> None:
    small, greedy = (f"{write(with_fact(fact))}:Captioner" for fact in ("is_small=True", "has_beams=False"))
    assert _gpu_batch(prepare_tasks(job("caption", small, folder))) > _gpu_batch(
        prepare_tasks(job("caption", greedy, folder))
    )
    with pytest.raises(ConfigError, match=f"captioners of the family {greedy} search with no beams"):
        prepare_tasks(job("caption", greedy, folder, num_beams=2))
    words = {"caption": {"family": small, "path": str(folder), "prompt": "Sell it."}}
    with pytest.raises(ConfigError, match=rf"models\.caption\.prompt: the family {small} takes none"):
        prepare_tasks(job("caption", small, folder, models=words))


def test_a_job_that_names_it_imports_nothing(write: Callable[[str], str], folder: Path) -> None:
    name = f"{write('raise RuntimeError')}:Captioner"
    own = job("caption", name, folder)
    assert own.models["caption"].family == name
    with pytest.raises(FamilyError, match=r"importing shop_[0-9]+ raises RuntimeError"):
        resolve_models(own)


@pytest.mark.parametrize(
    "family", ["shop/captioner.py:Captioner", ":Captioner", "shop:", "shop:a.B", "shop: B", "shop"]
)
def test_what_names_no_class_is_told_in_the_job_s_file(family: str) -> None:
    places = {"source": {"uri": "a"}, "catalog": {"uri": "b"}, "profile": "starter"}
    with pytest.raises(ConfigError, match=r"no family is called .*; there are open_clip, .*, and your own as module:C"):
        load_job(None, {**places, "models": {"caption": {"family": family}}})


def test_names_of_architectures_are_open_clip_s() -> None:
    places = {"source": {"uri": "a"}, "catalog": {"uri": "b"}, "profile": "starter"}
    with pytest.raises(ConfigError, match="no family of your own takes it"):
        load_job(None, {**places, "models": {"embed": {"family": "shop:Embedder", "architecture": "ViT-B-32"}}})

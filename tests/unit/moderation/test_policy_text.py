"""A binding or a new version goes into a policy file however people have written it, or the file stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmflow.errors import PolicyError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import bind, load_policy, next_version, write_binding, write_version

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
HEAD = """# kept
name: one
version: "1" # first
neutral: [n]
categories:
  - name: c
    labels:
      - {name: l, prompts: [p], review: 0.5, block: 0.9}
logistic: {scale: 1.0, offset: 0.0}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "spelled",
    [
        "spring 2026",
        "2026 spring",
        "v1#2",
        "'it''s 1'",
        '"a \\"1\\""',
        '"C:\\\\1"',
        "1a\\d",
        "v\\g<0>",
        "!!str 1",
        '&v "1"',
        ">-\n  v\n  1",
        "|\n  v1",
        '"v\n  1"',
        "“é” 1 😀",
    ],
)
def test_a_version_counts_up_however_it_is_spelled(tmp_path: Path, spelled: str) -> None:
    path = written(tmp_path, HEAD.replace('"1"', spelled) + "bindings: []\n")
    before = load_policy(str(path))
    after = write_version(path, tmp_path / "next.yaml", bind(before, CLIP))
    assert after == before.model_copy(
        update={"version": next_version(before.version), "bindings": (bind(before, CLIP),)}
    )
    assert (tmp_path / "next.yaml").read_text(encoding="utf-8").startswith("# kept\n")


@pytest.mark.parametrize(
    "tail",
    [
        "bindings: []",
        '"bindings": []\n',
        "bindings : [] # none\n# end\n",
        "bindings: [\n]\n...\n",
        'description: "a\nbindings: []"\nbindings: []\n',
    ],
)
def test_a_binding_goes_where_the_key_is(tmp_path: Path, tail: str) -> None:
    path = written(tmp_path, HEAD + tail)
    before = load_policy(str(path))
    write_binding(path, bind(before, CLIP))
    assert load_policy(str(path)) == before.model_copy(update={"bindings": (bind(before, CLIP),)})
    assert path.read_text(encoding="utf-8").startswith(HEAD)


@pytest.mark.parametrize(
    "text",
    [
        HEAD.replace('version: "1"', '<<: {version: "1"}') + "bindings: []\n",
        HEAD.replace("one", "&v one").replace('"1"', "*v") + "bindings: []\n",
        HEAD + "? bindings\n: []\n",
        "".join(f"  {line}\n" for line in [*HEAD.splitlines(), "bindings: []"]),
    ],
)
def test_where_none_fits_in_no_file_is_written(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PolicyError, match="can be put in"):
        write_version(path, tmp_path / "next.yaml", bind(load_policy(str(path)), CLIP))
    assert not (tmp_path / "next.yaml").exists()
    assert path.read_text(encoding="utf-8") == text

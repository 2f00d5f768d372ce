"""Filters as the query of a url, and back."""

from __future__ import annotations

import pytest

from tests.hostile import HOSTILE
from vlmflow.errors import ConfigError
from vlmflow.web.filters import Filter, url


def test_a_filter_is_read_from_its_own_address() -> None:
    wanted = Filter.of(
        [("decision", "block"), ("label", "a/b"), ("decision", "review"), ("where", " width > 5 "), ("q", "dog")]
    )
    assert wanted.chosen == (("decision", ("block", "review")), ("label", ("a/b",)))
    assert (wanted.where, wanted.find, wanted.sort) == ("width > 5", "", "new")
    assert Filter.of(wanted.pairs()) == wanted


def test_a_value_is_chosen_and_given_up_again() -> None:
    wanted = Filter.of([("status", "ok")])
    both = wanted.toggled("decision", "block")
    assert both.pairs() == [("decision", "block"), ("status", "ok"), ("sort", "new")]
    assert both.toggled("decision", "block") == wanted
    assert not wanted.toggled("status", "ok")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_values_survive_the_way_through_a_url(text: str) -> None:
    from urllib.parse import parse_qsl, urlsplit

    made = url("/", [("label", text)])
    assert not set(made) & set("<>\"' \n")
    ((name, value),) = parse_qsl(urlsplit(made).query, keep_blank_values=True)
    assert (name, value) == ("label", text.encode("utf-8", "replace").decode())


@pytest.mark.parametrize(
    "pairs",
    [[("where", "x" * 5_000)], [("sort", "size")], [("label", f"l{number}") for number in range(60)]],
    ids=["long", "unknown order", "many"],
)
def test_what_is_too_much_or_unknown_is_refused(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(ConfigError):
        Filter.of(pairs)

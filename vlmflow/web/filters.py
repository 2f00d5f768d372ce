"""What a person narrows the rows down to, and its address in the query of a url."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from vlmflow.errors import ConfigError
from vlmflow.web.facts import FACETS, LISTS

ALL_FACETS = ("decision", "label", "status", "verdict", "error", "policy", "date")
SORTS = {
    "new": "newest first",
    "near": "nearest to a threshold first",
    "match": "text that fits its image least first",
    "random": "in random order",
}
_FIELDS = {"find": "Address contains", "where": "Condition in SQL"}  # as the page calls them
_MAX_CHARS = 4_000
_MAX_CHOICES = 50

assert {*FACETS, *LISTS} == set(ALL_FACETS)


@dataclass(frozen=True)
class Filter:
    """Which rows, and in what order.

    Attributes:
        chosen: facets with the values of which a row has one.
        find: a text that the address holds, in any case.
        where: a condition in SQL.
    """

    chosen: tuple[tuple[str, tuple[str, ...]], ...] = ()
    find: str = ""
    where: str = ""
    sort: str = "new"

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]], *, sort: str = "new") -> Filter:
        """Reads the query of a url; what else stands in it is passed over.

        Args:
            sort: where the query names none.

        Raises:
            ConfigError: a value is too long, or an order is not known.
        """
        chosen: dict[str, list[str]] = {}
        texts = {"find": "", "where": "", "sort": sort}
        for name, value in pairs:
            if len(value) > _MAX_CHARS:
                field = _FIELDS.get(name, name)
                raise ConfigError(f"{field} has {len(value):,} characters", remedy=f"Write at most {_MAX_CHARS:,}.")
            if name in ALL_FACETS and value not in chosen.setdefault(name, []):
                chosen[name].append(value)
            elif name in texts and value.strip():
                texts[name] = value.strip()
        if sum(map(len, chosen.values())) > _MAX_CHOICES:
            raise ConfigError("too many filters at once", remedy=f"Choose at most {_MAX_CHOICES}.")
        if texts["sort"] not in SORTS:
            raise ConfigError(f"sort {texts['sort'][:40]!r}", remedy=f"Sort by {', '.join(SORTS)}.")
        ordered = tuple((facet, tuple(chosen[facet])) for facet in ALL_FACETS if facet in chosen)
        return cls(ordered, **texts)

    def values(self, facet: str) -> tuple[str, ...]:
        """The chosen values of a facet."""
        return dict(self.chosen).get(facet, ())

    def toggled(self, facet: str, value: str) -> Filter:
        """The filter with a value chosen, or no longer."""
        held = self.values(facet)
        values = tuple(one for one in held if one != value) if value in held else (*held, value)
        chosen = dict(self.chosen) | {facet: values}
        return replace(self, chosen=tuple((name, chosen[name]) for name in ALL_FACETS if chosen.get(name)))

    def pairs(self) -> list[tuple[str, str]]:
        """The names and values of the url."""
        found = [(facet, value) for facet, values in self.chosen for value in values]
        texts = {"find": self.find, "where": self.where, "sort": self.sort}
        return found + [(name, value) for name, value in texts.items() if value]

    @property
    def rows(self) -> Filter:
        """What decides which rows there are, whatever their order: a key for caches."""
        return replace(self, sort="new")

    def __bool__(self) -> bool:
        return bool(self.chosen or self.find or self.where)


def url(path: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A path with a query; parts without a value are left out, but for facets: no error is a value too."""
    query = urlencode([pair for pair in pairs if pair[1] or pair[0] in ALL_FACETS], errors="replace")
    return f"{path}?{query}" if query else path

"""The things that the starter world holds: names, categories, and which of them the demo policy flags."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "black": (22, 22, 26),
    "gray": (136, 138, 142),
    "red": (206, 38, 42),
    "orange": (242, 134, 24),
    "yellow": (248, 218, 54),
    "green": (46, 150, 66),
    "blue": (38, 92, 204),
    "purple": (124, 58, 168),
    "pink": (246, 152, 190),
}
COUNT_WORDS = ("one", "two", "three", "four")

# Things of one kind: "category: name=icon, ...". An icon is the CLDR short name as Iconify spells it;
# it is left out where it equals the name. Plural-only words (scissors) are left out: they cannot be counted.
_SMALL = """
food: apple=red-apple, banana, strawberry, carrot, pizza, hamburger, cake=birthday-cake, doughnut, mushroom, watermelon
animal: cat, dog, horse, rabbit, elephant, penguin, fish=tropical-fish, turtle, butterfly
clothing: shirt=t-shirt, dress, hat=top-hat, boot=womans-boot, sneaker=running-shoe, handbag, crown
vehicle: car=automobile, bus, bicycle, airplane, sailboat, tractor, helicopter, rocket
tool: hammer, wrench, key, pencil
electronics: laptop, telephone, television, camera, watch
household: bed, couch=couch-and-lamp, toilet, clock=alarm-clock, umbrella, book=closed-book
toy: balloon, soccer ball=soccer-ball
instrument: guitar, drum, violin, trumpet
plant: sunflower, cactus, tree=evergreen-tree
"""
_FLAGGED = """
weapon: dagger, knife=kitchen-knife, bow=bow-and-arrow, bomb
alcohol: wine glass=wine-glass, beer mug=beer-mug, cocktail=cocktail-glass
alcohol: champagne bottle=bottle-with-popping-cork, whiskey glass=tumbler-glass
gambling: dice=game-die, slot machine=slot-machine, playing card=joker
tobacco: cigarette
death: skull, coffin, gravestone=headstone
"""
_UNSEEN = """
food: lemon, pear
animal: fox, snail
clothing: ring
vehicle: motorcycle
tool: nut=nut-and-bolt
electronics: radio
household: candle
instrument: bell
"""
FLAGGED_CATEGORIES = ("weapon", "alcohol", "gambling", "tobacco", "death")

# What the full world takes: whole emojibase subgroups of things that a catalog could hold.
_FULL_SUBGROUPS = {
    "animal-mammal": "animal", "animal-bird": "animal", "animal-amphibian": "animal", "animal-reptile": "animal",
    "animal-marine": "animal", "animal-bug": "animal", "plant-flower": "plant", "plant-other": "plant",
    "food-fruit": "food", "food-vegetable": "food", "food-prepared": "food", "food-asian": "food",
    "food-sweet": "food", "drink": "drink", "dishware": "household", "transport-ground": "vehicle",
    "transport-water": "vehicle", "transport-air": "vehicle", "event": "toy", "award-medal": "toy",
    "sport": "sport", "game": "toy", "arts-crafts": "toy", "clothing": "clothing", "music": "electronics",
    "musical-instrument": "instrument", "phone": "electronics", "computer": "electronics",
    "light-video": "electronics", "book-paper": "stationery", "writing": "stationery", "office": "stationery",
    "lock": "tool", "tool": "tool", "science": "tool", "medical": "tool", "household": "household",
    "other-object": "household",
}  # fmt: skip
# The older picture sets end here: later things have three or four drawings.
_LATEST_EMOJI = 3
_PLURALS = {
    "fish": "fish", "knife": "knives", "dice": "dice", "strawberry": "strawberries", "butterfly": "butterflies",
    "sheep": "sheep", "mouse": "mice", "goose": "geese", "deer": "deer", "ox": "oxen", "leaf": "leaves",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One nameable thing. ``icon``: its CLDR short name as in the icon sets."""

    name: str
    category: str
    icon: str

    @property
    def flagged(self) -> bool:
        """Whether the demo policy must flag a picture of it."""
        return self.category in FLAGGED_CATEGORIES

    @property
    def plural(self) -> str:
        *head, last = self.name.split(" ")
        return " ".join([*head, _plural_word(last)])

    @property
    def article(self) -> str:
        # "a unicycle", "a ukulele": a u that is read as "you" takes "a".
        vowel = self.name[0] in "aeio" or (self.name[0] == "u" and self.name[:3] not in ("uni", "uku", "uti"))
        return "an" if vowel else "a"


@dataclass(frozen=True)
class World:
    """Everything that fixes the data: the concepts, and the side of the pictures."""

    name: str
    side_px: int
    concepts: tuple[Concept, ...]
    unseen: tuple[Concept, ...]

    @property
    def all_concepts(self) -> tuple[Concept, ...]:
        return self.concepts + self.unseen


def small_world() -> World:
    """74 concepts (16 of them flagged) and 10 never trained on, at 64 px: an hour or two on two CPU cores."""
    return World("small", 64, (*_parse(_SMALL), *_parse(_FLAGGED)), tuple(_parse(_UNSEEN)))


def full_world(emojibase: Path) -> World:
    """300 to 400 concepts at 96 px, chosen from emojibase's subgroups: for one GPU.

    Args:
        emojibase: the unpacked ``emojibase-data`` package.
    """
    groups = json.loads((emojibase / "meta" / "groups.json").read_text())["subgroups"]
    small = small_world()
    named = {concept.icon: concept for concept in small.all_concepts}
    unseen_icons = {concept.icon for concept in small.unseen}
    concepts = dict.fromkeys(c for c in small.concepts if c.flagged)
    for entry in json.loads((emojibase / "en" / "data.json").read_text()):
        category = _FULL_SUBGROUPS.get(groups.get(str(entry.get("subgroup")), ""))
        icon = icon_name(entry["label"])
        if category is None or icon in unseen_icons or not _is_countable(entry["label"]):
            continue
        if entry["version"] > _LATEST_EMOJI and icon not in named:
            continue
        concepts[named.get(icon, Concept(entry["label"].lower(), category, icon))] = None
    return World("full", 96, tuple(concepts), small.unseen)


def icon_name(label: str) -> str:
    """A CLDR short name as Iconify spells it: ``woman's boot`` -> ``womans-boot``."""
    kept = "".join(ch for ch in label.lower() if ch.isalnum() or ch in " -")
    return "-".join(kept.replace("-", " ").split())


def _is_countable(label: str) -> bool:
    # Faces double whole animals, and words that exist in the plural alone cannot be counted.
    words = label.lower().replace("-", " ").split()
    return (
        len(words) <= 2
        and all(word.isascii() and word.isalpha() for word in words)
        and words[-1] not in ("face", "glasses", "scissors", "jeans", "shorts")
        and (not words[-1].endswith("s") or words[-1] in ("octopus", "cactus", "bus", "dress", "lotus"))
    )


def _plural_word(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    if word.endswith(("s", "ch", "sh", "x")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _parse(table: str) -> Iterable[Concept]:
    for line in table.strip().splitlines():
        category, names = line.split(":")
        for entry in names.split(","):
            name, _, icon = entry.strip().partition("=")
            yield Concept(name, category.strip(), icon or name)

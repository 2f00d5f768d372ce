"""Drawings out of npm packages: fetched by name and version, drawn, cropped, kept as premultiplied RGBA.

Run ``python -m benchmarks.starter.sources`` to fill the work folder; every other step calls it when it is empty.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from benchmarks.starter.concepts import Concept, World, full_world, icon_name, small_world

WORK_FOLDER = Path("build/starter")
DRAWING_PX = 160
EMOJIBASE = "emojibase-data@17.0.0"
_MIN_ALPHA = 8


@dataclass(frozen=True)
class Artist:
    """One picture set. ``package``: npm name@version; ``design``: sets with equal designs are one artist."""

    name: str
    package: str
    licence: str
    design: str


ARTISTS = (
    Artist("twemoji", "@iconify-json/twemoji@1.2.5", "CC BY 4.0", "Twemoji, by Twitter and contributors"),
    Artist("noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Noto Emoji, by Google"),
    Artist("noto-v1", "@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Noto Emoji (v1), by Google"),
    Artist("fluent-flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Fluent Emoji Flat, by Microsoft"),
    Artist("fluent-3d", "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "Fluent Emoji 3D, by Microsoft, packed by LobeHub"),
    Artist("emojitwo", "@iconify-json/emojione@1.2.3", "CC BY 4.0", "EmojiTwo / Emoji One (v2), by Emoji One"),
    Artist("streamline", "@iconify-json/streamline-emojis@1.2.4", "CC BY 4.0", "Streamline Emojis, by Streamline"),
)
HELD_OUT = Artist("fxemoji", "@iconify-json/fxemoji@1.2.2", "Apache-2.0", "FxEmojis, by Mozilla")

# FxEmojis uses names of its own; the rest are the CLDR names without hyphens.
_FX_NAMES = {
    "pizza": "sliceofpizza", "horse": "horseface", "rabbit": "bunny", "running-shoe": "mensshoe",
    "t-shirt": "mansshirt", "womans-boot": "boot", "airplane": "airplane", "laptop": "personalcomputer",
    "telephone": "blacktelephone", "umbrella": "umbrella", "evergreen-tree": "evergreen",
    "soccer-ball": "soccerball", "dagger": "daggerknife", "kitchen-knife": "hocho",
    "joker": "playingcardblackjoker", "cigarette": "smokingsymbol", "cow": "cowface",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One artist's picture of one concept. ``svg``: its text, None for a set that ships bitmaps."""

    concept: Concept
    artist: str
    svg: str | None
    bitmap: Path | None

    def render(self, size_px: int) -> Image.Image:
        """Draws it, cropped to what is visible; the longest side has ``size_px``; premultiplied (``RGBa``)."""
        if self.svg is not None:
            raw = bytes(resvg_py.svg_to_bytes(svg_string=self.svg, width=size_px * 5 // 4))
            image = Image.open(io.BytesIO(raw)).convert("RGBA")
        else:
            assert self.bitmap is not None
            image = Image.open(self.bitmap).convert("RGBA")
        # Lossy WebP leaves colours under alpha 0: crop by alpha alone, resize premultiplied.
        visible = image.getchannel("A").point(lambda a: 255 if a >= _MIN_ALPHA else 0).getbbox()
        image = image.crop(visible).convert("RGBa")
        scale = size_px / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)


def fetch(package: str, work: Path) -> Path:
    """Fetches and unpacks one npm package ``name@version`` once; returns its folder.

    Raises:
        subprocess.CalledProcessError: npm could not fetch it.
    """
    folder = work / "npm" / package.replace("/", "-").replace("@", "-").strip("-")
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
        archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(folder / archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def load_world(name: str, work: Path = WORK_FOLDER) -> World:
    """The world ``small`` or ``full``."""
    return small_world() if name == "small" else full_world(fetch(EMOJIBASE, work))


def find_drawings(world: World, artist: Artist, work: Path = WORK_FOLDER) -> Iterator[Drawing]:
    """Yields the artist's drawing of every concept (the unseen ones included) that the set holds."""
    folder = fetch(artist.package, work)
    if artist.name == "fluent-3d":
        codes = _hexcodes(fetch(EMOJIBASE, work))
        for concept in world.all_concepts:
            # The set keeps the emoji variation selector in a file's name where emojibase drops it.
            code = codes.get(concept.icon, "none")
            paths = [folder / "assets" / f"{code}{suffix}.webp" for suffix in ("", "-fe0f")]
            for path in filter(Path.is_file, paths):
                yield Drawing(concept, artist.name, None, path)
                break
        return
    icons = json.loads((folder / "icons.json").read_text())
    for concept in world.all_concepts:
        for name in _names(artist, concept.icon):
            name = icons.get("aliases", {}).get(name, {}).get("parent", name)
            if name in icons["icons"]:
                yield Drawing(concept, artist.name, _svg(icons, icons["icons"][name]), None)
                break


@dataclass(frozen=True)
class DrawingSet:
    """Rendered drawings.

    ``pixels``: (D, 160, 160, 4) uint8 premultiplied RGBA, in the upper left corner; ``sizes``: (D, 2) width, height;
    ``concepts``: (D,) indexes into ``World.all_concepts``.
    """

    pixels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    concepts: npt.NDArray[np.int64]
    artists: list[str]


def build_drawings(world: World, work: Path = WORK_FOLDER) -> DrawingSet:
    """Renders every drawing of the world once and keeps the result; ``concepts`` index ``world.all_concepts``."""
    path = work / f"drawings-{world.name}.npz"
    if not path.is_file():
        _render_all(world, work, path)
    index = {concept.name: number for number, concept in enumerate(world.all_concepts)}
    with np.load(path) as stored:
        concepts = np.array([index[name] for name in stored["names"].tolist()])
        return DrawingSet(stored["pixels"], stored["sizes"], concepts, stored["artists"].tolist())


def _render_all(world: World, work: Path, path: Path) -> None:
    pixels, sizes, names, artists = [], [], [], []
    for artist in (*ARTISTS, HELD_OUT):
        for drawing in find_drawings(world, artist, work):
            image = drawing.render(DRAWING_PX)
            cell = np.zeros((DRAWING_PX, DRAWING_PX, 4), np.uint8)
            cell[: image.height, : image.width] = np.asarray(image)
            pixels.append(cell)
            sizes.append(image.size)
            names.append(drawing.concept.name)
            artists.append(artist.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, pixels=pixels, sizes=sizes, names=names, artists=artists)


def _names(artist: Artist, icon: str) -> tuple[str, ...]:
    if artist.name == "fxemoji":
        return (_FX_NAMES.get(icon, icon.replace("-", "")), icon)
    if artist.name == "streamline":
        return (icon, f"{icon}-1", {"game-die": "game-dice"}.get(icon, f"{icon}-face"))
    return (icon,)


def _svg(icons: dict[str, object], icon: dict[str, object]) -> str:
    # Iconify keeps a set's usual size once, an icon's own size only where it differs; both default to 16.
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


@cache
def _hexcodes(emojibase: Path) -> dict[str, str]:
    entries = json.loads((emojibase / "en" / "data.json").read_text())
    return {icon_name(entry["label"]): entry["hexcode"].lower() for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("small", "full"), default="small")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    options = parser.parse_args()
    world = load_world(options.world, options.work)
    drawings = build_drawings(world, options.work)
    print(f"{len(world.concepts)} concepts, {len(world.unseen)} unseen, {len(drawings.artists)} drawings")
    for artist in (*ARTISTS, HELD_OUT):
        have = {int(c) for c, a in zip(drawings.concepts, drawings.artists, strict=True) if a == artist.name}
        lacking = [c.name for number, c in enumerate(world.all_concepts) if number not in have]
        print(f"{artist.name}: {len(have)}; lacks {', '.join(lacking) if len(lacking) < 60 else len(lacking)}")


if __name__ == "__main__":
    main()

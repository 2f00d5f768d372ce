"""Makes the demo catalog: ``python -m benchmarks.starter.demo``. Seeded; scenes that training never saw.

About 200 pictures as a merchant's feed would bring them: many sizes, shapes and formats, a tenth of the titles wrong,
some things that the demo policy must flag, and some files that are broken. ``manifest.csv`` is what the merchant
sends; ``truth.csv`` is what only the maker knows.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.starter.captions import Writer
from benchmarks.starter.concepts import COLORS, World, small_world
from benchmarks.starter.scenes import COLOR_NAMES, Scene, SceneSampler, boxes, place
from benchmarks.starter.sources import ARTISTS, WORK_FOLDER, Drawing, find_drawings

TARGET = Path("vlmflow/starter/demo")
NUM_PICTURES = 196
NUM_FLAGGED = 40
NUM_WRONG = 20
_SEED = 20_260
_STEP = 1 << 41  # far from the steps of training and of evaluation
_SHAPES = (((1, 1), 0.5), ((4, 3), 0.16), ((3, 4), 0.14), ((3, 2), 0.1), ((2, 3), 0.1))
_LONG_SIDES = ((240, 0.2), (360, 0.25), (500, 0.25), (700, 0.15), (900, 0.1), (1200, 0.05))
_FORMATS = (("jpg", 0.42), ("png", 0.2), ("webp", 0.18), ("gif", 0.05), ("bmp", 0.03), ("tiff", 0.06), ("avif", 0.06))
_OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "jpg": ("JPEG", {"quality": 82}),
    "png": ("PNG", {"optimize": True}),
    "webp": ("WEBP", {"quality": 80}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "avif": ("AVIF", {"quality": 60}),
}
_TITLES = ("{things} on {color}", "{things} on a {color} background", "a picture of {things}", "{things}")
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><circle cx="32" cy="32" r="30"/></svg>\n'


@dataclass(frozen=True)
class Entry:
    """One file of the catalog. ``note``: what is special about it, empty mostly."""

    uri: str
    data: bytes
    title: str
    is_title_wrong: bool
    must_flag: bool
    decodes: bool = True
    note: str = ""


class DemoMaker:
    """Draws entries one after another from one stream of random numbers."""

    def __init__(self, world: World, work: Path) -> None:
        self._world, self._writer = world, Writer(world)
        self._drawings: dict[int, list[Drawing]] = {}
        index = {concept: number for number, concept in enumerate(world.all_concepts)}
        for artist in ARTISTS:
            for drawing in find_drawings(world, artist, work):
                self._drawings.setdefault(index[drawing.concept], []).append(drawing)
        self._sampler = SceneSampler(world, range(len(world.concepts)), _SEED)
        self._rng = self._sampler.rng(_STEP, purpose=3)

    def entries(self) -> Iterator[Entry]:
        """All entries in the order of the manifest."""
        scenes = self._scenes()
        wrong = set(self._rng.choice(len(scenes), NUM_WRONG, replace=False).tolist())
        for number, scene in enumerate(scenes):
            title = self._title(self._other_thing(scene, scenes) if number in wrong else scene)
            yield self._plain(number, scene, title, number in wrong)
        yield from self._special(scenes)

    def _scenes(self) -> list[Scene]:
        flagged = [s for s in self._sampler.sample(400, _STEP) if self._must_flag(s)][:NUM_FLAGGED]
        harmless = [s for s in self._sampler.sample(600, _STEP + 1) if not self._must_flag(s)]
        scenes = flagged + harmless[: NUM_PICTURES - NUM_FLAGGED]
        return [scenes[number] for number in self._rng.permutation(len(scenes))]

    def _must_flag(self, scene: Scene) -> bool:
        return any(self._world.all_concepts[concept].flagged for concept, _ in scene.items)

    def _other_thing(self, scene: Scene, scenes: list[Scene]) -> Scene:
        mine = {concept for concept, _ in scene.items}
        others = [s for s in scenes if not mine & {concept for concept, _ in s.items}]
        return others[int(self._rng.integers(len(others)))]

    def _title(self, scene: Scene) -> str:
        template = _TITLES[int(self._rng.choice(len(_TITLES), p=(0.4, 0.25, 0.1, 0.25)))]
        title = template.format(things=self._writer.things(scene), color=COLOR_NAMES[scene.color])
        title = title.replace(" a orange", " an orange")
        return title[0].upper() + title[1:]

    def _plain(self, number: int, scene: Scene, title: str, is_title_wrong: bool) -> Entry:
        extension = str(self._rng.choice([f for f, _ in _FORMATS], p=[share for _, share in _FORMATS]))
        image = self.draw(scene, *self._size({"bmp": 280, "tiff": 380}.get(extension, 1200)))
        format_name, options = _OPTIONS[extension]
        if extension in ("bmp", "gif", "png"):
            image = image.quantize(128)
        uri = f"sku-{number + 1:04d}.{extension}"
        return Entry(uri, _encode(image, format_name, **options), title, is_title_wrong, self._must_flag(scene))

    def _size(self, max_px: int) -> tuple[int, int]:
        (across, down), _ = _SHAPES[int(self._rng.choice(len(_SHAPES), p=[share for _, share in _SHAPES]))]
        longest = int(self._rng.choice([s for s, _ in _LONG_SIDES], p=[share for _, share in _LONG_SIDES]))
        scale = min(longest, max_px) * self._rng.uniform(0.85, 1.0) / max(across, down)
        return max(200, round(across * scale)), max(200, round(down * scale))

    def draw(self, scene: Scene, width: int, height: int) -> Image.Image:
        """The scene as an RGB picture of that size."""
        canvas = _background(COLORS[COLOR_NAMES[scene.color]], width, height, self._rng)
        cells = boxes(scene.num_objects, self._rng)
        chosen = []
        for concept, count in scene.items:
            chosen += [self._pick(concept)] * count
        for box, drawing in zip(cells, chosen, strict=True):
            room = min(box[2] * width, box[3] * height)
            fraction = self._rng.uniform(0.55, 0.85) if len(cells) == 1 else self._rng.uniform(0.72, 0.95)
            figure = drawing.render(round(room * fraction))
            pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
            _paste(canvas, figure, place(pixels, np.array(figure.size), 1, self._rng))
        return canvas

    def _pick(self, concept: int) -> Drawing:
        drawings = self._drawings[concept]
        return drawings[int(self._rng.integers(len(drawings)))]

    def _single(self, name: str, color: str) -> Scene:
        concept = [c.name for c in self._world.all_concepts].index(name)
        return Scene(((concept, 1),), COLOR_NAMES.index(color))

    def _special(self, scenes: list[Scene]) -> Iterator[Entry]:
        """What real feeds hold besides: odd files, doubles, broken ones."""

        def entry(uri: str, scene: Scene, make: Callable[[Image.Image], bytes], note: str) -> Entry:
            title = self._title(replace(scene))
            return Entry(uri, make(self.draw(scene, 400, 400)), title, False, self._must_flag(scene), note=note)

        yield entry("animated.gif", self._single("guitar", "yellow"), self._animate, "animated, 4 frames")
        yield self._transparent()
        yield entry("print-cmyk.jpg", self._single("camera", "orange"), _cmyk, "CMYK")
        yield entry("phone-rotated.jpg", self._single("bicycle", "green"), _rotated, "EXIF orientation 6")
        yield entry("crème brûlée & café №7.jpg", self._single("cake", "pink"), _jpeg, "spaces, non-ASCII name")
        for number in range(4):
            scene = scenes[number]
            first = self._plain(1000 + number, scene, self._title(scene), False)
            first = replace(first, note="twice, bytes equal")
            yield first
            yield replace(first, uri=f"copy-of-{first.uri}")
        whole = _jpeg(self.draw(self._single("horse", "white"), 400, 400))
        broken = (
            ("truncated.jpg", whole[: len(whole) // 3], "cut in the middle"),
            ("empty.jpg", b"", "zero bytes"),
            ("readme.jpg", b"This is not a picture.\n", "text by another name"),
            ("vector.jpg", _SVG.encode(), "SVG by another name"),
        )
        for uri, data, note in broken:
            yield Entry(uri, data, "A horse on white", False, False, decodes=False, note=note)

    def _transparent(self) -> Entry:
        figure = self._pick(self._single("butterfly", "white").items[0][0]).render(300)
        canvas = Image.new("RGBa", (400, 400))
        canvas.paste(figure, (50, 50))
        data = _encode(canvas.convert("RGBA"), "PNG", optimize=True)
        return Entry("cut-out.png", data, "A butterfly", False, False, note="transparent")

    def _animate(self, first: Image.Image) -> bytes:
        frames = [first.quantize(64)] + [first.rotate(90 * turn).quantize(64) for turn in (1, 2, 3)]
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
        return buffer.getvalue()


def write_catalog(target: Path, work: Path) -> list[Entry]:
    """Writes the pictures, ``manifest.csv`` and ``truth.csv``; the folder is replaced."""
    entries = list(DemoMaker(small_world(), work).entries())
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for entry in entries:
        (target / entry.uri).write_bytes(entry.data)
    with (target / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("id", "uri", "title"))
        rows.writerows((f"P{number:04d}", entry.uri, entry.title) for number, entry in enumerate(entries, 1))
    with (target / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("id", "is_title_wrong", "must_flag", "decodes", "note"))
        for number, entry in enumerate(entries, 1):
            flags = (str(flag).lower() for flag in (entry.is_title_wrong, entry.must_flag, entry.decodes))
            rows.writerow((f"P{number:04d}", *flags, entry.note))
    return entries


def _background(color: tuple[int, int, int], width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """The colour, half of the time shaded along one direction."""
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25) * (rng.random() < 0.5)
    across, down = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)
    shade = 1 + depth * (np.cos(angle) * across[None, :] + np.sin(angle) * down[:, None])
    base = np.array(color) + rng.uniform(-8, 8, 3)
    return Image.fromarray((base * shade[:, :, None]).clip(0, 255).astype(np.uint8))


def _paste(canvas: Image.Image, figure: Image.Image, corner: tuple[int, int]) -> None:
    """Lays a premultiplied figure over the canvas."""
    box = (*corner, corner[0] + figure.width, corner[1] + figure.height)
    under = np.asarray(canvas.crop(box), np.float32)
    over = np.frombuffer(figure.tobytes(), np.uint8).reshape(figure.height, figure.width, 4).astype(np.float32)
    mixed = over[:, :, :3] + under * (1 - over[:, :, 3:] / 255)
    canvas.paste(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)), corner)


def _encode(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    return _encode(image, "JPEG", quality=82)


def _cmyk(image: Image.Image) -> bytes:
    return _encode(image.convert("CMYK"), "JPEG", quality=82)


def _rotated(image: Image.Image) -> bytes:
    """Stored lying on its side, with the EXIF tag (6: turn right by 90 degrees) that puts it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(image.rotate(90, expand=True), "JPEG", quality=82, exif=exif)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    options = parser.parse_args()
    entries = write_catalog(options.target, options.work)
    num_bytes = sum(len(entry.data) for entry in entries)
    print(
        f"{len(entries)} files, {num_bytes / 1e6:.1f} MB, {sum(e.must_flag for e in entries)} to flag, "
        f"{sum(e.is_title_wrong for e in entries)} wrong titles, {sum(not e.decodes for e in entries)} broken"
    )


if __name__ == "__main__":
    main()

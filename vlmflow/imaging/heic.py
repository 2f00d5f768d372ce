"""HEIC images (ISO/IEC 23008-12, coded by HEVC) as Pillow's image files, decoded by libheif through `pillow_heif`.

Needs that package (extra ``heif``). Gain maps, depths and thumbnails are no pictures of their own, and left aside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFile

from vlmflow.imaging.heif import pictures_in, tiles_of, with_tiles_shown
from vlmflow.imaging.profiles import profile_of_nclx

_STEP = 8  # of the pixels that are compared; in a hole that is hardly larger nothing is to be seen


class HeicFile(ImageFile.ImageFile):
    """The main image of a file, turned as the file says, and behind it the others, such as those of a burst.

    Each is decoded when its pixels are asked for, and kept nowhere else.
    """

    format = "HEIC"
    format_description = "HEIF image coded by HEVC"
    _is_to_decode = False

    def _open(self) -> None:
        assert self.fp is not None  # Pillow has just opened it
        self._data = self.fp.read()
        self._images = _images_of(self._data)
        opened = {image._c_image.item_id for image in self._images}
        self._num_unopened = len(pictures_in(self._data) - opened)
        self._number = 0
        self._show()

    @property
    def n_frames(self) -> int:
        """Images of the file; behind the others those of which the decoder opens none."""
        return len(self._images) + self._num_unopened

    @property
    def is_animated(self) -> bool:
        """Whether there are several."""
        return self.n_frames > 1

    def tell(self) -> int:
        """The number of the present image."""
        return self._number

    def seek(self, frame: int) -> None:
        """Goes to another image.

        Raises:
            EOFError: there is none of that number.
            ValueError: it is one that the decoder does not open.
        """
        if not 0 <= frame < self.n_frames:
            raise EOFError(f"there is no image {frame} in a file of {self.n_frames}")
        if frame >= len(self._images):
            raise ValueError(f"image {frame} is not opened")
        if frame != self._number:
            self._number = frame
            self._show()

    def load(self) -> Any:
        """Decodes the present image."""
        if self._is_to_decode:
            image = self._images[self._number]
            decoded, number = _decoded(image), image._c_image.item_id
            self._images[self._number] = image = None  # else it would keep its pixels
            if _may_have_holes(decoded):
                _check_tiles(self._data, number)
            self.im, self._mode, self._size = decoded.im, decoded.mode, decoded.size
            self._is_to_decode = False
        return super().load()

    def _show(self) -> None:
        if self._images[self._number] is None:
            self._images = _images_of(self._data)
        image = self._images[self._number]
        self._size, self._mode = image.size, _mode_of(image)
        self.info = {"icc_profile": _profile_of(image)}
        self.tile = []
        self._is_to_decode = True


def _images_of(data: bytes) -> list[Any]:
    """The images of a file, the main one first, not decoded."""
    import pillow_heif

    # Of the process, and used by nothing else: images are decoded side by side, each on a core of its own.
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False
    file = pillow_heif.open_heif(data, convert_hdr_to_8bit=True, remove_stride=False)
    images = list(file)
    main = images.pop(file.primary_index)
    if not main.info["primary"]:  # of images that it cannot decode the decoder says nothing, and shows another
        raise ValueError("the main image cannot be decoded")
    return [main, *images]


def _mode_of(image: Any) -> str:
    mode: str = image.mode
    return "RGBA" if mode == "RGBa" else mode


def _decoded(image: Any) -> Image.Image:
    decoded = Image.frombytes(image.mode, image.size, image.data, "raw", image.mode, image.stride)
    return decoded if decoded.mode == _mode_of(image) else decoded.convert(_mode_of(image))


def _may_have_holes(image: Image.Image) -> bool:
    """Whether somewhere pixels are all the same, as where a tile was left out.

    What is left there is the colour of zeros, which in RGB are black, or a green without red and blue.
    """
    some = np.asarray(image)[::_STEP, ::_STEP].reshape(*(-(-side // _STEP) for side in reversed(image.size)), -1)
    first, others = some[:-1, :-1], (some[1:, 1:], some[1:, :-1], some[:-1, 1:])
    is_same = np.logical_and.reduce([(first == other).all(-1) for other in others])
    return bool((is_same & (first.min(-1) == 0)).any())


def _check_tiles(data: bytes, number: int) -> None:
    """Decodes each tile of an image alone: the decoder leaves out those that are damaged, and does not say so.

    Raises:
        Whatever the decoder does on a damaged image.
        ValueError: a tile is not there.
    """
    tiles = tiles_of(data, number)
    if not tiles:
        return
    images = {image._c_image.item_id: image for image in _images_of(with_tiles_shown(data))}
    for tile in sorted(tiles):
        if tile not in images:
            raise ValueError("a tile cannot be decoded")
        images.pop(tile).load()


def _profile_of(image: Any) -> bytes | None:
    if image.info.get("icc_profile"):
        profile: bytes = image.info["icc_profile"]
        return profile
    nclx = image.info.get("nclx_profile")
    if nclx is None:
        return None
    named = profile_of_nclx(nclx["color_primaries"], nclx["transfer_characteristics"])
    return None if named is None else named.file()

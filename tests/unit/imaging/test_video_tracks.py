"""What a video's file says of itself is not believed, and no stream of pictures in it is left out."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.images import encode
from tests.unit.imaging.test_video import LIMITS, RED, REQUEST, WHITE, frame, make_tracks, make_video, red_frames
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode, video
from vlmflow.imaging.video import sniff_video


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_cover(data: bytes, cover: bytes) -> bytes:
    """An MP4 whose index begins with a picture of its cover, which FFmpeg lists as its first video stream."""
    art = _box(b"covr", _box(b"data", struct.pack(">II", 13, 0) + cover))
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    metadata = _box(b"udta", _box(b"meta", bytes(4) + handler + _box(b"ilst", art)))
    at = data.find(b"moov") - 4
    assert data.find(b"mdat") < at, "nothing behind it may move"
    (size,) = struct.unpack_from(">I", data, at)
    return data[:at] + struct.pack(">I", size + len(metadata)) + b"moov" + metadata + data[at + 8 :]


def with_length(data: bytes, seconds: int) -> bytes:
    """An MP4 whose headers say that it is so long."""
    forged = bytearray(data)
    for kind, to_length, scale in ((b"mvhd", 16, None), (b"mdhd", 16, None), (b"tkhd", 20, 1000)):
        at = forged.find(kind) + 4
        (units,) = struct.unpack_from(">I", forged, at + 12) if scale is None else (scale,)
        struct.pack_into(">I", forged, at + to_length, seconds * units)
    return bytes(forged)


def test_a_cover_does_not_stand_for_the_video() -> None:
    frames = [frame(RED if number == 30 else WHITE, number) for number in range(60)]
    cover = encode(Image.new("RGB", (64, 64), "green"), "JPEG")
    data = with_cover(make_video(frames), cover)
    with av.open(BytesIO(data)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "mpeg4"]
    decoded = decode(data, [REQUEST], LIMITS)
    views = decoded.pixels[REQUEST.key]
    assert (decoded.facts.num_frames, decoded.facts.width, decoded.unseen) == (60, 160, None)
    assert views[0][1].mean() > 200, "the first frame stands for it"
    assert [float(name.partition("@")[2]) for name in red_frames(views)] == [pytest.approx(3.0, abs=0.06)]
    green = [name for name, pixels in views if np.abs(pixels.mean(axis=(0, 1)) - (0, 128, 0)).max() < 20]
    assert len(green) == 1, "a player shows the cover too"


def test_a_cover_beyond_the_limit_of_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    cover = encode(Image.new("L", (2_000, 1_000)), "PNG")
    data = with_cover(make_video([frame(WHITE, number) for number in range(5)]), cover)
    assert decode(data, [REQUEST], LIMITS).unseen is None
    decoded: list[int] = []
    image_of = video._image

    def recorded(frame: Any) -> Image.Image:
        decoded.append(frame.width)
        return image_of(frame)

    monkeypatch.setattr(video, "_image", recorded)
    found = decode(data, [REQUEST], ImageLimits(max_pixels=1_000_000))
    assert found.unseen == "frames after 0.4 s cannot be decoded"
    assert set(decoded) == {160}
    assert found.facts.width == 160


def test_a_second_video_track_is_looked_at() -> None:
    tracks = [[frame(WHITE, number) for number in range(20)], [frame(RED, number, 64, 64) for number in range(20)]]
    decoded = decode(make_tracks(tracks), [REQUEST], LIMITS)
    assert decoded.unseen is None
    assert red_frames(decoded.pixels[REQUEST.key])


@pytest.mark.parametrize("codec", ["mpeg4", "h264"])
def test_a_length_that_the_header_makes_short_is_counted(codec: str) -> None:
    try:
        data = make_video([frame(WHITE, number) for number in range(700)], codec=codec, gop=10_000)
    except av.error.EncoderNotFoundError:
        pytest.skip(f"PyAV has no encoder {codec} here")
    honest, forged = (decode(each, [REQUEST], LIMITS) for each in (data, with_length(data, 1)))
    assert "between two key frames" in (honest.unseen or "")
    assert forged.unseen == honest.unseen
    assert forged.facts.num_frames == 700


@pytest.mark.parametrize(("said_s", "gop"), [(1, 690), (600, 12)])
def test_what_a_webm_says_of_its_length_only_makes_it_longer(said_s: int, gop: int) -> None:
    data = bytearray(make_video([frame(WHITE, number) for number in range(700)], "webm", "vp8", gop=gop))
    struct.pack_into(">d", data, data.find(b"\x44\x89") + 3, said_s * 1000.0)
    decoded = decode(bytes(data), [REQUEST], LIMITS)
    assert decoded.facts.num_frames >= 699
    assert "between two key frames" in (decoded.unseen or "")


@pytest.mark.parametrize(
    "movflags", ["frag_keyframe+empty_moov+default_base_moof", "dash", "cmaf+frag_keyframe", "frag_keyframe+empty_moov"]
)
def test_fragmented_videos_are_videos(movflags: str) -> None:
    data = make_video([frame(RED if number == 20 else WHITE, number) for number in range(30)], movflags=movflags)
    decoded = decode(data, [REQUEST], LIMITS)
    assert decoded.facts.format == "mp4"
    assert (decoded.facts.num_frames, decoded.unseen) == (30, None)
    assert len(red_frames(decoded.pixels[REQUEST.key])) == 1


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        ([b"iso5"], "mp4"),
        ([b"hvc1"], "mp4"),
        ([b"MSNV", b"MSNV"], "mp4"),
        ([b"XAVC", b"mp42", b"iso2"], "mp4"),  # of cameras, known by what it is compatible with
        ([b"isom", b"avif"], "mp4"),
        ([b"avif", b"mif1", b"iso8"], None),
        ([b"heic", b"mif1", b"isom"], None),
        ([b"mif1", b"heic", b"iso6"], None),
        ([b"XXXX", b"isom", b"avif"], None),
        ([b"M4A ", b"isom", b"mp42"], None),
        ([b"crx ", b"isom"], None),
        ([b"XXXX", b"YYYY"], None),
    ],
)
def test_the_brands_of_a_file_tell_videos_from_pictures(brands: list[bytes], expected: str | None) -> None:
    assert sniff_video(_box(b"ftyp", brands[0] + bytes(4) + b"".join(brands[1:])) + bytes(64)) == expected


def test_pictures_that_no_codec_decodes_are_a_row() -> None:
    data = make_video([frame(WHITE, number) for number in range(5)])
    at = data.find(b"mp4v", data.find(b"stsd"))
    with pytest.raises(ImageError, match="of a kind that cannot be decoded") as caught:
        decode(data[:at] + b"xxxx" + data[at + 4 :].replace(b"esds", b"free"), [REQUEST], LIMITS)
    assert caught.value.error_class is RowErrorClass.UNSUPPORTED_FORMAT


def test_what_is_transparent_in_a_video_is_shown_on_black_too() -> None:
    file = BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgba"
        for number in range(2):
            pixels = np.full((64, 64, 4), 255, np.uint8)
            pixels[..., 3] = 0 if number else 255
            pixels[16:48, 16:48, 3] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    decoded = decode(file.getvalue(), [REQUEST], LIMITS)
    views = dict(decoded.pixels[REQUEST.key])
    assert list(views) == ["squash", "frame-1@0.100"]
    assert views["frame-1@0.100"][16, 16].tolist() == [255, 255, 255]
    assert views["frame-1@0.100"][0, 0].tolist() == [0, 0, 0]
    whole = PixelRequest(32, "bilinear", ("squash", "black"))
    assert [name for name, _ in decode(file.getvalue(), [whole], LIMITS).pixels[whole.key]] == ["squash"]

"""The endpoint adapter against a stub that is slow, busy, broken or silent: each image has its answer or its error."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import pickle
import socket
import threading
import traceback
from collections.abc import Callable
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.endpoint import KEY, Asked, Reply, completion, endpoint
from vlmflow.config import EndpointConfig, ModelConfig
from vlmflow.errors import ConfigError, EndpointError
from vlmflow.imaging import PixelRequest
from vlmflow.models import endpoint as endpoint_module
from vlmflow.models import endpoint_http, identify, load_answerer, load_captioner, pixel_request
from vlmflow.models.endpoint import EndpointChat
from vlmflow.tasks.caption import CaptionTask
from vlmflow.tasks.run import BatchLimit, run_contained

SIDE = 64


def config(url: str, **changes: Any) -> EndpointConfig:
    values = {"url": url, "model": "tiny-vlm", "max_side_px": SIDE, "timeout_s": 20.0, "max_retries": 2}
    return EndpointConfig.model_validate({**values, **changes})


def flat_pixels(num_images: int) -> torch.Tensor:
    """(N, 3, S, S) uint8: image i is of the red 16 * i."""
    pixels = torch.zeros(num_images, 3, SIDE, SIDE, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(num_images).mul(16).view(-1, 1, 1).to(torch.uint8)
    return pixels


def number(asked: Asked) -> int:
    return asked.colour[0] // 16


def say_number(asked: Asked) -> Reply:
    return completion(f" image\n{number(asked)} ")


def write_one(answer: Callable[[Asked], Reply], pauses: list[float] | None = None, **changes: Any) -> EndpointError:
    """Asks about one image, which must fail; returns how, and checks how often it was asked."""
    num_requests = changes.pop("num_requests")
    with endpoint(answer) as server:
        chat = EndpointChat(config(server.url, **changes), (pauses if pauses is not None else []).append)
        with pytest.raises(EndpointError) as caught:
            chat.write(flat_pixels(1), ["what?"], 20)
        assert chat.take_usage().requests == num_requests
        # A busy machine may not have shown the endpoint a request before it was given up.
        assert len(server.asked) == num_requests or caught.value.error_class == "endpoint_timeout"
    return caught.value


def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", KEY)
    with endpoint(say_number) as server:
        settings = config(server.url, api_key_env="SHOP_KEY", input_price=2.0, output_price=10.0)
        captioner = load_captioner(ModelConfig(family="endpoint", endpoint=settings, prompt="Say what."), "cpu")
        assert captioner.caption(flat_pixels(5), 30) == [f"image {index}" for index in range(5)]
        usage = captioner.take_usage()  # type: ignore[attr-defined]
        assert (usage.requests, usage.input_tokens, usage.output_tokens) == (5, 500, 35)
        assert usage.cost == pytest.approx((500 * 2 + 35 * 10) / 1e6)
        assert captioner.take_usage().requests == 0  # type: ignore[attr-defined]
    asked = server.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert (asked.body["model"], asked.body["max_tokens"], asked.body["temperature"]) == ("tiny-vlm", 30, 0)
    assert {item.prompt for item in server.asked} == {"Say what."}
    assert Image.open(io.BytesIO(asked.jpeg)).size == (SIDE, SIDE)


def test_each_question_is_asked_with_its_image() -> None:
    def answer(asked: Asked) -> Reply:
        return completion(f"{number(asked)}: {asked.prompt}")

    with endpoint(answer) as server:
        answerer = load_answerer(ModelConfig(family="endpoint", endpoint=config(server.url), prompt="{question}!"), "")
        given = answerer.answer(flat_pixels(3), [["a {b}?", "c"], [], ["a {b}?"]])
    assert [[answer.text for answer in answers] for answers in given] == [["0: a {b}?!", "0: c!"], [], ["2: a {b}?!"]]
    assert all(math.isnan(answer.score) for answers in given for answer in answers)
    assert len(server.asked) == 3


def test_an_image_is_digested_once_for_all_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    digested = []

    def sha256(data: Any) -> Any:
        digested.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(endpoint_module, "hashlib", SimpleNamespace(sha256=sha256))
    with endpoint(say_number) as server:
        answers = EndpointChat(config(server.url)).write(flat_pixels(3), list("abcd"), 20, rows=[2, 2, 0, 0])
    assert [answer.text.split()[-1] for answer in answers] == ["2", "2", "0", "0"]
    assert len(digested) == 3


HUGE = b'{"choices": [{"message": {"content": "' + b"x" * 2_000_000 + b'"}}]}'


@pytest.mark.parametrize(
    ("reply", "error_class", "num_requests"),
    [
        (Reply(status=429), "endpoint_busy", 3),
        (Reply(status=500, body=b"Traceback"), "endpoint_failed", 3),
        (Reply(status=503), "endpoint_failed", 3),
        (Reply(status=400, body=b'{"error": "what"}'), "endpoint_refused", 1),
        (Reply(status=401), "endpoint_refused", 1),
        (Reply(status=302, headers={"Location": "http://127.0.0.1:9/"}), "endpoint_refused", 1),
        (Reply(body=b""), "bad_answer", 1),
        (Reply(body=b"<html>busy</html>"), "bad_answer", 1),
        (Reply(body=b'{"choices": ['), "bad_answer", 1),
        (Reply(body=b"[" * 100_000), "bad_answer", 1),
        (Reply(body=b"[1]"), "bad_answer", 1),
        (Reply(body=b'{"choices": []}'), "bad_answer", 1),
        (Reply(body=b'{"choices": [{"message": 5}]}'), "bad_answer", 1),
        (Reply(body=HUGE), "bad_answer", 1),
        (completion(""), "bad_answer", 1),
        (completion(" \n "), "bad_answer", 1),
        (completion(None), "bad_answer", 1),
        (completion(None, refusal="no"), "bad_answer", 1),
        (completion("word " * 500), "bad_answer", 1),  # far more than the tokens asked for
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_bad_reply_is_an_error_of_its_class(reply: Reply, error_class: str, num_requests: int) -> None:
    error = write_one(lambda _: reply, num_requests=num_requests)
    assert error.error_class == error_class
    assert "127.0.0.1" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.error_class) == (str(error), error.error_class)


def test_an_endpoint_that_says_nothing_or_never_ends_is_timed_out() -> None:
    silent = write_one(lambda _: Reply(body=None), num_requests=2, timeout_s=0.2, max_retries=1)
    dripping = write_one(lambda _: Reply(b"{", drips=True), num_requests=2, timeout_s=0.3, max_retries=1)
    assert silent.error_class == dripping.error_class == "endpoint_timeout"


def test_a_refused_connection_is_tried_again_and_named() -> None:
    pauses: list[float] = []
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody else's port, and nobody listens
        chat = EndpointChat(config(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"), pauses.append)
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            chat.write(flat_pixels(1), ["what?"], 20)
    assert caught.value.error_class == "endpoint_unreachable"
    assert len(pauses) == 2
    assert 0 <= pauses[0] <= 0.5
    assert 0 <= pauses[1] <= 1.0


@pytest.mark.parametrize(
    ("header", "at_least", "at_most"),
    [("3", 3.0, 3.0), ("0.25", 0.25, 0.25), (formatdate(usegmt=True), 0.0, 2.0), ("soon", 0.0, 0.5)],
    ids=["seconds", "part of a second", "date", "no time"],  # of their own: two processes collect at different times
)
def test_retry_after_is_heeded(header: str, at_least: float, at_most: float) -> None:
    replies = iter([Reply(status=429, headers={"Retry-After": header})])
    pauses: list[float] = []
    with endpoint(lambda asked: next(replies, None) or say_number(asked)) as server:
        (answer,) = EndpointChat(config(server.url), pauses.append).write(flat_pixels(1), ["what?"], 20)
    assert answer.text == "image\n0"
    assert len(pauses) == 1
    assert at_least <= pauses[0] <= at_most


def test_a_server_that_asks_for_an_hour_is_not_waited_for() -> None:
    pauses: list[float] = []
    reply = Reply(status=429, headers={"Retry-After": "3600"})
    assert write_one(lambda _: reply, pauses, num_requests=1).error_class == "endpoint_busy"
    assert pauses == []


def batch_of(pixels: torch.Tensor, request: PixelRequest) -> pa.Table:
    values = [[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in pixels]
    return pa.table({f"pixels_{request.key}": pa.array(values, pa.list_(pa.binary()))})


def test_images_that_fail_cost_their_rows_and_nothing_is_asked_twice() -> None:
    kinds = {2: Reply(status=400), 5: Reply(body=b"nonsense"), 11: completion("")}

    with endpoint(lambda asked: kinds.get(number(asked)) or say_number(asked)) as server:
        settings = ModelConfig(family="endpoint", endpoint=config(server.url))
        request = pixel_request("caption", settings, ("squash",))
        task = CaptionTask(load_captioner(settings, "cpu"), request, 20)
        columns, errors = run_contained(task, batch_of(flat_pixels(13), request), BatchLimit())
    assert columns["caption"].to_pylist() == [None if i in kinds else f"image {i}" for i in range(13)]
    found = {row: error["class"] for row, error in enumerate(errors.to_pylist()) if error}
    assert found == {2: "endpoint_refused", 5: "bad_answer", 11: "bad_answer"}
    assert sorted(number(asked) for asked in server.asked) == list(range(13))


def test_no_more_requests_at_once_than_allowed_and_not_fewer() -> None:
    together = threading.Barrier(4)
    lock = threading.Lock()
    in_flight, most = 0, 0

    def answer(asked: Asked) -> Reply:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait(timeout=120)  # passes only when four requests are in flight
        with lock:
            in_flight -= 1
        return say_number(asked)

    with endpoint(answer) as server:
        chat = EndpointChat(config(server.url, max_concurrency=4))
        assert len(chat.write(flat_pixels(12), ["what?"] * 12, 20)) == 12
    assert most == 4


def test_a_dead_endpoint_is_soon_not_asked_any_more_and_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = True

    def answer(asked: Asked) -> Reply:
        return Reply(status=503) if dead else say_number(asked)

    with endpoint(answer) as server:
        chat = EndpointChat(config(server.url, max_concurrency=2), lambda _: None)
        with pytest.raises(EndpointError):
            chat.write(flat_pixels(16), ["what?"] * 16, 20)
        # Eight in a row end it; those under way beside the eighth are counted too.
        assert 8 * 3 <= len(server.asked) <= 9 * 3
        before = len(server.asked)
        with pytest.raises(EndpointError, match=r"not asked: \d+ requests failed in a row") as caught:
            chat.write(flat_pixels(3), ["again?"] * 3, 20)
        assert caught.value.error_class == "endpoint_failed"
        assert len(server.asked) == before
        monkeypatch.setattr(endpoint_http, "_PROBE_EVERY_S", 0.0)
        chat._http._breaker._probe_at = 0.0
        dead = False
        assert len(chat.write(flat_pixels(3), ["and now?"] * 3, 20)) == 3


def test_images_that_are_refused_cost_no_other_image_its_answer() -> None:
    good = False

    with endpoint(lambda asked: say_number(asked) if good else Reply(status=413)) as server:
        chat = EndpointChat(config(server.url, max_concurrency=1), lambda _: None)
        for image in flat_pixels(15).split(1):
            with pytest.raises(EndpointError, match="status 413") as caught:
                chat.write(image, ["what?"], 20)
            assert caught.value.error_class == "endpoint_refused"
        good = True
        assert len(chat.write(flat_pixels(16)[15:], ["what?"], 20)) == 1


@pytest.mark.parametrize("key", ["sk-sécret", "sk\nX-Other: 1"])
def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SHOP_KEY", key)
    with pytest.raises(ConfigError, match="SHOP_KEY holds characters that do not belong there") as caught:
        EndpointChat(config("http://127.0.0.1:9/v1", api_key_env="SHOP_KEY"))
    assert key not in repr(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "socks5://user:hunter2@proxy:1"),
        ("http_proxy", "http://user:hunter2/x@proxy:1"),  # what stands before the slash is taken for a port
        ("NO_PROXY", "localhost,[::1],.shop"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_by_its_variable_alone(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"cannot be asked with what .*{variable}.* say") as caught:
        EndpointChat(config("http://10.0.0.1/v1"))
    assert caught.value.__suppress_context__
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_the_key_is_nowhere_but_in_the_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOP_KEY", KEY)
    with caplog.at_level(logging.DEBUG), endpoint(lambda _: Reply(status=401, body=KEY.encode())) as server:
        settings = config(server.url, api_key_env="SHOP_KEY")
        chat = EndpointChat(settings)
        with pytest.raises(EndpointError) as caught:
            chat.write(flat_pixels(1), ["what?"], 20)
        assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    shown = [
        repr(caught.value),
        str(caught.value),
        repr(caught.value.__cause__),
        settings.model_dump_json(),
        caplog.text,
    ]
    assert not [text for text in shown if KEY in text or KEY[:8] in text]
    monkeypatch.delenv("SHOP_KEY")
    with pytest.raises(ConfigError, match="environment variable SHOP_KEY is not set"):
        EndpointChat(settings)


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host/v1", "https://user:hunter2@host/v1", "https://host/v1?key=hunter2", "https:///v1"]
)
def test_an_address_holds_no_secret_and_is_http(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(url)
    told = [error["msg"] for error in caught.value.errors(include_input=False)]
    assert told
    assert not [text for text in told if "hunter2" in text]


def test_rows_remember_model_and_place_and_are_due_when_either_changes() -> None:
    def of(**changes: Any) -> Any:
        settings = config("https://api.example.com/v1", **changes)
        return identify("caption", ModelConfig(family="endpoint", endpoint=settings))

    identity = of()
    assert f"{identity.id}@{identity.revision}" == "tiny-vlm@api.example.com"
    assert of(max_retries=9, timeout_s=5.0, input_price=1.0).fingerprint("caption") == identity.fingerprint("caption")
    assert of(model="other").fingerprint("caption") != identity.fingerprint("caption")
    assert of(max_side_px=128).fingerprint("caption") != identity.fingerprint("caption")


def test_a_family_and_its_settings_must_fit() -> None:
    with pytest.raises(ValidationError, match="needs `endpoint`"):
        ModelConfig(family="endpoint")
    with pytest.raises(ValidationError, match="no other takes it"):
        ModelConfig(family="vlm", path="x", endpoint=config("http://a/v1"))
    with pytest.raises(ValidationError, match="a prompt is for"):
        ModelConfig(family="vilt", path="x", prompt="hello")

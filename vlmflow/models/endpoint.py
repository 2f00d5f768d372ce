"""Vision-language models behind an OpenAI-compatible endpoint: images leave this machine, and may cost money."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import torch
from PIL import Image

from vlmflow.config import ENDPOINT_TIMEOUT_S, EndpointConfig
from vlmflow.errors import EndpointError, RowErrorClass
from vlmflow.models import Answer, Usage
from vlmflow.models.endpoint_http import EndpointHttp
from vlmflow.models.prompted import rows_of

_JPEG_QUALITY = 90
# All requests of a batch; its worker would be taken to hang not long after.
_MAX_BATCH_S = 0.9 * ENDPOINT_TIMEOUT_S
_CHARS_PER_TOKEN = 40  # no tokenizer writes so many: a server that does has not heeded max_tokens

_Key: TypeAlias = tuple[bytes, str, int]  # digest of the pixels, prompt, most tokens


class EndpointChat:
    """Asks an endpoint about each image, several at once. N: images, S: side of the pixels.

    What came of each request of a batch is remembered until the next batch: where some fail, the batch is run again in
    halves, to find them, and nothing is asked (or paid for) twice. Scores are not a number: endpoints tell none.

    Raises:
        ConfigError: the environment variable of the key is not set on this machine.
    """

    def __init__(self, config: EndpointConfig, pause: Callable[[float], None] = time.sleep) -> None:
        self._config = config
        self._http = EndpointHttp(config, pause)
        self._threads = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="endpoint")
        self._outcomes: dict[_Key, Answer | EndpointError] = {}
        self._lock = threading.Lock()
        self._tokens = [0, 0]

    def write(
        self,
        pixels: torch.Tensor,
        prompts: Sequence[str],
        max_tokens: int,
        num_beams: int = 1,
        *,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Writes what each prompt asks for of its image; see :class:`vlmflow.models.prompted.VisionChat`.

        Raises:
            EndpointError: a request failed.
        """
        assert num_beams == 1, "jobs that want more are refused"
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        digests = [hashlib.sha256(image.data).digest() for image in images]
        shown = rows_of(pixels, prompts, rows)
        keys = [(digests[row], prompt, max_tokens) for row, prompt in zip(shown, prompts, strict=True)]
        if any(key not in self._outcomes for key in keys):
            deadline = time.monotonic() + _MAX_BATCH_S
            asked = {key: images[row] for key, row in zip(keys, shown, strict=True)}
            pending = {
                key: self._threads.submit(self._ask, image, key[1], max_tokens, deadline)
                for key, image in asked.items()
            }
            self._outcomes = {key: future.result() for key, future in pending.items()}
        answers: list[Answer] = []
        for key in keys:
            outcome = self._outcomes[key]
            if isinstance(outcome, EndpointError):
                raise outcome
            answers.append(outcome)
        return answers

    def take_usage(self) -> Usage:
        """What was spent since it was last asked, by what the endpoint says of tokens."""
        with self._lock:
            (inputs, outputs), self._tokens = self._tokens, [0, 0]
        prices = (self._config.input_price or 0.0, self._config.output_price or 0.0)
        cost = (inputs * prices[0] + outputs * prices[1]) / 1e6
        return Usage(self._http.take_num_requests(), inputs, outputs, cost)

    def _ask(self, image: Any, prompt: str, max_tokens: int, deadline: float) -> Answer | EndpointError:
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": _data_url(image)}}]
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            answer = self._http.post(body, deadline)
            self._count(answer.get("usage"))
            return Answer(self._text(answer, max_tokens), math.nan)
        except EndpointError as error:
            return error

    def _count(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        found = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        with self._lock:
            for place, value in enumerate(found):
                if isinstance(value, int) and value > 0:
                    self._tokens[place] += value

    def _text(self, answer: dict[str, Any], max_tokens: int) -> str:
        """What the model wrote.

        Raises:
            EndpointError: nothing, or what cannot be right.
        """
        try:
            message = answer["choices"][0]["message"]
            content, refusal = message["content"], message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            raise self._bad("has no choices[0].message.content") from None
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if refusal or answer["choices"][0].get("finish_reason") == "content_filter":
            raise self._bad("is a refusal")
        if not isinstance(content, str) or not content.strip():
            raise self._bad("is empty")
        if len(content) > _CHARS_PER_TOKEN * max_tokens:
            raise self._bad(f"has {len(content):,} characters for at most {max_tokens:,} tokens")
        return content.strip()

    def _bad(self, what: str) -> EndpointError:
        host = urlsplit(self._config.url).netloc
        return EndpointError(f"the answer of endpoint {host} {what}", error_class=RowErrorClass.BAD_ANSWER)


def _data_url(image: Any) -> str:
    """(S, S, 3) uint8 as a JPEG in a url."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"

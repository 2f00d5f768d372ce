"""What pages ask for beside pages: pictures, and whatever writes. Answers of the latter are JSON."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vlmflow.catalog.reviews import WITHDRAWN
from vlmflow.config import Frozen, ImageLimits, Job
from vlmflow.errors import CatalogChangedError, ConfigError, ImageError, TooLargeError, VlmflowError
from vlmflow.explain import EVIDENCE_COLUMNS
from vlmflow.validation import describe_validation
from vlmflow.views_search import sentence
from vlmflow.web import pictures
from vlmflow.web.desk import Desk
from vlmflow.web.filters import url
from vlmflow.web.judging import Judgement, Said, check_reviewer
from vlmflow.web.sessions import Session, Undo, session_of

MAX_UPLOAD_BYTES = 20 * 1024 * 1024
_MAX_JSON_BYTES = 64 * 1024
# What was made of an image's bytes does not change, and is gone from browsers soon after an erasure.
_KEPT = {"Cache-Control": "private, max-age=600"}

Parsed = TypeVar("Parsed", bound=Frozen)


class VerdictForm(Frozen):
    """A judgement as a page sends it; see :class:`vlmflow.web.judging.Judgement`.

    Attributes:
        reviewer: whose name stands on the page.
        labels: those alone that were pressed: what the page shows of the others may be what somebody else said.
    """

    image_id: str
    content_hash: str
    reviewer: str
    seen: str = ""
    decision: str | None = None
    labels: dict[str, bool | None] = {}
    reason: str | None = None


class ReviewerForm(Frozen):
    """The name that verdicts go by."""

    name: str


class NoForm(Frozen):
    """Nothing."""


class Actions:
    """Answers requests for pictures, and those that write."""

    def __init__(self, desk: Desk, limits: ImageLimits | None = None) -> None:
        self._desk = desk
        limits = limits or ImageLimits()
        self._max_upload = min(MAX_UPLOAD_BYTES, limits.max_bytes)

    async def picture(self, request: Request) -> Response:
        """A small picture of an image; of a flagged one a blurred one, unless it was asked for as it is."""
        columns = (*pictures.COLUMNS, "status", "verdict")
        row = await run_sync(self._desk.image, request.path_params["image_id"], columns)
        size = request.query_params.get("size", "small")
        if row is None or size not in pictures.SIZES:
            return Response(status_code=404)
        blurred = row["decision"] != "allow" and request.query_params.get("show") != "1"
        made = await self._desk.pictures.small(row, size, blurred=blurred)
        kept = _KEPT if made.media_type == "image/jpeg" else {}
        return Response(made.data, media_type=made.media_type, headers=kept)

    async def heat_map(self, request: Request) -> Response:
        """The regions of an image that raise the score of a label."""
        row = await run_sync(self._desk.image, request.path_params["image_id"], EVIDENCE_COLUMNS)
        if row is None:
            return Response(status_code=404)
        blurred = row["decision"] != "allow" and request.query_params.get("show") != "1"
        label = request.query_params.get("label", "")
        job = await run_sync(self._map_job)
        made = await self._desk.pictures.map(job, row, label, blurred=blurred)
        return Response(made.data, media_type=made.media_type, headers=_KEPT)

    async def verdict(self, request: Request) -> Response:
        """Takes a judgement."""
        form = await _form(request, VerdictForm)
        return await run_sync(self._judge, session_of(request), form)

    async def undo(self, request: Request) -> Response:
        """Takes the last judgement of this session back."""
        await _form(request, NoForm)
        return await run_sync(self._undo, session_of(request))

    async def reviewer(self, request: Request) -> Response:
        """Notes who reviews."""
        form = await _form(request, ReviewerForm)
        check_reviewer(form.name)
        session_of(request).reviewer = form.name.strip()
        return JSONResponse({"message": f"You review as {form.name.strip()}.", "reviewer": form.name.strip()})

    async def query_image(self, request: Request) -> Response:
        """Takes an image to look for others like it, and says where these are shown."""
        data = await _body(request, self._max_upload)
        key = secrets.token_urlsafe(16)
        await run_sync(self._ask, f"image:{key}", data)
        pairs = [pair for pair in request.query_params.multi_items() if pair[0] not in ("q", "like", "image")]
        return JSONResponse({"location": url("/", [("image", key), *pairs])})

    def _ask(self, key: str, data: bytes) -> None:
        from vlmflow.search.query import Query

        if not data:
            raise ConfigError("the file is empty", remedy="Choose an image.")
        self._desk.shelf.ask(key, Query(image=data))

    def _judge(self, session: Session, form: VerdictForm) -> Response:
        row = self._row(form.image_id)
        if row is None:
            raise ConfigError("there is no such image", remedy="Reload the page.")
        if row["content_hash"] is None:
            raise ConfigError(pictures.why_unread(row), remedy="Nobody can judge it.")
        if row["content_hash"] != form.content_hash:
            return JSONResponse({"error": "The image has changed since you opened it. Reload the page."}, 409)
        if form.reviewer.strip() != session.reviewer:  # another tab of this browser has set another name
            who = f"{session.reviewer} reviews" if session.reviewer else "nobody has said who reviews"
            text = f"The page shows another reviewer: in this browser {who} now. Nothing was written. Reload the page."
            return JSONResponse({"error": text}, 409)
        judging = self._desk.judging
        held = judging.labels_of(form.image_id, form.content_hash, session.reviewer, form.labels)
        labels = {name: value for name, value in form.labels.items() if held.get(name) != value}
        before, decision, nothing = self._desk.said(row), form.decision, "Nothing has changed."
        if decision == WITHDRAWN and (before is None or not before.stands):  # of a page from before an undo
            decision, nothing = None, "There is no verdict to take back."
        if decision is None and not labels:
            return JSONResponse({"message": nothing, "seen": form.seen})
        judgement = Judgement(
            form.image_id, form.content_hash, form.seen, session.reviewer, decision, labels, form.reason
        )
        is_taken, said = judging.judge(judgement)
        if not is_taken:
            return _meanwhile(said)
        session.remember(
            Undo(
                form.image_id,
                form.content_hash,
                "" if decision is None or said is None else said.mark,
                before,
                session.reviewer,
                {name: held.get(name) for name in labels},
            )
        )
        self._desk.claims.drop(session.key)
        return self._said(row, decision or "labels", said)

    def _undo(self, session: Session) -> Response:
        if not session.given:
            return JSONResponse({"error": "There is nothing to undo in this session."}, 409)
        last = session.given[-1]
        row = self._row(last.image_id)
        if row is None:  # erased, and whatever was said of it
            session.forget()
            return JSONResponse({"error": "The image of your last judgement is not in the catalog any more."}, 409)
        decision = None if not last.mark else WITHDRAWN if last.before is None else last.before.decision
        judgement = Judgement(
            last.image_id, last.content_hash, last.mark, last.reviewer, decision, last.labels, "undone", last.before
        )
        is_taken, said = self._desk.judging.judge(judgement)
        session.forget()
        if not is_taken:
            return _meanwhile(said)
        return self._said(row, "undone", said)

    def _row(self, image_id: str) -> dict[str, Any] | None:
        """An image's row, before anything is written: what is written is not to end in an error."""
        try:
            return self._desk.image(image_id)
        except CatalogChangedError:  # an erasure took files of the version held away, and no newer one is held yet
            self._desk.shelf.refresh()
            return self._desk.image(image_id)

    def _said(self, row: Mapping[str, Any], what: str, said: Said | None) -> Response:
        name = row["uri"].rsplit("/", 1)[-1][:60]
        words = {
            "undone": "Undone:", "labels": "Labels noted:", WITHDRAWN: "Verdict taken back:", "allow": "Allowed:",
            "review": "Left for review:", "block": "Blocked:",
        }  # fmt: skip
        return JSONResponse(
            {
                "message": f"{words.get(what, what)} {name}",
                "image_id": row["image_id"],
                "seen": "" if said is None else said.mark,
                "num_waiting": self._desk.judging.num_waiting,
            }
        )

    def _map_job(self) -> Job:
        if self._desk.job is not None:
            return self._desk.job
        from vlmflow.engine.report import last_profile
        from vlmflow.search.query import search_job

        config = self._desk.shelf.config
        return search_job(config, last_profile(config))


def refused(error: VlmflowError) -> Response:
    """An error as JSON, for the page to show."""
    status = 413 if isinstance(error, TooLargeError) else 422 if isinstance(error, ImageError) else 400
    return JSONResponse({"error": " ".join(f"{sentence(str(error))}. {error.remedy}".split())}, status)


def _meanwhile(said: Said | None) -> Response:
    if said is None:
        return JSONResponse({"error": "The verdict that you saw is gone. Reload the page."}, 409)
    what = "took the verdict back" if said.decision == WITHDRAWN else f"decided {said.decision}"
    return JSONResponse(
        {
            "error": f"{said.reviewer} {what} at {said.at:%Y-%m-%d %H:%M} UTC, since you opened this image. "
            "Nothing was written.",
            "seen": said.mark,
            "decision": said.decision,
        },
        409,
    )


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, never more of it in memory than is allowed.

    Raises:
        TooLargeError: there is more.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise TooLargeError(f"that is more than {max_bytes / 2**20:g} MiB", remedy="Send a smaller one.")
        parts.append(part)
    return b"".join(parts)


async def _form(request: Request, kind: type[Parsed]) -> Parsed:
    data = await _body(request, _MAX_JSON_BYTES)
    try:
        given: Any = json.loads(data or b"{}")
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, what="the request"), remedy="Reload the page.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("the request is not JSON", remedy="Reload the page.") from error

"""The app: which address leads where, and what becomes of errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vlmflow.errors import CatalogChangedError, CatalogError, TransientError, VlmflowError
from vlmflow.web.actions import Actions, refused
from vlmflow.web.desk import Desk
from vlmflow.web.guard import Guard
from vlmflow.web.pages import Pages
from vlmflow.web.sessions import Sessions

logger = logging.getLogger("vlmflow")

_FILES = {"app.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}


def make_app(desk: Desk, sessions: Sessions, hosts: frozenset[str], cookie: str = "vlmflow") -> ASGIApp:
    """Builds the app.

    Args:
        hosts: names with ports that browsers may ask for.
    """
    pages, actions = Pages(desk), Actions(desk)

    def went_wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, VlmflowError)
        if isinstance(error, CatalogError | TransientError):  # a file was cleaned away under the version held
            desk.shelf.look()
        if isinstance(error, CatalogChangedError):  # whose remedy is one for commands
            error = CatalogError("the catalog has changed this very moment", remedy="Reload the page in a few seconds.")
        if request.method != "GET" or request.url.path.startswith("/map/"):
            return refused(error)
        status = 503 if isinstance(error, CatalogError | TransientError) else 400
        return pages.error(request, str(error), error.remedy, status)

    def not_there(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        return pages.error(request, "There is no such page.", "Go to the catalog, above.", status)

    def left(_: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it: a tab was closed, or a connection lost, while it sent

    def broke(_: Request, error: Exception) -> Response:
        # The type alone: the text may hold what a person asked for.
        logger.error("a request failed: %s", type(error).__name__)
        return PlainTextResponse("Something in the app broke; its log says what.\n", 500)

    routes = [
        Route("/", pages.index),
        Route("/image/{image_id}", pages.image),
        Route("/review", pages.review),
        Route("/picture/{image_id}", actions.picture),
        Route("/map/{image_id}", actions.heat_map),
        Route("/verdict", actions.verdict, methods=["POST"]),
        Route("/undo", actions.undo, methods=["POST"]),
        Route("/reviewer", actions.reviewer, methods=["POST"]),
        Route("/query-image", actions.query_image, methods=["POST"]),
        *(Route(f"/{name}", _file(name, kind)) for name, kind in _FILES.items()),
    ]
    handlers = {VlmflowError: went_wrong, HTTPException: not_there, ClientDisconnect: left, Exception: broke}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), sessions, hosts, cookie)


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    data = (resources.files("vlmflow.web") / "static" / name).read_bytes()

    def send(_: Request) -> Response:
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=600"})

    return send

"""Browsers that have shown the token, and what the app remembers of each. In memory: a restart lets all of them go."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.requests import Request

from vlmflow.web.judging import Said

_MAX_SESSIONS = 1_000
_MAX_UNDO = 200


@dataclass(frozen=True)
class Undo:
    """What takes a judgement back.

    Attributes:
        mark: of the decision as it was given: if another is there now, nothing is undone. Empty: labels alone.
        before: the decision before it, whoever gave that; None: there was none.
        reviewer: who gave it, and takes it back, whoever reviews by then.
        labels: what this person said of labels before; None: nothing.
    """

    image_id: str
    content_hash: str
    mark: str
    before: Said | None
    reviewer: str
    labels: dict[str, bool | None]


@dataclass
class Session:
    """One browser.

    Attributes:
        csrf: what its requests to write carry, beside the cookie.
        reviewer: the name that its verdicts go by.
        given: its judgements that can be undone, the newest last.
        visited: images of the queue that it was shown, the last one last.
    """

    key: str
    csrf: str
    reviewer: str = ""
    given: list[Undo] = field(default_factory=list)
    visited: list[str] = field(default_factory=list)

    def remember(self, undo: Undo) -> None:
        """Keeps a judgement to be undone."""
        self.given = [*self.given, undo][-_MAX_UNDO:]

    def forget(self) -> None:
        """Lets go of the last judgement: it was taken back, or cannot be any more."""
        self.given = self.given[:-1]

    def visit(self, image_id: str) -> str | None:
        """Notes that an image is shown; returns the one that was shown before it."""
        if image_id in self.visited:  # gone back to
            self.visited = self.visited[: self.visited.index(image_id)]
        before = self.visited[-1] if self.visited else None
        self.visited = [*self.visited, image_id][-_MAX_UNDO:]
        return before


class Sessions:
    """Opens sessions to those who know the token, and finds them again by a cookie."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(token)
        self._held: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def enter(self, token: str) -> Session | None:
        """A new session; None: that is not the token."""
        if not hmac.compare_digest(_digest(token), self._digest):
            return None
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
        with self._lock:
            self._held[session.key] = session
            while len(self._held) > _MAX_SESSIONS:
                self._held.popitem(last=False)
        return session

    def find(self, key: str) -> Session | None:
        """The session of a cookie. Keys are random and of 256 bits: to look one up gives nothing of it away."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)


def session_of(request: Request) -> Session:
    """The session of a request that was let in."""
    session: Session = request.scope["session"]
    return session


def _digest(token: str) -> bytes:
    """Of equal length for all tokens, so that the time of a comparison says nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()

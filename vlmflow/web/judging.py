"""People's verdicts, from the app into the catalog.

A verdict is first added to ``reviews/``, and is safe from then on. The rows of the images table follow a few seconds
later, in large catalogs minutes, many at once: a commit rewrites the files that hold them. Until then the app shows
what has been said.

Nobody overwrites what they have not seen: a verdict says which one it was given in view of, and is refused if another
has been given meanwhile, here or by another process. Two processes that write in the same instant both succeed; the
newer verdict counts, and the folder keeps both.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.judged import LIST_PREFIX
from vlmflow.catalog.keys import digest_of, to_binary
from vlmflow.catalog.reviews import EVENT, WITHDRAWN
from vlmflow.errors import ConfigError, VlmflowError
from vlmflow.moderation.decide import DECISIONS
from vlmflow.web.shelf import Shelf, in_words

logger = logging.getLogger("vlmflow")

MAX_NAME_CHARS = 100
MAX_REASON_CHARS = 2_000
MAX_LABELS = 200  # in one verdict
_EVERY_S = 10.0  # rows follow so long after the first verdict that waits
# Writing may take a tenth of the time: verdicts on a large catalog concern many of its files, each written anew.
_REST, _LONGEST_REST_S = 9.0, 600.0
_ROWS_AT_ONCE = 5_000
_TRIES = 3  # of writing the rows at the end


@dataclass(frozen=True)
class Said:
    """The newest decision of a person on an image and its bytes.

    Attributes:
        decision: allow, review, block, or ``none``: taken back.
        mark: tells it from all others.
    """

    decision: str
    reviewer: str
    at: dt.datetime
    reason: str | None

    @property
    def mark(self) -> str:
        """See the class."""
        return digest_of(self.decision, self.reviewer, self.at.isoformat(), self.reason or "")

    @property
    def stands(self) -> bool:
        """Whether there is a verdict: it was not taken back."""
        return self.decision != WITHDRAWN


@dataclass(frozen=True)
class Judgement:
    """What a person says of an image.

    Attributes:
        seen: mark of the verdict that they saw; empty: they saw none.
        decision: None: they say something of labels alone.
        labels: whether each holds; None: what this person said of it is taken back.
        restores: the verdict that an undo puts back; it stays its reviewer's, with their reason.
    """

    image_id: str
    content_hash: str
    seen: str
    reviewer: str
    decision: str | None = None
    labels: Mapping[str, bool | None] = field(default_factory=dict)
    reason: str | None = None
    restores: Said | None = None

    def check(self) -> None:
        """Makes sure that it can be taken.

        Raises:
            ConfigError: it cannot.
        """
        if self.decision is not None and self.decision not in (*DECISIONS, WITHDRAWN):
            raise ConfigError(f"decision {self.decision[:40]!r}", remedy=f"Use {', '.join(DECISIONS)} or {WITHDRAWN}.")
        if self.decision is None and not self.labels:
            raise ConfigError("neither a decision nor a label", remedy="Say something of the image.")
        if len(self.labels) > MAX_LABELS or any(len(name) > MAX_NAME_CHARS for name in self.labels):
            raise ConfigError("too many labels, or too long ones", remedy=f"At most {MAX_LABELS} at once.")
        if len(self.reason or "") > MAX_REASON_CHARS:
            raise ConfigError("the reason is too long", remedy=f"Write at most {MAX_REASON_CHARS:,} characters.")
        check_reviewer(self.reviewer)


@dataclass(frozen=True)
class _Label:
    value: bool | None
    at: dt.datetime


class Outcome(NamedTuple):
    """What became of a judgement.

    Attributes:
        is_taken: False: somebody else has decided since the image was looked at, and nothing was written.
        said: the newest verdict on the image now; None: there is none.
    """

    is_taken: bool
    said: Said | None


def check_reviewer(name: str) -> None:
    """Makes sure that a person can go by a name.

    Raises:
        ConfigError: they cannot.
    """
    if not name.strip():
        raise ConfigError("nobody said who reviews", remedy="Write your name into the field Reviewer.")
    if len(name) > MAX_NAME_CHARS or name.startswith(LIST_PREFIX) or not name.isprintable():
        raise ConfigError(
            f"reviewer {name[:40]!r}", remedy=f"Write a name of at most {MAX_NAME_CHARS} letters, without {LIST_PREFIX}"
        )


class Judging:
    """Takes verdicts, and brings them into the rows.

    Args:
        every_s: how long rows wait for their verdicts; longer where writing them takes long.
    """

    def __init__(self, shelf: Shelf, *, every_s: float = _EVERY_S) -> None:
        self._shelf, self._every_s = shelf, every_s
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str], Said] = {}  # by image and bytes
        self._labels: dict[tuple[str, str, str, str], _Label] = {}  # by image, bytes, label and reviewer
        self._restored: dict[str, str] = {}  # by mark of a verdict: the mark it has since an undo put it back
        self._files: frozenset[str] = frozenset()  # of verdicts, that these were read from
        self._waiting: dict[str, int] = {}  # images whose rows are to follow, with the number of the change
        # Held while some wait: who is killed then leaves it, for which the next run looks at all rows.
        self._lease: ExitStack | None = None
        # What was said here, and the version whose rows show it; None: none does yet.
        self._fresh: dict[tuple[str, str], int | None] = {}
        self.changes = 0  # grows with whatever is said: part of keys of caches
        self._wake, self._stop = threading.Event(), threading.Event()
        self._writer: threading.Thread | None = None
        with self._lock:
            self._update()

    @property
    def num_waiting(self) -> int:
        """Images whose rows do not show their verdict yet."""
        return len(self._waiting)

    def start(self) -> None:
        """Begins to bring verdicts into rows, in a thread."""
        self._writer = threading.Thread(target=self._write, name="vlmflow-verdicts", daemon=True)
        self._writer.start()

    def stop(self) -> None:
        """Brings in what waits, and ends.

        Raises:
            VlmflowError: the rows could not be written. The verdicts are kept, and the next import brings them in.
        """
        self._stop.set()
        self._wake.set()
        if self._writer is not None:
            self._writer.join()
        for attempt in range(1, _TRIES + 1):
            try:
                self.flush()
                return
            except VlmflowError:
                if attempt == _TRIES:
                    raise

    def said(self, image_id: str, content_hash: str | None) -> Said | None:
        """The newest verdict on an image and its bytes, one that was taken back included."""
        return None if content_hash is None else self._said.get((image_id, content_hash))

    def labels_of(
        self, image_id: str, content_hash: str | None, reviewer: str, names: Iterable[str]
    ) -> dict[str, bool]:
        """What a person says of labels of an image and its bytes."""
        if content_hash is None:
            return {}
        found = {name: self._labels.get((image_id, content_hash, name, reviewer)) for name in names}
        return {name: held.value for name, held in found.items() if held is not None and held.value is not None}

    def fresh(self, version: int) -> dict[str, tuple[str, Said]]:
        """What was said here and rows of a version may not show yet: by image, the bytes and the verdict."""
        with self._lock:
            self._fresh = {key: shown for key, shown in self._fresh.items() if shown is None or shown > version}
            return {image_id: (bytes_, self._said[image_id, bytes_]) for image_id, bytes_ in self._fresh}

    def judge(self, judgement: Judgement) -> Outcome:
        """Adds a verdict, unless another than the one that was seen is there; it is kept when this returns.

        Raises:
            ConfigError: the judgement cannot be taken, or the image has been erased.
            VlmflowError: the store refused; nothing was taken.
        """
        judgement.check()
        key = (judgement.image_id, judgement.content_hash)
        with self._lock:
            self._update()
            held = self._said.get(key)
            seen, restores = judgement.seen, judgement.restores
            while seen in self._restored:  # whoever saw it before has seen it
                seen = self._restored[seen]
            if judgement.decision is not None and seen != ("" if held is None else held.mark):
                return Outcome(False, held)
            now = dt.datetime.now(dt.UTC)
            if held is not None:  # of a clock that is ahead of ours
                now = max(now, held.at + dt.timedelta(microseconds=1))
            events = _events(judgement, now)
            with ExitStack() as lease:
                if judgement.decision is not None and self._lease is None:
                    lease.enter_context(self._shelf.catalog.runs.recorded("review", is_kept=False))
                self._refuse_erased(judgement.image_id)
                path = self._shelf.catalog.reviews.add(events)
                if judgement.decision is not None:
                    self._lease = self._lease or lease.pop_all()
            for row in events.to_pylist():
                self._add(row)
            self._files |= {path}
            self.changes += 1
            if judgement.decision is not None:
                self._waiting[judgement.image_id] = self.changes
                self._fresh[key] = None
                self._wake.set()
            said = self._said.get(key)
            if restores is not None and said is not None and said.at == now:
                self._restored[restores.mark] = said.mark
            return Outcome(True, said)

    def _refuse_erased(self, image_id: str) -> None:
        """Refuses a word on an image that was erased since the version held was read: it would stay for good.

        Raises:
            ConfigError: it was.
        """
        erased = self._shelf.catalog.erased_keys
        if pc.index(erased, to_binary(pa.array([image_id]))[0]).as_py() >= 0:
            self._shelf.look()
            raise ConfigError("the image has been erased from the catalog", remedy="Reload the page.")

    def flush(self) -> int:
        """Brings what waits into the rows; returns the number of rows that changed.

        Raises:
            VlmflowError: they could not be written; they wait on.
        """
        with self._lock:
            waiting, fresh = dict(self._waiting), list(self._fresh)
        if not waiting:
            return 0
        version = self._shelf.version
        found = (self._shelf.find(version, image_id) for image_id in waiting)
        files = {version.live.file_of(position).path for position in found if position is not None}
        catalog = self._shelf.catalog
        result = catalog.apply_verdicts(only=sorted(waiting), first=sorted(files))
        shown = catalog.version
        with self._lock:
            for image_id, change in waiting.items():
                if self._waiting[image_id] == change:  # else it was judged again meanwhile
                    del self._waiting[image_id]
            self._fresh |= {key: shown for key in fresh if key[0] not in self._waiting and key in self._fresh}
            if not self._waiting and self._lease is not None:
                self._lease.close()
                self._lease = None
        self._shelf.look()
        return result.num_changed

    def _write(self) -> None:
        pause_s, has_caught_up = self._every_s, self._catch_up_now()
        while not self._stop.is_set():
            self._wake.wait(None if has_caught_up else pause_s)
            self._wake.clear()
            has_caught_up = has_caught_up or self._catch_up_now()
            if not self._waiting or self._stop.wait(pause_s):
                continue
            started = time.monotonic()
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - whatever it is, verdicts given later must not wait for good
                logger.warning("verdicts are kept, and not in their rows yet: %s", in_words(error))
                self._wake.set()
            pause_s = max(self._every_s, min(_LONGEST_REST_S, _REST * (time.monotonic() - started)))

    def _catch_up_now(self) -> bool:
        try:
            self._catch_up()
        except Exception as error:  # noqa: BLE001 - as in `_write`; it is tried again
            logger.warning("it could not be told yet whether all rows show their verdicts: %s", in_words(error))
            return False
        return True

    def _catch_up(self) -> None:
        """Finds images whose rows do not show their verdict: of a process that was killed before it wrote them."""
        version = self._shelf.version
        with self._lock:
            said = dict(self._said)
        at = {image_id: self._shelf.find(version, image_id) for image_id, _ in said}
        positions = np.array(sorted({place for place in at.values() if place is not None}), np.int64)
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            some = positions[start : start + _ROWS_AT_ONCE]
            for row in self._shelf.rows(version, some, ("image_id", "content_hash", "verdict")):
                given = said.get((row["image_id"], row["content_hash"]))
                if given is not None and not _shows(row["verdict"], given):
                    with self._lock:
                        self._waiting.setdefault(row["image_id"], self.changes)
                        self._fresh.setdefault((row["image_id"], row["content_hash"]), None)
                        self.changes += 1
                    self._wake.set()

    def _update(self) -> None:
        """Looks for verdicts that others have added. With the lock held."""
        reviews = self._shelf.catalog.reviews
        files = reviews.files()
        if files.keys() == self._files:
            return
        if not self._files <= files.keys() | reviews.merged:  # an erasure has taken some away
            self._said, self._labels, self._files = {}, {}, frozenset()
        for path in files.keys() - self._files:
            for row in files[path].to_pylist():
                self._add(row)
        self._fresh = {key: shown for key, shown in self._fresh.items() if key in self._said}
        self._files = frozenset(files)
        self.changes += 1

    def _add(self, row: Mapping[str, Any]) -> None:
        if row["decision"] is not None:
            key = (row["image_id"], row["content_hash"])
            said = Said(row["decision"], row["reviewer"], row["at"], row["reason"])
            if key not in self._said or self._said[key].at <= said.at:
                self._said[key] = said
        if row["label"] is not None:
            name = (row["image_id"], row["content_hash"], row["label"], row["reviewer"])
            if name not in self._labels or self._labels[name].at <= row["at"]:
                self._labels[name] = _Label(row["value"], row["at"])


def _shows(verdict: Mapping[str, Any] | None, said: Said) -> bool:
    """Whether that is the verdict of a row."""
    if said.decision == WITHDRAWN:
        return verdict is None or verdict["reviewer"].startswith(LIST_PREFIX)
    return verdict is not None and (verdict["decision"], verdict["at"]) == (said.decision, said.at)


def _events(judgement: Judgement, at: dt.datetime) -> pa.Table:
    common: dict[str, Any] = {
        "image_id": judgement.image_id,
        "content_hash": judgement.content_hash,
        "reviewer": judgement.reviewer.strip(),
        "at": at,
        "reason": judgement.reason or None,
    }
    rows = [common | {"label": name, "value": value} for name, value in judgement.labels.items()]
    if judgement.decision is not None:
        rows.append(common | {"decision": judgement.decision} | _theirs(judgement))
    return pa.Table.from_pylist(rows, schema=EVENT)


def _theirs(judgement: Judgement) -> dict[str, Any]:
    """Whose decision it is that an undo puts back, and why: not that of whoever undoes."""
    said, note = judgement.restores, f"(restored by {judgement.reviewer.strip()})"
    if said is None or not said.stands:
        return {}
    reason = said.reason or ""
    if said.reviewer != judgement.reviewer.strip() and not reason.endswith(note):
        reason = f"{reason} {note}".strip()
    return {"reviewer": said.reviewer, "reason": reason or None}

"""Review by people: a queue of images out of a catalog, and their verdicts into it."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.reviews import EVENT, WITHDRAWN, distinct
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.moderation.queue import COLUMNS, QueueSizes, make_queue
from vlmflow.moderation.review_files import Word, changed_at, check_suffix, read_words, write_queue
from vlmflow.moderation.verdicts import reviewed

_ROW = ("image_id", "uri", "content_hash")
_Event: TypeAlias = dict[str, Any]  # a row of EVENT; ``at`` may be null yet
_SAID_BEFORE = "said before, and somebody has decided otherwise since: fill in `at` to say it again"
_GRAVITY = ("allow", WITHDRAWN, "review", "block")  # what is taken back leaves it to the models, who may block
_DISPUTED = "another row of the file says otherwise, and neither is newer: fill in `at`"


class QueueReport(Frozen):
    """What went into a queue.

    Attributes:
        queues: images by the reason why they are in it.
        num_labelled: images without a verdict that are left out, because labels were said of their bytes.
    """

    catalog: str
    output: str
    num_images: int
    queues: dict[str, int]
    num_labelled: int = 0


class ReviewReport(Frozen):
    """What became of verdicts.

    Attributes:
        num_verdicts: that were read and are about images of the catalog as they are.
        num_new: of these, verdicts that the catalog did not have before.
        left_out: verdicts that do not count, by reason.
        num_outdated: verdicts that are kept and do not count, for the catalog has a newer one that says otherwise.
        num_changed: rows under another verdict than before.
        num_waiting: verdicts of this and earlier imports on bytes that the catalog does not hold now.
        flips: rows by change of their decision.
    """

    catalog: str
    source: str
    num_verdicts: int
    num_new: int
    left_out: dict[str, int]
    num_outdated: int = 0
    num_changed: int
    num_waiting: int
    flips: dict[str, int]


def export_queue(
    config: CatalogConfig, output: str | Path, *, sizes: QueueSizes | None = None, seed: int = 0
) -> QueueReport:
    """Writes the images that a person should look at; by the suffix Parquet, CSV or JSON for Label Studio.

    Args:
        output: a file that is written anew.
        sizes: how many images of each kind, a :class:`vlmflow.review.QueueSizes`; None: its defaults.
        seed: of the random audit sample.

    Raises:
        ReviewError: the file cannot be written.
        CatalogError: there is no catalog.
    """
    output = Path(output)
    check_suffix(output)
    catalog = Catalog.open(config)
    said = reviewed(catalog.reviews.events()).verdicts
    labelled = {(verdict.image, verdict.content_hash or "") for verdict in said}
    queue, num_labelled = make_queue(catalog.image_batches(COLUMNS), sizes or QueueSizes(), seed, labelled)
    write_queue(output, queue)
    return QueueReport(
        catalog=catalog.uri,
        output=str(output),
        num_images=queue.num_rows,
        queues=dict(Counter(queue["queue"].to_pylist())),
        num_labelled=num_labelled,
    )


def import_verdicts(config: CatalogConfig, source: str | Path, *, reviewer: str | None = None) -> ReviewReport:
    """Takes people's verdicts into a catalog, and into the rows that they are about.

    A verdict is bound to the bytes that were judged: those of ``content_hash``, else those that the catalog holds now.
    It is the row's decision until the bytes change, whatever models and policies say meanwhile. Of several on the same
    bytes the newest counts; of decisions in one file that differ and are of one time the gravest, of words on a label
    none. One without a time is of the time when the file was last changed, unless the same person has said the very
    same before: then it is that, and importing a file again, or a copy of it, changes nothing.

    Args:
        source: a queue that was filled in, or an export of Label Studio.
        reviewer: of rows that name none.

    Raises:
        ReviewError: the file cannot be used; nothing was taken.
        CatalogError: there is no catalog, or other writers are always first.
    """
    source, now = Path(source), dt.datetime.now(dt.UTC)
    words, unsaid = read_words(source, reviewer, now)
    catalog = Catalog.open(config)
    given, left_out = _events(words, catalog.image_batches(_ROW))
    before = catalog.reviews.events()
    timed, num_overruled = _with_times(given, before, changed_at(source, now))
    kept = _undisputed(timed)
    left_out += Counter({_SAID_BEFORE: num_overruled, _DISPUTED: len(timed) - len(kept)})
    events = pa.Table.from_pylist(kept, schema=EVENT)
    # Who is killed before the rows follow leaves a lease, for which the next run or vacuum looks at all of them.
    with catalog.runs.recorded("review", is_kept=False):
        catalog.reviews.add(events)
        result = catalog.apply_verdicts()
    num_new = distinct([before, events]).num_rows - before.num_rows  # not what others say meanwhile
    return ReviewReport(
        catalog=catalog.uri,
        source=str(source),
        num_verdicts=events.num_rows,
        num_new=num_new,
        left_out=dict(left_out + unsaid),
        num_outdated=_num_outdated(kept, before),
        num_changed=result.num_changed,
        num_waiting=result.num_waiting,
        flips=result.flips,
    )


def _events(words: list[Word], batches: Iterable[pa.Table]) -> tuple[list[_Event], Counter[str]]:
    """The words on images of the catalog as they are, bound to their bytes; and why others do not count."""
    wanted = pa.array(sorted({word.image for word in words}), pa.string())
    found: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        hits = pc.or_(pc.is_in(batch["image_id"], value_set=wanted), pc.is_in(batch["uri"], value_set=wanted))
        for row in batch.filter(hits).to_pylist():
            for name in {row["image_id"], row["uri"]}:
                found.setdefault(name, []).append(row)
    left_out: Counter[str] = Counter()
    events: list[_Event] = []
    for word in words:
        rows = found.get(word.image, [])
        reason = _reason_to_leave_out(word, rows)
        if reason is not None:
            left_out[reason] += 1
            continue
        events.append(
            {
                "image_id": rows[0]["image_id"],
                "content_hash": rows[0]["content_hash"],
                **{name: getattr(word, name) for name in EVENT.names if name not in ("image_id", "content_hash")},
            }
        )
    return events, left_out


def _with_times(events: list[_Event], held: pa.Table, file_time: dt.datetime) -> tuple[list[_Event], int]:
    """The events, each with a time; and how many were left out because they repeat what has been overruled since.

    Files come again: to be on the safe side, or with a few more rows filled in, or as copies whose time is that of the
    copying. A verdict that was given before must not come back with them over one that followed it.

    Args:
        held: what was said before, the oldest first.
        file_time: of what is said for the first time.
    """
    before: dict[tuple[Any, ...], dt.datetime] = {}
    newest: dict[tuple[Any, ...], _Event] = {}
    for event in _on_images_of([event for event in events if event["at"] is None], held):
        before[tuple(event[name] for name in EVENT.names if name != "at")] = event["at"]
        newest[_subject(event)] = event
    timed, num_overruled = [], 0
    for event in events:
        if event["at"] is not None:
            timed.append(event)
            continue
        at = before.get(tuple(event[name] for name in EVENT.names if name != "at"))
        if at is not None and _what(newest[_subject(event)]) != _what(event):
            num_overruled += 1
        else:
            timed.append(event | {"at": at or file_time})
    return timed, num_overruled


def _num_outdated(events: list[_Event], held: pa.Table) -> int:
    """How many of the events do not count, for what was said before is newer and says otherwise.

    Its time may be that of a clock that is ahead, and a block would not come into force without anybody knowing.
    """
    newest = {_subject(event): event for event in _on_images_of(events, held)}
    last = [(event, newest.get(_subject(event))) for event in events]
    return sum(1 for event, said in last if said and said["at"] > event["at"] and _what(said) != _what(event))


def _on_images_of(events: list[_Event], held: pa.Table) -> list[_Event]:
    """What was said before of the images of the events, the oldest first."""
    images = pa.array(sorted({event["image_id"] for event in events}), pa.string())
    found: list[_Event] = held.filter(pc.is_in(held["image_id"], value_set=images)).to_pylist()
    return found


def _undisputed(events: list[_Event]) -> list[_Event]:
    """The events without those that say otherwise than another of the same time: neither is the newer one.

    Of decisions the gravest stays, so that nothing is allowed that somebody would not allow.
    """
    at_once: dict[tuple[Any, ...], set[Any]] = {}
    for event in events:
        at_once.setdefault((event["at"], *_subject(event)), set()).add(_what(event))

    def counts(event: _Event) -> bool:
        said = at_once[event["at"], *_subject(event)]
        if event["decision"] is None:
            return len(said) == 1
        return bool(event["decision"] == max(said, key=_GRAVITY.index))

    return [event for event in events if counts(event)]


def _what(event: _Event) -> str | bool | None:
    """What is said of the subject of an event."""
    said: str | bool | None = event["value"] if event["decision"] is None else event["decision"]
    return said


def _subject(event: _Event) -> tuple[Any, ...]:
    """What only the newest word counts on: the decision on an image's bytes; a person's word on a label of them."""
    of_label = () if event["decision"] is not None else (event["label"], event["reviewer"])
    return (event["image_id"], event["content_hash"], *of_label)


def _reason_to_leave_out(word: Word, rows: list[dict[str, Any]]) -> str | None:
    if not rows:
        return "image is not in the catalog"
    if len(rows) > 1:
        return "uri stands for several images: give image_id"
    if rows[0]["content_hash"] is None:
        return "image was never read"
    if word.content_hash is not None and word.content_hash != rows[0]["content_hash"]:
        return "image has changed since (content_hash differs)"
    return None

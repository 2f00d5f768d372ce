"""What a search answers with."""

from __future__ import annotations

from vlmflow.config import Frozen

HIT_COLUMNS = (
    "image_id", "uri", "key", "status", "decision", "decision_reason", "caption", "width", "height", "format",
    "content_hash", "ingest_date", "object_version",
)  # fmt: skip
# An exact search of this many rows takes seconds: worth saying that an index would help.
SLOW_ROWS = 200_000


class Hit(Frozen):
    """An image that was found; the columns of its row, and ``score``, the cosine with the query."""

    rank: int
    score: float
    image_id: str
    uri: str
    key: str | None = None
    status: str
    decision: str
    decision_reason: str | None = None
    caption: str | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    content_hash: str | None = None
    ingest_date: str
    object_version: str | None = None

    @property
    def is_flagged(self) -> bool:
        """Whether the image is not to be shown unasked."""
        return self.decision != "allow"


class SearchResult(Frozen):
    """What a search found.

    Attributes:
        query: the text, the file or the uri asked for; of bytes, their number.
        model: fingerprint of the vectors that were searched.
        num_rows: live rows with a vector of this model.
        num_matching: of these, rows that the condition is true of; without a condition, all.
        num_indexed: rows that were looked for in the index; the others were compared one by one.
        num_other_model: rows whose vector is another model's; they cannot be found.
        notes: what a person should know, a sentence each.
    """

    query: str
    where: str | None = None
    top_k: int
    model: str
    catalog: str
    images_version: int
    embeddings_version: int
    num_rows: int
    num_matching: int
    num_indexed: int
    num_other_model: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    hits: tuple[Hit, ...] = ()


def notes_of(num_matching: int, num_indexed: int, num_other: int, *, exact: bool) -> tuple[str, ...]:
    """What a person should know of a search, a sentence each."""
    notes = []
    rest = num_matching - num_indexed
    if num_indexed and rest:
        notes.append(
            f"The index covers {num_indexed:,} of {num_matching:,} images; the other {rest:,} were compared one by "
            "one. `vlmflow search CATALOG --build-index` brings it up to date."
        )
    elif rest >= SLOW_ROWS and not exact:
        notes.append(
            f"{rest:,} images were compared one by one. `vlmflow search CATALOG --build-index` makes this faster."
        )
    if num_other:
        notes.append(
            f"{num_other:,} images have embeddings of another model and were not searched; "
            "`vlmflow enrich` renews them."
        )
    return tuple(notes)

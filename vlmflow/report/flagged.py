"""The images that a run flagged, a few of them: what a message about the run shows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import to_binary, to_words
from vlmflow.config import CatalogConfig
from vlmflow.report.rows import COLUMNS, Pick, Row, as_row


def newly_flagged(catalog: CatalogConfig, run_id: str, count: int) -> tuple[int, list[Row]]:
    """Images that a run flagged and that were not flagged before it.

    Returns:
        How many there are, and the first ``count``: blocked before those to be reviewed.

    Raises:
        CatalogError: there is no catalog.
    """
    opened = Catalog.open(catalog)
    before = opened.flagged_before(run_id)
    pick = Pick(count, ("decision", "ascending"))  # "block" sorts before "review"
    for rows in opened.image_batches(list(COLUMNS)):
        rows = rows.filter(pc.and_(pc.equal(rows["run_id"], run_id), pc.not_equal(rows["decision"], "allow")))
        if before is not None:
            rows = rows.filter(pa.array(before.find(*to_words(to_binary(rows["image_id"]))) < 0))
        if rows.num_rows:
            pick.add(rows)
    if pick.rows is None:
        return 0, []
    return pick.num_seen, [as_row(values, ()) for values in pick.rows.to_pylist()]

"""Verdicts that the rows of a run do not hold yet when it ends.

Workers look images up in the lists of known images as they were when the run began, and a person's verdict comes with
the live row alone. So a list that was changed meanwhile, and a verdict that waited for its bytes, are brought in here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pyarrow as pa

from vlmflow.catalog import Catalog, keys
from vlmflow.catalog.known_images import KnownImages
from vlmflow.catalog.writer import writer_of

logger = logging.getLogger("vlmflow")


def bring_in_late_verdicts(
    catalog: Catalog, run_id: str, known: KnownImages | None, committed: Sequence[pa.Array]
) -> None:
    """Brings in what people and lists say of a run's rows; to be called after its last commit.

    Where another run has not ended, it may have been killed before it came to this: then every row is looked at; once,
    where it gave no sign of life any more.

    Args:
        known: what the run's workers looked images up in; None: there were none.
        committed: keys of the rows that the run has committed, as ``schema.KEY``.

    Raises:
        CatalogError: other writers are always first.
    """
    # The lists are read after the last commit: who changes them later looks at its rows himself.
    lists = catalog.known_images.lists()
    changed = known is not None and len(committed) > 0 and lists != known.lists
    others = {run for run, state in catalog.runs.states().items() if state != "finished"} - {run_id}
    if not (changed or others or committed):
        return
    newest = catalog.reviews.newest()["image_id"]
    if changed or (others and (lists or len(newest)) and catalog.runs.unsettled() - {run_id}):
        result = catalog.apply_verdicts(lists_changed=True)
    else:
        index = keys.index_of(keys.concat(committed))
        judged = newest.filter(pa.array(index.find(*keys.to_words(keys.to_binary(newest))) >= 0)).unique()
        if not len(judged):
            return
        ours = [path for path in catalog.live_files("images") if writer_of(f"images/{path}") == run_id]
        result = catalog.apply_verdicts(only=judged.to_pylist(), first=ours)
    if result.num_changed:
        logger.info("%d rows came under verdicts that were given before or during the run", result.num_changed)

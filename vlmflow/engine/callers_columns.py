"""The caller's columns of images with nothing due: their rows get the values of this listing, and no image is read."""

from __future__ import annotations

import logging

from vlmflow.catalog import Catalog, Plan
from vlmflow.engine.collect import Collected
from vlmflow.engine.progress import ProgressDisplay, Tally
from vlmflow.errors import CatalogError, ColumnsError, RunRevokedError

logger = logging.getLogger("vlmflow")


def update_columns(catalog: Catalog, run_id: str, plan: Plan, display: ProgressDisplay, collected: Collected) -> None:
    """Brings the caller's columns of the plan's outdated rows up to date; to be called after the run's other commits.

    Args:
        catalog: with all columns that the source has.

    Raises:
        ColumnsError: some could not be brought up to date.
        StorageAccessError, TransientError: the store went away.
        RunRevokedError: the run was taken for dead.
    """
    if not plan.num_outdated:
        return
    display.stage(f"updating the caller's columns or alternative texts of {plan.num_outdated:,} rows")
    tally = Tally(total=plan.num_outdated)
    try:
        for num_rows, num_changed in catalog.update_columns(run_id, plan):
            collected.num_columns_updated += num_changed
            tally.done += num_rows
            tally.committed += num_changed
            display.update(tally)
    except RunRevokedError:
        raise
    except CatalogError as error:
        raise ColumnsError(
            f"the caller's columns of {plan.num_outdated - tally.done:,} of {plan.num_outdated:,} rows were not "
            f"updated: {error}",
            remedy=f"What the run computed is in the catalog. {error.remedy} The next run updates them.",
        ) from error
    if collected.num_columns_updated < plan.num_outdated:
        num_left = plan.num_outdated - collected.num_columns_updated
        logger.info("%d rows keep the caller's columns that another run has given them meanwhile", num_left)

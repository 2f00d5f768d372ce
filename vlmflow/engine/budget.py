"""The error budget: a run whose first images are bad stops before it commits anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.masks import explode, field_strings
from vlmflow.catalog.rows import rows_of_image_errors
from vlmflow.engine import columns
from vlmflow.errors import ErrorBudgetError

# The budget looks at this many finished rows, and nothing is committed before.
BUDGET_ROWS = 1_000


@dataclass(frozen=True)
class FreshRows:
    """Finished rows that count for the budget.

    Those that failed the last time too do not: that they fail again says nothing of the source, and where there are
    many of them no run would ever commit.

    Attributes:
        num_bad: of ``num_rows``, those whose image or a task failed.
        errors: of these, by class.
    """

    num_rows: int = 0
    num_bad: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: pa.Table) -> FreshRows:
        """Counts finished rows, with the columns of ``schema.PLANNED`` and ``schema.OUTCOME``."""
        fresh = rows.filter(pc.invert(pc.fill_null(rows["failed_before"], False)))
        num_failed = pc.fill_null(pc.list_value_length(fresh[columns.TASKS_FAILED]), 0).to_numpy()
        bad = rows_of_image_errors(fresh["errors"]).any | (num_failed > 0)
        of_row, errors = explode(fresh["errors"])
        classes = Counter(field_strings(errors, "class")[bad[of_row]].tolist())
        return cls(fresh.num_rows, int(bad.sum()), dict(classes))


class ErrorBudget:
    """Says when a run may begin to commit.

    Args:
        max_fraction: of the first :data:`BUDGET_ROWS` finished rows that count, those that may be bad; 1 turns the
            budget off.
        num_fresh: planned rows that count; with fewer than :data:`BUDGET_ROWS` there is no budget.
    """

    def __init__(self, max_fraction: float, num_fresh: int) -> None:
        self._max_fraction = max_fraction
        self.is_kept = max_fraction >= 1 or num_fresh < BUDGET_ROWS
        self._num_rows = self._num_bad = 0
        self._errors: Counter[str] = Counter()

    def add(self, rows: FreshRows) -> None:
        """Counts finished rows, committed or not."""
        self._num_rows += rows.num_rows
        self._num_bad += rows.num_bad
        self._errors.update(rows.errors)

    def check(self) -> None:
        """Opens the way to the first commit once enough rows have finished.

        Raises:
            ErrorBudgetError: too many of them are bad.
        """
        if self.is_kept or self._num_rows < BUDGET_ROWS:
            return
        if self._num_bad > self._max_fraction * self._num_rows:
            classes = ", ".join(f"{name} {count:,}" for name, count in self._errors.most_common(3))
            raise ErrorBudgetError(
                f"{self._num_bad:,} of the first {self._num_rows:,} images are bad ({classes}); nothing was committed",
                remedy="Check the source, or raise max_error_fraction (1 turns the check off).",
            )
        self.close()

    def close(self) -> None:
        """Asks no more: enough rows have finished, or no more are to come."""
        self.is_kept = True

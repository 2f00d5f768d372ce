"""Verdicts in rows of the images table: what the model says, and what holds. Columns in, columns out."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import flat
from vlmflow.catalog.masks import Mask, chosen, is_valid

LIST_PREFIX = "list:"  # of the reviewer of a verdict that a list of known images gave
BY_VERDICT = "verdict"  # decision_reason of a row that a verdict decides


_DECISIONS = pa.array(["allow", "review", "block"])


def decided(decisions: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Decisions of rows; what is none is `review`, whoever wrote it."""
    return pc.if_else(pc.is_in(decisions, value_set=_DECISIONS), decisions, "review")


def by_model(rows: pa.Table) -> pa.Table:
    """The rows with the decision and reason that the model alone would give them; verdicts stay where they are."""
    if "verdict" not in rows.column_names or rows["verdict"].null_count == rows.num_rows:
        return rows
    said = flat(rows["verdict"])
    judged = pc.is_valid(said)
    for name in ("decision", "decision_reason"):
        index = rows.schema.get_field_index(name)
        field = {"decision": "model_decision", "decision_reason": "model_reason"}[name]
        values = pc.if_else(judged, pc.struct_field(said, field), flat(rows[name]))
        values = decided(values) if name == "decision" else values
        rows = rows.set_column(index, rows.schema.field(name), values)
    return rows


def with_verdicts(
    decision: pa.Array | pa.ChunkedArray,
    reason: pa.Array | pa.ChunkedArray,
    verdicts: pa.StructArray,
    holds: Mask,
    decides: Mask,
) -> dict[str, pa.Array]:
    """Puts verdicts over what the model says.

    Args:
        decision, reason: of the model, (N,).
        verdicts: (N,) of schema.VERDICT; null: nobody has judged the image.
        holds: (N,) verdicts that are kept; the others are dropped.
        decides: (N,) of those kept, verdicts that are the decision now.

    Returns:
        The columns ``decision``, ``decision_reason`` and ``verdict``.
    """
    decision, reason = flat(decision).cast(pa.string()), flat(reason).cast(pa.string())
    kept = holds & is_valid(verdicts)
    fields = {field.name: pc.struct_field(verdicts, field.name) for field in schema.VERDICT}
    fields |= {"model_decision": decision, "model_reason": reason}
    struct = pa.StructArray.from_arrays(
        [fields[field.name] for field in schema.VERDICT], fields=list(schema.VERDICT), mask=pa.array(~kept)
    )
    ruling = pa.array(kept & decides)
    return {
        "decision": pc.if_else(ruling, decided(fields["decision"]), decision),
        "decision_reason": pc.if_else(ruling, BY_VERDICT, reason),
        "verdict": struct,
    }


def judge(rows: pa.Table, verdicts: pa.StructArray, changes: Mask, doubtful: Mask) -> pa.Table:
    """Rows of the images table under new verdicts.

    Args:
        verdicts: (N,) the verdict on each row; null: none, or one that was withdrawn.
        changes: (N,) the rows whose verdict is replaced by that; the others stay as they are.
        doubtful: (N,) rows whose object cannot be read any more: a verdict on them waits.
    """
    modelled = by_model(rows)
    said = chosen(changes, verdicts, flat(rows["verdict"]))
    decides = np.where(changes, ~doubtful, equal_reason(rows))
    values = with_verdicts(modelled["decision"], modelled["decision_reason"], said, is_valid(said), decides)
    now = pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP)
    values["updated_at"] = pc.if_else(pa.array(changes), now, flat(rows["updated_at"]))
    columns = [
        values[field.name].cast(field.type) if field.name in values else rows[field.name] for field in rows.schema
    ]
    return pa.table(columns, schema=rows.schema)


def equal_reason(rows: pa.Table) -> Mask:
    """The rows that a verdict decides."""
    return np.asarray(pc.fill_null(pc.equal(flat(rows["decision_reason"]), BY_VERDICT), False), np.bool_)


def of_list(verdicts: pa.StructArray) -> Mask:
    """Verdicts that a list of known images gave, not a person."""
    reviewers = pc.struct_field(verdicts, "reviewer")
    return np.asarray(pc.fill_null(pc.starts_with(reviewers, LIST_PREFIX), False), np.bool_)

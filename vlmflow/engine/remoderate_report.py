"""What a remoderation did: its record in the catalog, and what the command line, flows and the API give out."""

from __future__ import annotations

import datetime as dt

from vlmflow.config import Frozen


class RemoderateReport(Frozen):
    """What a remoderation did, or would do.

    Attributes:
        policy: name and version.
        policies: rows that moved, or would, by the policy that they come under, as :attr:`Policy.full_name`: of a
            rollback there may be several.
        num_moved: rows that came under the policy.
        num_from_margins: of these, rows decided by stored margins; the others by stored vectors.
        num_other_model: rows left as they are, because their vectors are another model's.
        num_undetected: rows left as they are, because a detector of the policy has not seen their images yet, or
            failed; `enrich` with the policy runs it.
        detectors: of the policy, or of those gone back to.
        num_first: of a rollback, rows that stay, because none is known that they had before: they were first moderated
            under this policy, or an earlier rollback brought them back to it.
        num_without_vectors: rows whose vectors are gone: they are `review`, as unscored.
        flips: rows by change of decision, such as ``allow -> block``.
        label_flips: by label, rows by change of that label's decision.
        examples: a few images of each change of decision, with uri and reason.
        partitions: rows moved by ingest date.
        runs_beside: runs of `enrich` that were at work at the end, or dead for less than ten minutes, with the policy
            that rows come under which they commit later. One that still loads its models has no record yet, and is
            not among them.
    """

    run_id: str
    dry_run: bool
    catalog: str
    policy: str
    policy_digest: str
    policies: dict[str, int] = {}
    rollback_of: str | None = None
    where: str | None = None
    status: str = "done"
    started_at: dt.datetime
    seconds: float = 0.0
    num_moved: int = 0
    num_from_margins: int = 0
    num_other_model: int = 0
    num_undetected: int = 0
    detectors: tuple[str, ...] = ()
    num_without_vectors: int = 0
    num_first: int = 0
    decisions: dict[str, int] = {}
    flips: dict[str, int] = {}
    label_flips: dict[str, dict[str, int]] = {}
    examples: tuple[dict[str, str | None], ...] = ()
    partitions: dict[str, int] = {}
    num_commits: int = 0
    runs_beside: dict[str, str] = {}

"""From a job to committed tables: planning, the Ray Data pipeline, commits, the run record."""

import os

# Ray reads this when it is imported. A thread that outlives an interrupted run would otherwise start a new cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

from vlmflow.engine.report import CommitReport, PlanSummary, RunReport
from vlmflow.engine.run import enrich, plan, preflight
from vlmflow.engine.sizing import PreflightReport
from vlmflow.engine.stages import PoolReport, StageReport

__all__ = [
    "CommitReport",
    "PlanSummary",
    "PoolReport",
    "PreflightReport",
    "RunReport",
    "StageReport",
    "enrich",
    "plan",
    "preflight",
]

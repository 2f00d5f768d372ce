"""From a job to committed tables: planning, the Ray Data pipeline, commits, the run record."""

from vlmflow.engine.report import CommitReport, PlanSummary, PoolReport, RunReport, StageReport
from vlmflow.engine.run import enrich, plan

__all__ = ["CommitReport", "PlanSummary", "PoolReport", "RunReport", "StageReport", "enrich", "plan"]

"""From a job to committed tables: planning, the Ray Data pipeline, commits, the run record.

Workers import one module of this package or two; what the driver alone needs is imported at the first use of its name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vlmflow.lazy import imported_at_first_use

# Ray reads this when it is imported. A thread that outlives an interrupted run would otherwise start a new cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

if TYPE_CHECKING:
    from vlmflow.engine.report import PlanSummary, RunReport
    from vlmflow.engine.run import enrich, plan, preflight
    from vlmflow.engine.sizing import PreflightReport

__all__ = [
    "PlanSummary",
    "PreflightReport",
    "RunReport",
    "enrich",
    "plan",
    "preflight",
]

__getattr__ = imported_at_first_use(
    __name__,
    {
        "PlanSummary": "vlmflow.engine.report",
        "PreflightReport": "vlmflow.engine.sizing",
        "RunReport": "vlmflow.engine.report",
        "enrich": "vlmflow.engine.run",
        "plan": "vlmflow.engine.run",
        "preflight": "vlmflow.engine.run",
    },
)

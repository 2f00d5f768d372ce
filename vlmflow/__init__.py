"""vlmflow enriches an image catalog with vision-language models.

    >>> import vlmflow
    >>> job = vlmflow.Job(
    ...     source={"uri": "photos/"}, catalog={"uri": "catalog/"}, profile="base", policy="marketplace"
    ... )
    >>> report = vlmflow.enrich(job)  # doctest: +SKIP
    >>> report.num_added, report.statuses  # doctest: +SKIP

Importing it starts nothing: the engine, with Ray, is imported by the first use of a name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmflow.config import CatalogConfig, Job, SourceConfig, load_job
from vlmflow.errors import VlmflowError

if TYPE_CHECKING:
    from vlmflow.calibration import calibrate
    from vlmflow.catalog import Catalog
    from vlmflow.doctor import Check, doctor
    from vlmflow.engine import PlanSummary, RunReport, enrich, plan
    from vlmflow.engine.remoderate import RemoderateReport, Scope, remoderate
    from vlmflow.models.profiles import describe_profiles
    from vlmflow.moderation.calibrate import CalibrationReport, Targets
    from vlmflow.summary import CatalogSummary, summarize
    from vlmflow.verification import verify

__all__ = [
    "CalibrationReport",
    "Catalog",
    "CatalogConfig",
    "CatalogSummary",
    "Check",
    "Job",
    "PlanSummary",
    "RemoderateReport",
    "RunReport",
    "Scope",
    "SourceConfig",
    "Targets",
    "VlmflowError",
    "calibrate",
    "describe_profiles",
    "doctor",
    "enrich",
    "load_job",
    "plan",
    "remoderate",
    "summarize",
    "verify",
]

_HOMES = {
    "CalibrationReport": "vlmflow.moderation.calibrate",
    "Catalog": "vlmflow.catalog",
    "CatalogSummary": "vlmflow.summary",
    "Check": "vlmflow.doctor",
    "PlanSummary": "vlmflow.engine",
    "RemoderateReport": "vlmflow.engine.remoderate",
    "RunReport": "vlmflow.engine",
    "Scope": "vlmflow.engine.remoderate",
    "Targets": "vlmflow.moderation.calibrate",
    "calibrate": "vlmflow.calibration",
    "describe_profiles": "vlmflow.models.profiles",
    "doctor": "vlmflow.doctor",
    "enrich": "vlmflow.engine",
    "plan": "vlmflow.engine",
    "remoderate": "vlmflow.engine.remoderate",
    "summarize": "vlmflow.summary",
    "verify": "vlmflow.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

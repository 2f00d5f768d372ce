"""The catalog: the Delta tables of images and embeddings, and the one way in which they change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmflow.lazy import imported_at_first_use

if TYPE_CHECKING:
    from vlmflow.catalog.apply import CommitResult
    from vlmflow.catalog.catalog import Catalog
    from vlmflow.catalog.due import PlanRequest
    from vlmflow.catalog.erase import EraseResult
    from vlmflow.catalog.known import KnownBytes
    from vlmflow.catalog.plan import Plan, plan_without_catalog
    from vlmflow.catalog.rows import RunConstants
    from vlmflow.catalog.runs import RunInfo
    from vlmflow.catalog.vacuum import VacuumResult
    from vlmflow.catalog.verify import Verification
    from vlmflow.catalog.writer import CatalogWriter

__all__ = [
    "Catalog",
    "CatalogWriter",
    "CommitResult",
    "EraseResult",
    "KnownBytes",
    "Plan",
    "PlanRequest",
    "RunConstants",
    "RunInfo",
    "VacuumResult",
    "Verification",
    "plan_without_catalog",
]

__getattr__ = imported_at_first_use(
    __name__,
    {
        "Catalog": "vlmflow.catalog.catalog",
        "CatalogWriter": "vlmflow.catalog.writer",
        "CommitResult": "vlmflow.catalog.apply",
        "EraseResult": "vlmflow.catalog.erase",
        "KnownBytes": "vlmflow.catalog.known",
        "Plan": "vlmflow.catalog.plan",
        "PlanRequest": "vlmflow.catalog.due",
        "RunConstants": "vlmflow.catalog.rows",
        "RunInfo": "vlmflow.catalog.runs",
        "VacuumResult": "vlmflow.catalog.vacuum",
        "Verification": "vlmflow.catalog.verify",
        "plan_without_catalog": "vlmflow.catalog.plan",
    },
)

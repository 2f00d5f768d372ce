"""vlmflow enriches an image catalog with vision-language models.

    >>> import vlmflow
    >>> job = vlmflow.Job(
    ...     source={"uri": "photos/"}, catalog={"uri": "catalog/"}, profile="base", policy="marketplace",
    ...     accept_unbound=True,  # no thresholds for the profile yet: every decision is `review`
    ... )
    >>> report = vlmflow.enrich(job)  # doctest: +SKIP
    >>> report.num_added, report.statuses  # doctest: +SKIP

A job whose values do not fit raises ``pydantic.ValidationError``; ``vlmflow.load_job("job.yaml")`` and all that follows
raise a :class:`VlmflowError`. What a job may say ``vlmflow job`` prints, key by key.

Importing it starts nothing: the engine, with Ray, is imported by the first use of a name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmflow.config import CatalogConfig, Job, SourceConfig, load_job
from vlmflow.errors import VlmflowError
from vlmflow.lazy import imported_at_first_use

if TYPE_CHECKING:
    from vlmflow.alt_text_report import AltTextReport, find_alt_texts
    from vlmflow.calibration import calibrate
    from vlmflow.catalog import Catalog
    from vlmflow.checks import Check, doctor
    from vlmflow.engine import PlanSummary, PreflightReport, RunReport, enrich, plan, preflight
    from vlmflow.engine.remoderate import remoderate
    from vlmflow.engine.remoderate_report import RemoderateReport
    from vlmflow.engine.scope import Scope
    from vlmflow.evaluation import EvaluationReport, evaluate, read_dataset
    from vlmflow.grounding import GroundedRegion, PhraseGrounder, ground_phrases
    from vlmflow.models.convert import ConversionInputs, ConversionReport, convert_weights
    from vlmflow.models.profiles import describe_profiles
    from vlmflow.moderation.calibrate import CalibrationReport, Targets
    from vlmflow.report.write import WrittenReport, write_report
    from vlmflow.review import QueueReport, ReviewReport, export_queue, import_verdicts
    from vlmflow.search.build import IndexReport, update_index
    from vlmflow.search.describe import ImageDescriber, ImageDescription, describe_image
    from vlmflow.search.duplicates import DuplicateReport, find_duplicates
    from vlmflow.search.query import Query
    from vlmflow.search.results import SearchResult
    from vlmflow.search.searcher import Searcher, search_images
    from vlmflow.search.titles import TitleReport, find_titles
    from vlmflow.summary import CatalogSummary, summarize
    from vlmflow.verification import verify
    from vlmflow.web.server import ServeConfig, serve

__all__ = [
    "AltTextReport",
    "CalibrationReport",
    "Catalog",
    "CatalogConfig",
    "CatalogSummary",
    "Check",
    "ConversionInputs",
    "ConversionReport",
    "DuplicateReport",
    "EvaluationReport",
    "GroundedRegion",
    "ImageDescriber",
    "ImageDescription",
    "IndexReport",
    "Job",
    "PhraseGrounder",
    "PlanSummary",
    "PreflightReport",
    "Query",
    "QueueReport",
    "RemoderateReport",
    "ReviewReport",
    "RunReport",
    "Scope",
    "SearchResult",
    "Searcher",
    "ServeConfig",
    "SourceConfig",
    "Targets",
    "TitleReport",
    "VlmflowError",
    "WrittenReport",
    "calibrate",
    "convert_weights",
    "describe_image",
    "describe_profiles",
    "doctor",
    "enrich",
    "evaluate",
    "export_queue",
    "find_alt_texts",
    "find_duplicates",
    "find_titles",
    "ground_phrases",
    "import_verdicts",
    "load_job",
    "plan",
    "preflight",
    "read_dataset",
    "remoderate",
    "search_images",
    "serve",
    "summarize",
    "update_index",
    "verify",
    "write_report",
]

__getattr__ = imported_at_first_use(
    __name__,
    {
        "AltTextReport": "vlmflow.alt_text_report",
        "CalibrationReport": "vlmflow.moderation.calibrate",
        "Catalog": "vlmflow.catalog",
        "CatalogSummary": "vlmflow.summary",
        "Check": "vlmflow.checks",
        "ConversionInputs": "vlmflow.models.convert",
        "ConversionReport": "vlmflow.models.convert",
        "DuplicateReport": "vlmflow.search.duplicates",
        "EvaluationReport": "vlmflow.evaluation",
        "GroundedRegion": "vlmflow.grounding",
        "ImageDescriber": "vlmflow.search.describe",
        "ImageDescription": "vlmflow.search.describe",
        "IndexReport": "vlmflow.search.build",
        "PhraseGrounder": "vlmflow.grounding",
        "PlanSummary": "vlmflow.engine",
        "PreflightReport": "vlmflow.engine",
        "Query": "vlmflow.search.query",
        "QueueReport": "vlmflow.review",
        "RemoderateReport": "vlmflow.engine.remoderate_report",
        "ReviewReport": "vlmflow.review",
        "RunReport": "vlmflow.engine",
        "Scope": "vlmflow.engine.scope",
        "SearchResult": "vlmflow.search.results",
        "Searcher": "vlmflow.search.searcher",
        "ServeConfig": "vlmflow.web.server",
        "Targets": "vlmflow.moderation.calibrate",
        "TitleReport": "vlmflow.search.titles",
        "WrittenReport": "vlmflow.report.write",
        "calibrate": "vlmflow.calibration",
        "convert_weights": "vlmflow.models.convert",
        "describe_image": "vlmflow.search.describe",
        "describe_profiles": "vlmflow.models.profiles",
        "doctor": "vlmflow.checks",
        "enrich": "vlmflow.engine",
        "evaluate": "vlmflow.evaluation",
        "export_queue": "vlmflow.review",
        "find_alt_texts": "vlmflow.alt_text_report",
        "find_duplicates": "vlmflow.search.duplicates",
        "find_titles": "vlmflow.search.titles",
        "ground_phrases": "vlmflow.grounding",
        "import_verdicts": "vlmflow.review",
        "plan": "vlmflow.engine",
        "preflight": "vlmflow.engine",
        "read_dataset": "vlmflow.evaluation",
        "remoderate": "vlmflow.engine.remoderate",
        "search_images": "vlmflow.search.searcher",
        "serve": "vlmflow.web.server",
        "summarize": "vlmflow.summary",
        "update_index": "vlmflow.search.build",
        "verify": "vlmflow.verification",
        "write_report": "vlmflow.report.write",
    },
)


def __dir__() -> list[str]:
    """What completion and ``help`` show: the names that are imported at their first use too."""
    return sorted({*globals(), *__all__})

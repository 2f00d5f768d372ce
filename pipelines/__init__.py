"""Prefect flows over the library: nightly enrichment, moderation backfill, ad-hoc jobs.

``nightly``, ``backfill`` and ``adhoc`` each hold one flow and a command line. ``steps`` is where their work is done:
in the flow's own process, or on a Ray cluster through its Jobs API (``ray_jobs``). ``artifacts`` shows what came out,
``alerts`` tells people.
"""

import os
import sys

from pipelines.ending import end_at_once_when_told
from pipelines.home import settle_home

if sys.argv[:1] == ["-m"]:  # while `python -m pipelines.nightly` looks for the module; not in workers of Prefect
    end_at_once_when_told()

# Prefect reports its use to its makers unless it is told not to, from its import on. What the caller has set stays.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")  # by the temporary server of a flow run by hand
os.environ.setdefault("DO_NOT_TRACK", "1")  # by the process of the flow
settle_home()

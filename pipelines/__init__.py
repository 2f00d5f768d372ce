"""Prefect flows over the library: nightly enrichment, moderation backfill, ad-hoc jobs.

``nightly``, ``backfill`` and ``adhoc`` each hold one flow and a command line. ``steps`` is where their work is done:
in the flow's own process, or on a Ray cluster through its Jobs API (``ray_jobs``). ``artifacts`` shows what came out,
``alerts`` tells people.
"""

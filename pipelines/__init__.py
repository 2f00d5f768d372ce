"""Prefect flows, thin over the library. There are none yet."""

"""Prefect flows over the library; they come with the issue on scheduling."""

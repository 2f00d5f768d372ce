"""Moderation: policies, the scoring of embeddings under them, and decisions."""

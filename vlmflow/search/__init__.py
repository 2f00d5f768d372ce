"""Search over the embeddings of a catalog, near-duplicates, and texts that do not fit their image.

Needs no cluster. What it imports of torch and of the index library is imported at first use.
"""

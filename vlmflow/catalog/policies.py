"""The archive of every policy that a row may name, under ``CATALOG/policies/<digest>/``."""

from __future__ import annotations

from collections.abc import Mapping

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError

POLICIES = "policies"


class PolicyStore:
    """Keeps the files of a policy (its text, its prompt vectors) under its digest. They are never changed."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def put(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Archives a policy; what is there already stays as it is."""
        held = set(self._names(digest))
        for name, data in files.items():
            if name not in held:
                self._folder.write(f"{POLICIES}/{digest}/{name}", data)

    def get(self, digest: str) -> dict[str, bytes]:
        """The files of a policy, by name.

        Raises:
            CatalogError: no policy of that digest is archived.
        """
        found: dict[str, bytes] = {}
        for name in self._names(digest):
            data = self._folder.read(f"{POLICIES}/{digest}/{name}")
            if data is not None:
                found[name] = data
        if not found:
            raise CatalogError(
                f"{self._folder.config.uri}: no policy {digest} is archived", remedy="Give the policy as a file."
            )
        return found

    def digests(self) -> list[str]:
        """The digests of the policies here."""
        return sorted({file.path.split("/")[1] for file in self._folder.list(POLICIES)})

    def _names(self, digest: str) -> list[str]:
        below = f"{POLICIES}/{digest}/"
        return [file.path.removeprefix(below) for file in self._folder.list(below.rstrip("/"))]

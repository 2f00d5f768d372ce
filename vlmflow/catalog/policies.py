"""The archive of every policy that a row may name, under ``CATALOG/policies/<digest>/``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError

POLICIES = "policies"


class PolicyStore:
    """Keeps the files of a policy (its text, its prompt vectors) under its digest. They are never changed."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def put(self, digest: str, files: Mapping[str, bytes], replaced: Collection[str] = ()) -> None:
        """Archives a policy; what is there already stays as it is, but for the files that are to be replaced."""
        held = set(self._names(digest)).difference(replaced)
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

    def read(self, digest: str, name: str) -> bytes | None:
        """One file of a policy; None: it is not there."""
        return self._folder.read(f"{POLICIES}/{digest}/{name}")

    def digests(self) -> list[str]:
        """The digests of the policies here; files that lie beside their folders are nobody's."""
        parts = (file.path.split("/") for file in self._folder.list(POLICIES))
        return sorted({digest for _, digest, *names in parts if names})

    def _names(self, digest: str) -> list[str]:
        below = f"{POLICIES}/{digest}/"
        return [file.path.removeprefix(below) for file in self._folder.list(below.rstrip("/"))]

"""What readers are told besides the file itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlmflow.errors import EvaluationError

# As the command line calls them.
_OPTIONS = {
    "images": "--images",
    "split": "--split",
    "annotations": "--annotations",
    "truth": "--truth",
    "on": "--on",
    "where": "--where",
    "columns": "--column",
}


@dataclass(frozen=True)
class ReadOptions:
    """What a data file itself does not say.

    Attributes:
        images: folder or prefix of the images; None: where the data file is.
        split: of a Karpathy file: train, val, test, None for test; of a token file: a text file that names its images.
        annotations: of VQA: the file with the answers; None: by the name of the questions' file.
        truth: a table with more columns, joined by those that both have, or by ``on``.
        where: SQL condition on the joined table.
        columns: by what is needed, the column that holds it.
    """

    images: str | None = None
    split: str | None = None
    annotations: Path | None = None
    truth: Path | None = None
    on: str | None = None
    where: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def check_only(self, taken: tuple[str, ...], data: str, kind: str) -> None:
        """Refuses what a reader would not look at: left out of account, it would make another figure than was meant.

        Args:
            taken: attributes that the reader of ``data`` looks at.
            kind: what ``data`` is, in the plural.

        Raises:
            EvaluationError: something else was given.
        """
        besides = [option for name, option in _OPTIONS.items() if name not in taken and getattr(self, name)]
        if besides:
            known = ", ".join(_OPTIONS[name] for name in taken) or "none of these options"
            remedy = f"Leave it out: {kind} take {known}."
            raise EvaluationError(f"{data}: {besides[0]} is not for {kind}", remedy=remedy)

"""What readers are told besides the file itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ReadOptions:
    """What a data file itself does not say.

    Attributes:
        images: folder or prefix of the images; None: where the data file is.
        split: of a Karpathy file: train, val, test; of a token file: a text file that names its images.
        annotations: of VQA: the file with the answers; None: by the name of the questions' file.
        truth: a table with more columns, joined by those that both have, or by ``on``.
        where: SQL condition on the joined table.
        columns: by what is needed, the column that holds it.
    """

    images: str | None = None
    split: str = "test"
    annotations: Path | None = None
    truth: Path | None = None
    on: str | None = None
    where: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

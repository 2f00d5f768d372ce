"""``python -m tests.quick_serve ARGUMENT...``: the command `vlmflow serve`, whose rows follow verdicts in a second."""

from __future__ import annotations

import sys
from functools import partial

from vlmflow.cli import main
from vlmflow.web import server

if __name__ == "__main__":
    server.ServeConfig = partial(server.ServeConfig, verdicts_every_s=1.0)  # type: ignore[assignment, misc]
    main(["serve", *sys.argv[1:]])

"""``python -m vlmflow``: the command line."""

from vlmflow.cli import main

main()

"""``python -m lunaprep``."""

from lunaprep.cli import main

main()

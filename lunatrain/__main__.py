"""``python -m lunatrain``."""

from lunatrain.cli import main

main()

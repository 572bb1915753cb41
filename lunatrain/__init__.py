"""Train on a lunaprep store, and evaluate as the LUNA16 challenge does."""

__version__ = "0.1.0"

__all__ = ["__version__"]

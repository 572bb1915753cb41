"""Chest CT scans and their annotations into a verified, memory-mappable store of volumes and crops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunaprep.store.reader import Store, open_store

__version__ = "0.1.0"

__all__ = ["Store", "__version__", "open_store"]


def __getattr__(name: str) -> Any:
    """Import the reader when it is first asked for: ``import lunaprep`` alone costs nothing."""
    if name in ("Store", "open_store"):
        from lunaprep.store import reader

        return getattr(reader, name)
    message = f"module 'lunaprep' has no attribute {name!r}"
    raise AttributeError(message)

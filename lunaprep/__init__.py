"""Chest CT scans and their annotations into a verified, memory-mappable store of volumes and crops."""

__version__ = "0.1.0"

"""From a masked checkpoint to a small network that anyone can load."""

from prune_mm.export.compact_file import CompactFile

__all__ = ["CompactFile"]

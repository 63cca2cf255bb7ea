"""What a pruned layer is: its masked and its compact form. Knows torch only."""

from prune_mm.structures.base import Structure, structure_from_dict
from prune_mm.structures.channel_slice import ChannelSlice, ShortcutSlice
from prune_mm.structures.plan import Plan
from prune_mm.structures.slots import Slot

__all__ = ["ChannelSlice", "Plan", "ShortcutSlice", "Slot", "Structure", "structure_from_dict"]

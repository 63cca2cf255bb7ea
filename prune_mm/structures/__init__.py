"""What a pruned layer is: its masked and its compact form. Knows torch only."""

from prune_mm.structures.base import Structure, structure_from_dict
from prune_mm.structures.block_sparse import BlockSparse, BlockSparseConv2d, BlockSparseLinear
from prune_mm.structures.channel_order import ChannelOrder
from prune_mm.structures.channel_slice import ChannelSlice, ShortcutSlice
from prune_mm.structures.group_slice import GroupSlice
from prune_mm.structures.grouped_conv import GroupedConv
from prune_mm.structures.low_rank import ConvPair, LowRank
from prune_mm.structures.plan import Plan
from prune_mm.structures.slots import Slot

__all__ = [
    "BlockSparse",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "ChannelOrder",
    "ChannelSlice",
    "ConvPair",
    "GroupSlice",
    "GroupedConv",
    "LowRank",
    "Plan",
    "ShortcutSlice",
    "Slot",
    "Structure",
    "structure_from_dict",
]

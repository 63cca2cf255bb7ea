"""Where Hinge's matrices are in a network, which way their groups run, and what leaving groups out costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from prune_mm.graph import ChannelGraph, ChannelGroup
from prune_mm.pruners.hinge_math import pair_rank
from prune_mm.pruners.options import check_matches
from prune_mm.pruners.units import CostModel, Unit
from prune_mm.structures import ChannelSlice, ConvPair, GroupSlice, LowRank, Slot, Structure
from prune_mm.structures.pair import merging_is_cheaper, why_no_pair
from prune_mm.structures.slots import get_tensor


@dataclass(frozen=True)
class HingeUnit(Unit):
    """Groups of one matrix, or of several together, that stay or go.

    Attributes:
        matrices: parameters the group norms are taken of, and the axis along which the groups lie.
        which: 1 for the first matrix of a block, 2 for the second.
        follows: index of the unit of the block's first matrix, for a second one.
        is_rows: whether the groups are the intermediate channels of a pair.
        convs: grouped convolutions whose groups these are (cardinality groups).
    """

    matrices: tuple[tuple[str, int], ...] = ()
    which: int = 1
    follows: int | None = None
    is_rows: bool = False
    convs: tuple[str, ...] = ()

    def parts(self, module: nn.Module) -> list[Tensor]:
        """Views of the matrices, ``(groups, ...)``; writes reach the parameters."""
        return [self._view(get_tensor(module, name).data, axis) for name, axis in self.matrices]

    def gradients(self, module: nn.Module) -> list[Tensor]:
        """The same of their gradients; empty when one has none."""
        grads = [(get_tensor(module, name).grad, axis) for name, axis in self.matrices]
        return [] if any(grad is None for grad, _ in grads) else [self._view(grad, axis) for grad, axis in grads]

    def _view(self, tensor: Tensor, axis: int) -> Tensor:
        rows = tensor.movedim(axis, 0)
        return rows if rows.shape[0] == self.channels else rows.unflatten(0, (self.channels, -1))

    @property
    def in_order(self) -> bool:
        """Whether a line of each matrix is a group: a grouped convolution may tie outputs of the layer before it."""
        own = [slot for slot in self.slots if (slot.tensor, slot.axis) in self.matrices]
        return bool(self.convs) or all(slot.channels == tuple(range(self.channels)) for slot in own)

    @property
    def prunes_outputs(self) -> bool:
        """Whether what goes are outputs of a layer, which norm and activation still work on."""
        return not self.is_rows and not self.convs and all(axis == 0 for _, axis in self.matrices)

    def structure(self, mask: Tensor) -> ChannelSlice:
        """The decision ``mask`` (boolean, one per group) as a structure."""
        if self.convs:
            return GroupSlice.from_groups(self.name, mask, self.slots, self.convs)
        return super().structure(mask)


# -- placement --------------------------------------------------------------------------------------------------------


def find_pairs(
    module: nn.Module,
    graph: ChannelGraph,
    everywhere: bool,
    pointwise: bool,
    init_method: str,
    ignore: Sequence[str] = (),
    include_frozen: bool = False,
) -> tuple[dict[str, ConvPair], dict[str, str]]:
    """Convolutions of the dense network that become pairs, in order of execution, and why others do not.

    Args:
        module: the scope.
        graph: of it.
        everywhere: every k x k convolution; otherwise not those whose outputs go to one 1x1 convolution only, whose
            rows serve as the matrix.
        pointwise: 1x1 convolutions as well.
        init_method: decides the number of intermediate channels.
        ignore: regular expressions of layer names.
        include_frozen: include layers whose weights do not train.

    Raises:
        ValueError: when an expression matches nothing.
    """
    layers = [weight.removesuffix(".weight") for weight in graph.weights]
    check_matches("ignore", ignore, layers)
    pairs: dict[str, ConvPair] = {}
    reasons: dict[str, str] = {}
    stems = {group.name for group in graph.groups if group.stem}
    for weight in graph.weights:
        name = weight.removesuffix(".weight")
        conv = module.get_submodule(name) if weight.endswith(".weight") else None
        if not isinstance(conv, nn.modules.conv._ConvNd):
            continue
        is_pointwise = math.prod(conv.kernel_size) == 1
        if name in stems:
            reasons[name] = "reads the input of the scope"
        elif any(re.match(pattern, name) for pattern in ignore):
            reasons[name] = "ignored"
        elif not conv.weight.requires_grad and not include_frozen:
            reasons[name] = "its weight does not train (include_frozen=True would change it)"
        elif is_pointwise and not pointwise:
            continue
        elif (reason := why_no_pair(conv)) is not None:
            reasons[name] = reason
        elif everywhere or _pointwise_reader(module, _inner(graph, name)) is None:
            pairs[name] = ConvPair(name, pair_rank(conv.weight.shape, init_method), conv.out_channels)
    return pairs, reasons


def find_units(
    module: nn.Module,
    graph: ChannelGraph,
    pairs: dict[str, ConvPair],
    placement: str,
    ignore: Sequence[str],
    include_frozen: bool,
    reasons: dict[str, str],
) -> list[HingeUnit]:
    """Matrices and group axes of a network with pairs attached, in order of execution.

    Raises:
        ValueError: when there is none, with the reasons.
    """
    found: list[HingeUnit] = []
    outputs = {f"{name}.pair" for name in pairs}
    for group in graph.groups:
        if group.name in pairs and group.prunable:
            found += _of_pair(graph, group, placement)
        elif placement == "auto" and group.name not in outputs:
            found += _of_block(module, graph, group)
    units: list[HingeUnit] = []
    for unit in found:
        layers = [name.rpartition(".")[0] for name, _ in unit.matrices]
        frozen = [name for name, _ in unit.matrices if not module.get_parameter(name).requires_grad]
        if any(re.match(pattern, layer) for pattern in ignore for layer in layers):
            continue
        if not unit.in_order:
            reasons[layers[0]] = "a grouped convolution ties its outputs"
            continue
        if frozen and not include_frozen:
            reasons[layers[0]] = "its weight does not train (include_frozen=True would change it)"
            continue
        firsts = [index for index, other in enumerate(units) if other.which == 1]
        units.append(replace(unit, follows=firsts[-1]) if unit.which == 2 and firsts else unit)
    if not units:
        found_reasons = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:8])
        raise ValueError(f"there is no convolution to put a matrix behind: {found_reasons or 'there is none'}")
    return units


def _of_pair(graph: ChannelGraph, rows: ChannelGroup, placement: str) -> list[HingeUnit]:
    """Rows of A, columns, or both."""
    name, matrix = rows.name, f"{rows.name}.pair.weight"
    inner = _inner(graph, f"{name}.pair")
    columns = inner and HingeUnit(inner.name, inner.channels, inner.slots, matrices=((matrix, 0),), which=1)
    columns = columns if columns and columns.in_order else None
    # Only what a residual add takes ends a block; other outputs that must stay are those of the scope.
    ends = any(f"{name}.pair" in group.producers and group.coupled for group in graph.groups)
    by_row = HingeUnit(name, rows.channels, rows.slots, matrices=((matrix, 1),), which=1 + ends, is_rows=True)
    if placement == "auto":
        return [columns or by_row]
    return [by_row, columns] if placement == "both" and columns else [by_row]


def _of_block(module: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> list[HingeUnit]:
    """Existing 1x1 convolutions around a group of channels that play A."""
    if _inner(graph, group.name) is None or group.stem:
        return []
    name, slots = group.name, group.slots
    producer, reader = module.get_submodule(name), _pointwise_reader(module, group)
    made_by_pointwise = isinstance(producer, nn.modules.conv._ConvNd) and math.prod(producer.kernel_size) == 1
    depthwise = any(slot.role == "depthwise" for slot in slots)
    if made_by_pointwise:
        cardinality = None if depthwise else _cardinality(module, graph, group)
        if cardinality is not None:
            return [cardinality]
        if producer.groups > 1 or any(_is_grouped(module, slot) for slot in slots if slot.role == "in"):
            return []
        matrices = ((f"{name}.weight", 0), *([(f"{reader}.weight", 1)] if depthwise and reader else []))
        return [HingeUnit(name, group.channels, slots, matrices=matrices, which=1)]
    if reader is not None and getattr(producer, "groups", 1) == 1:
        return [HingeUnit(name, group.channels, slots, matrices=((f"{reader}.weight", 1),), which=2)]
    return []


def _inner(graph: ChannelGraph, name: str) -> ChannelGroup | None:
    """The group a layer makes alone, when its channels may go and stay inside a block."""
    for group in graph.groups:
        if name in group.producers:
            depthwise = {slot.module for slot in group.slots if slot.role == "depthwise"}
            alone = set(group.producers) <= {name, *depthwise}
            return group if group.prunable and not group.coupled and alone and group.name == name else None
    return None


def _pointwise_reader(module: nn.Module, group: ChannelGroup | None) -> str | None:
    """The 1x1 convolution that alone reads all channels of a group, in their order."""
    readers = [slot for slot in group.slots if slot.role == "in"] if group else []
    if len(readers) != 1 or readers[0].channels != tuple(range(group.channels)):
        return None
    conv = module.get_submodule(readers[0].module)
    plain = isinstance(conv, nn.modules.conv._ConvNd) and conv.groups == 1 and math.prod(conv.kernel_size) == 1
    return readers[0].module if plain else None


def _is_grouped(module: nn.Module, slot: Slot) -> bool:
    return getattr(module.get_submodule(slot.module), "groups", 1) > 1


def _cardinality(module: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> HingeUnit | None:
    """Whole groups of the grouped convolution between two 1x1 ones, when the channels lie group by group."""
    readers = [slot for slot in group.slots if slot.role == "in"]
    if len(readers) != 1 or not _is_grouped(module, readers[0]):
        return None
    name = readers[0].module
    conv, behind = module.get_submodule(name), _inner(graph, name)
    reader = behind and [slot for slot in behind.slots if slot.role == "in"]
    if not behind or len(reader) != 1 or _is_grouped(module, reader[0]):
        return None
    slots = []
    for slot in (*group.slots, *behind.slots):
        if slot == readers[0]:
            continue
        width, rest = divmod(len(slot.channels), conv.groups)
        if rest or slot.channels != tuple(range(width)) * conv.groups:
            return None
        slots.append(replace(slot, channels=tuple(c // width for c in range(len(slot.channels)))))
    matrices = ((f"{group.name}.weight", 0), (reader[0].tensor, 1))
    return HingeUnit(group.name, conv.groups, tuple(slots), matrices=matrices, which=1, convs=(name,))


# -- cost -------------------------------------------------------------------------------------------------------------


class HingeCost(CostModel):
    """Exact MACs and parameters for any kept counts, each pair merged where that is cheaper.

    Args:
        shapes: shape of every parameter of the scope with pairs.
        positions: per conv and linear weight the output positions of one forward of one image.
        units: the units that counts refer to.
        pairs: the pairs by name.
        merges: whether pairs may become one convolution again.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        positions: dict[str, int],
        units: Sequence[HingeUnit],
        pairs: dict[str, ConvPair],
        merges: bool = True,
    ) -> None:
        """See the class."""
        self.pairs, self.merges = pairs, merges
        super().__init__(shapes, positions, units)

    @staticmethod
    def params_of(shapes: dict[str, tuple[int, ...]]) -> int:
        """Elements of all parameters."""
        return sum(math.prod(shape) for shape in shapes.values())

    def _saved(self, counts: Sequence[int], name: str) -> int:
        """Weights that merging a pair saves."""
        if not self.merges:
            return 0
        conv, pair = (self._shape(f"{name}{part}.weight", counts) for part in ("", ".pair"))
        merged = pair[0] * math.prod(conv[1:])
        return max(math.prod(conv) + math.prod(pair) - merged, 0)

    def macs(self, counts: Sequence[int]) -> int:
        """Multiply-adds of convolutions and linear layers."""
        saved = sum(self._saved(counts, name) * self.positions.get(f"{name}.weight", 0) for name in self.pairs)
        return super().macs(counts) - saved

    def params(self, counts: Sequence[int]) -> int:
        """Parameters, norms and biases included."""
        return super().params(counts) - sum(self._saved(counts, name) for name in self.pairs)

    def pair_structures(self, counts: Sequence[int], masks: dict[str, Tensor]) -> list[Structure]:
        """What becomes of each pair: fewer intermediate channels, or one convolution again."""
        found: list[Structure] = []
        rows = {unit.name for unit in self.units if unit.is_rows}
        for name, pair in self.pairs.items():
            keep = tuple(masks[name].nonzero().flatten().tolist()) if name in rows else tuple(range(pair.rank))
            conv, mixer = (self._shape(f"{name}{part}.weight", counts) for part in ("", ".pair"))
            merge = self.merges and merging_is_cheaper(mixer[0], conv[0], conv[1], math.prod(conv[2:]))
            found.append(LowRank(name, keep, pair.rank, merge))
        return found

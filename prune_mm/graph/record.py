"""What one shadow execution saw, before it is understood as groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prune_mm.structures.slots import Role


@dataclass(frozen=True)
class Shadow:
    """Provenance of one activation.

    Attributes:
        ids: int64, same shape as the activation; often expanded (stride 0), so it costs no memory.
        zero: whether a dead channel's elements are exactly zero here (true behind a conv or a norm whose
            rows are masked, false behind a sigmoid).
        depth: number of weight layers passed since the input; tells a shortcut from the main branch.
    """

    ids: Tensor
    zero: bool
    depth: int


@dataclass(frozen=True)
class RawSlot:
    """A parameter axis with the ids that were seen there, before ids are grouped."""

    tensor: str
    axis: int
    ids: Tensor
    role: Role


@dataclass
class Block:
    """Ids made together: the output channels of one weight layer, a vector parameter, or the result of an addition."""

    first: int
    count: int
    layer: str | None
    depth: int = 0
    reads_input: bool = False
    vector: bool = False


@dataclass
class Tie:
    """Two sets of ids that met in a pointwise operator and so live or die together."""

    operator: str
    where: str
    blocks: tuple[int, ...]
    zero: tuple[bool, ...]
    depths: tuple[int, ...]


@dataclass
class TraceRecord:
    """Everything one shadow execution saw.

    Attributes:
        slots: parameter axes and the ids seen there, at the first use of the parameter.
        edges: pairs of ids that live or die together.
        blocks: ids by who made them, ascending.
        ties: where blocks met.
        frozen: ids that must stay, with the reason.
        reshaped: ids that went through an operator with sizes, with the operator.
        reads: ids read by a layer that has no slot for them (depthwise convolutions).
        positions: per weight at how many positions it was applied.
        lost: parameters that were used in a way no slot describes, with the reason.
        reused: norm parameters that several sets of ids pass through.
        next_id: the next id that is free.
    """

    slots: list[RawSlot] = field(default_factory=list)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    reshaped: list[tuple[Tensor, str]] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    next_id: int = 1

"""Convolutions as pairs, k x k then 1x1: the training form, and the structures that make it, cut it and merge it.

The pair hangs on the convolution it stands for, so its name keeps its meaning: ``conv1.weight`` makes the intermediate
channels, ``conv1.pair.weight`` mixes them into the outputs, and the bias, which is added behind the pair, is
``conv1.pair.bias``. ``pair`` is an ordinary 1x1 convolution; the channel graph of a network with pairs has a group
``conv1`` of intermediate channels and a group ``conv1.pair`` of outputs, and a state dict of the dense network loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, index_list, number, register_structure, text
from prune_mm.structures.channel_slice import MAX_CHANNELS
from prune_mm.structures.slots import Slot

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# -- the pair ---------------------------------------------------------------------------------------------------------


def pair_matrix(weight: Tensor) -> Tensor:
    """The sparsity-inducing matrix A of a 1x1 kernel: ``(n, r, 1, 1)`` to ``(r, n)``, a view whose writes reach it.

    Row i belongs to intermediate channel i, column j to output j.

    Raises:
        ValueError: when the kernel is larger than 1x1.
    """
    if math.prod(weight.shape[2:]) != 1:
        raise ValueError(f"a kernel of shape {tuple(weight.shape)} is no matrix")
    while weight.ndim > 2:
        weight = weight.select(-1, 0)
    return weight.T


def merged_kernel(weight: Tensor, matrix: Tensor) -> Tensor:
    """The one kernel that W ``(r, c, k, ...)`` and A ``(r, n)`` amount to, ``(n, c, k, ...)``; computed in float64."""
    kernel = matrix.detach().double().T @ weight.detach().double().flatten(1)
    return kernel.to(weight.dtype).view(-1, *weight.shape[1:])


def dense_kernel(conv: nn.Module) -> Tensor:
    """Kernel of a layer, ``(n, c, k, ...)``; that of a pair is merged."""
    return merged_kernel(conv.weight, pair_matrix(conv.pair.weight)) if is_paired(conv) else conv.weight.detach()


def exact_pair(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A pair that computes what ``kernel`` does, made without arithmetic.

    Args:
        kernel: ``(n, c, k, ...)``, with d = c * k * ... elements a filter.
        rank: n (W is the kernel and A the identity) or d (W is the identity and A the kernel).

    Returns:
        W ``(rank, c, k, ...)`` and A ``(rank, n)``.

    Raises:
        ValueError: for another rank.
    """
    outputs, taps = kernel.shape[0], kernel[0].numel()
    if rank == outputs:
        return kernel.clone(), torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
    if rank == taps:
        unit = torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
        return unit.view(rank, *kernel.shape[1:]), kernel.flatten(1).T.clone()
    raise ValueError(f"{outputs} filters of {taps} weights make a pair of rank {outputs} or {taps}, not {rank}")


def is_paired(module: nn.Module) -> bool:
    """Whether a module is a convolution with a pair."""
    return isinstance(module, _CONVS) and isinstance(module._modules.get("pair"), _CONVS)


def why_no_pair(module: nn.Module) -> str | None:
    """Why a module cannot become a pair, or None when it can."""
    base = next((cls for cls in _CONVS if isinstance(module, cls)), None)
    if base is None:
        return f"it is a {type(module).__name__}, not a convolution"
    if module.groups > 1:
        return f"it has {module.groups} groups, and a full matrix behind it would mix them"
    if type(module).forward is not base.forward or "weight" not in module._parameters:
        return "it computes its weight or its output in a way of its own"
    return "it is a pair already" if is_paired(module) else None


@torch.no_grad()
def attach_pair(conv: nn.Module, rank: int | None = None) -> nn.Module:
    """Give a convolution the training form, in place, without changing what it computes; see :func:`exact_pair`.

    Attach before an optimizer, DDP or an averaged copy is made of the network. A state dict of the dense network can
    be loaded afterwards and is split the same way; :func:`set_pair` then sets another split. Whatever initialises
    weights in between is made good by :func:`reset_unloaded_pair`.

    Args:
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups.
        rank: intermediate channels, n or d; None: the smaller one.

    Returns:
        The 1x1 convolution ``conv.pair``.

    Raises:
        ValueError: saying why it cannot become a pair.
    """
    reason = why_no_pair(conv)
    if reason is not None:
        raise ValueError(f"no pair can be attached: {reason}")
    weight, bias = conv.weight, conv.bias
    outputs = weight.shape[0]
    filters, matrix = exact_pair(weight.detach(), min(outputs, weight[0].numel()) if rank is None else rank)
    cls = next(cls for cls in _CONVS if isinstance(conv, cls))
    # On the meta device nothing is drawn from a random generator.
    pair = cls(filters.shape[0], outputs, 1, bias=False, device="meta", dtype=weight.dtype)
    pair.weight = nn.Parameter(matrix.T.reshape(outputs, -1, *[1] * (weight.ndim - 2)), weight.requires_grad)
    pair.bias = bias
    pair.training = conv.training
    conv.bias = None
    conv.out_channels = filters.shape[0]
    if filters.shape != weight.shape:
        conv.weight = nn.Parameter(filters, weight.requires_grad)
    conv.add_module("pair", pair)
    # Before whatever scatters or gathers behind the convolution already.
    conv.register_forward_hook(MixOutputs(), prepend=True)
    conv.register_load_state_dict_pre_hook(SplitDense())
    return pair


@torch.no_grad()
def merge_pair_(conv: nn.Module) -> None:
    """The reverse of :func:`attach_pair`: one convolution with the merged kernel, in place."""
    kernel, pair = dense_kernel(conv), conv.pair
    conv.weight = nn.Parameter(kernel, conv.weight.requires_grad)
    conv.out_channels = kernel.shape[0]
    del conv.pair
    conv.bias = pair.bias
    for hooks, cls in ((conv._forward_hooks, MixOutputs), (conv._load_state_dict_pre_hooks, SplitDense)):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), cls)]:
            del hooks[key]


@torch.no_grad()
def set_pair(conv: nn.Module, weight: Tensor, matrix: Tensor) -> None:
    """Set W ``(r, c, k, ...)`` and A ``(r, n)`` of a pair, keeping its parameters (optimizers hold them).

    Raises:
        ValueError: when they are of other sizes.
    """
    own = pair_matrix(conv.pair.weight)
    if weight.shape != conv.weight.shape or matrix.shape != own.shape:
        found, expected = ((*a.shape, *b.shape) for a, b in ((weight, matrix), (conv.weight, own)))
        raise ValueError(f"W and A have sizes {found}, the pair has {expected}")
    conv.weight.copy_(weight)
    own.copy_(matrix)


@torch.no_grad()
def reset_unloaded_pair(conv: nn.Module) -> None:
    """Undo what weight initialisation did to A: no weights were loaded, so W alone is the kernel, where sizes allow.

    Initialisers of whole networks (``init_cfg`` of OpenMMLab) take ``pair`` for a convolution like any other.
    """
    hooks = (getattr(hook, "hook", hook) for hook in conv._load_state_dict_pre_hooks.values())
    loaded = any(hook.loaded for hook in hooks if isinstance(hook, SplitDense))
    matrix = pair_matrix(conv.pair.weight)
    if not loaded and matrix.shape[0] == matrix.shape[1]:
        matrix.copy_(torch.eye(len(matrix)))


class MixOutputs:
    """Forward hook that runs the 1x1 convolution behind the k x k one; a hook keeps names and class of the latter."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """``(N, r, ...)`` to ``(N, n, ...)``."""
        return module.pair(output)


class SplitDense:
    """Hook that splits the kernel of the dense network when its state dict is loaded into a pair."""

    def __init__(self) -> None:
        """Nothing was loaded yet."""
        self.loaded = False

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Replace the dense tensors of ``state``, which is the loader's own copy."""
        kernel, key = state.get(f"{prefix}weight"), f"{prefix}pair.weight"
        if kernel is None:
            return
        self.loaded = True
        rank, mixed = module.weight.shape[0], module.pair.weight
        fits = kernel.ndim == mixed.ndim and kernel.shape == (mixed.shape[0], *module.weight.shape[1:])
        if key in state or not fits or rank not in (kernel.shape[0], kernel[0].numel()):
            return
        filters, matrix = exact_pair(kernel, rank)
        state[f"{prefix}weight"], state[key] = filters, matrix.T.reshape(mixed.shape)
        if f"{prefix}bias" in state:
            state[f"{prefix}pair.bias"] = state.pop(f"{prefix}bias")


def behind_pair(slot: Slot, paired: set[str]) -> Slot:
    """A slot of the dense network in the network with pairs: rows and bias of a pair are those of its 1x1 convolution.

    Args:
        slot: as in the channel graph of the dense network.
        paired: names of the convolutions that are pairs.
    """
    own = slot.module in paired and slot.role in ("out", "bias")
    return replace(slot, tensor=f"{slot.module}.pair.{slot.tensor.rpartition('.')[2]}") if own else slot


def dense_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes the tensors of a network with uncut pairs have without them, as in a dense checkpoint."""
    dense = {name: tuple(shape) for name, shape in shapes.items()}
    for name in shapes:
        owner = name.removesuffix("pair.weight")
        if owner == name or f"{owner}weight" not in dense:
            continue
        dense[f"{owner}weight"] = (dense.pop(name)[0], *dense[f"{owner}weight"][1:])
        if f"{owner}pair.bias" in dense:
            dense[f"{owner}bias"] = dense.pop(f"{owner}pair.bias")
    return dense


def merging_is_cheaper(outputs: int, rank: int, inputs: int, taps: int) -> bool:
    """Whether one convolution has at most the weights, and so the MACs, of a pair; both run at the same positions.

    Args:
        outputs: n, outputs that stay.
        rank: r, intermediate channels that stay.
        inputs: c, inputs that stay.
        taps: elements of the k x k kernel.
    """
    return outputs * inputs * taps <= rank * (inputs * taps + outputs)


# -- structures -------------------------------------------------------------------------------------------------------


class _OfPair(Structure):
    """What structures of pairs share: the tensors' names."""

    @property
    def weight(self) -> str:
        """Dotted name of W, the kernel of the intermediate channels."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def mixer(self) -> str:
        """Dotted name of the 1x1 kernel that holds A."""
        return f"{self.name}.pair.weight" if self.name else "pair.weight"

    def _move_bias(self, shapes: dict[str, list[int]], behind: bool) -> None:
        inner, outer = (name.removesuffix("weight") + "bias" for name in (self.weight, self.mixer))
        source, target = (inner, outer) if behind else (outer, inner)
        if source in shapes:
            shapes[target] = shapes.pop(source)

    def _conv(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.name)
        except AttributeError as error:
            raise ValueError(f"the network has no module '{self.name}'") from error


@register_structure
@dataclass(frozen=True)
class ConvPair(_OfPair):
    """A convolution that becomes a pair and computes what it did. Stands in a stage before the one that cuts it.

    Applied to a network that has the pair already, it only checks its size: so the same plan serves the network that
    was trained and one that is built from the dense config.

    Attributes:
        name: dotted name of the convolution.
        rank: intermediate channels r: the number of outputs, or of weights of a filter.
        outputs: outputs n.
    """

    kind: ClassVar[str] = "ConvPair"
    attaches: ClassVar[bool] = True
    name: str
    rank: int
    outputs: int

    def apply_mask(self, module: nn.Module) -> None:
        """Nothing to mask."""

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Nothing to cut."""
        return []

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        conv = self._conv(module)
        paired, reason = is_paired(conv), why_no_pair(conv)
        if reason is not None and not paired:
            raise ValueError(f"'{self.name}' cannot become a pair: {reason}")
        outputs = conv.pair.weight.shape[0] if paired else conv.weight.shape[0]
        ranks = (conv.weight.shape[0],) if paired else (outputs, conv.weight[0].numel())
        if outputs != self.outputs or self.rank not in ranks:
            raise ValueError(
                f"'{self.name}' has {outputs} outputs and can have rank {' or '.join(map(str, ranks))}, "
                f"the plan expects {self.outputs} and {self.rank}"
            )

    def rewrite(self, module: nn.Module) -> None:
        """Attach the pair."""
        conv = self._conv(module)
        if not is_paired(conv):
            attach_pair(conv, self.rank)

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """One weight becomes two."""
        if self.weight in shapes and self.mixer not in shapes:
            shapes[self.mixer] = [self.outputs, self.rank, *[1] * (len(shapes[self.weight]) - 2)]
            shapes[self.weight][0] = self.rank
            self._move_bias(shapes, behind=True)

    def place(self, positions: dict[str, int]) -> None:
        """The 1x1 kernel is applied wherever the convolution is."""
        if self.weight in positions:
            positions[self.mixer] = positions[self.weight]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"type": self.kind, "name": self.name, "rank": self.rank, "outputs": self.outputs}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConvPair:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        sizes = [number(data[key], 1, MAX_CHANNELS, f"{what}: {key}") for key in ("rank", "outputs")]
        return cls(data["name"], *sizes)


@register_structure
@dataclass(frozen=True)
class LowRank(_OfPair):
    """The intermediate channels of a pair that stay.

    Masked: rows of A that belong to the others are zero, and the filters that make them. Compact: a narrower pair, or
    one convolution again. Outputs are the matter of a :class:`~prune_mm.structures.channel_slice.ChannelSlice` of the
    same stage, whose slots name ``<conv>.pair.weight`` and ``<conv>.pair.bias`` (:func:`behind_pair`).

    Attributes:
        name: dotted name of the convolution.
        keep: intermediate channels that stay, ascending.
        rank: number of intermediate channels before.
        merge: whether the compact form is one convolution; see :func:`merging_is_cheaper`.
    """

    kind: ClassVar[str] = "LowRank"
    name: str
    keep: tuple[int, ...]
    rank: int
    merge: bool = False

    @classmethod
    def from_mask(cls, name: str, mask: Tensor, merge: bool = False) -> LowRank:
        """From a boolean vector over the intermediate channels.

        Raises:
            ValueError: when none would stay.
        """
        keep = tuple(torch.nonzero(mask.cpu()).flatten().tolist())
        if not keep:
            raise ValueError(f"{cls.kind} '{name[:80]}': at least one intermediate channel must stay")
        return cls(name, keep, mask.numel(), merge)

    @property
    def mask(self) -> Tensor:
        """Boolean vector over the intermediate channels."""
        mask = torch.zeros(self.rank, dtype=torch.bool)
        mask[list(self.keep)] = True
        return mask

    def apply_mask(self, module: nn.Module) -> None:
        """Zero rows of A and filters of intermediate channels that do not stay, in place.

        Raises:
            ValueError: naming the layer, when ``module`` is not the network the structure was made for.
        """
        self.check(module)
        conv = self._conv(module)
        dead = (~self.mask).to(conv.weight.device)
        conv.weight.data[dead] = 0
        pair_matrix(conv.pair.weight.data)[dead] = 0

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Filters of W and rows of A."""
        return [(self.weight, 0, self.mask), (self.mixer, 1, self.mask)]

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        conv = self._conv(module)
        if not is_paired(conv):
            raise ValueError(f"'{self.name}' is no pair; a stage before must make it one")
        if conv.groups > 1 or conv.pair.groups > 1:
            raise ValueError(f"the pair '{self.name}' was divided into groups")
        if conv.weight.shape[0] != self.rank:
            raise ValueError(f"the pair '{self.name}' has rank {conv.weight.shape[0]}, the plan expects {self.rank}")

    def rewrite(self, module: nn.Module) -> None:
        """Merge what is left of the pair, where that was decided."""
        if self.merge:
            merge_pair_(self._conv(module))

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """Two weights become one, where that was decided."""
        if self.merge and self.weight in shapes and self.mixer in shapes:
            shapes[self.weight][0] = shapes.pop(self.mixer)[0]
            self._move_bias(shapes, behind=False)

    def place(self, positions: dict[str, int]) -> None:
        """A merged 1x1 kernel is applied nowhere."""
        if self.merge:
            positions.pop(self.mixer, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {"type": self.kind, "name": self.name, "rank": self.rank, "keep": list(self.keep)}
        return data | {"merge": self.merge}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LowRank:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        rank = number(data["rank"], 1, MAX_CHANNELS, f"{what}: rank")
        keep = index_list(data["keep"], rank, f"{what}: keep")
        if not keep:
            raise ValueError(f"{what}: keep is empty, at least one intermediate channel must stay")
        if type(data["merge"]) is not bool:
            raise ValueError(f"{what}: merge must be true or false, got {data['merge']!r:.80}")
        return cls(data["name"], keep, rank, data["merge"])


# -- constants --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def removed_constant(norm: nn.Module | None, act: nn.Module | None, bias: Tensor | None = None) -> Tensor:
    """What each channel emits in eval mode when its convolution gives zero: c_j = act(beta - gamma * mean / sigma).

    A zero column of A does not silence its output: the bias, the shift of the norm and the activation remain.

    Args:
        norm: batch norm with running statistics behind the convolution, or None.
        act: pointwise activation behind that, or None.
        bias: ``(n,)`` bias of the convolution, in front of the norm; needed when there is no norm.

    Returns:
        ``(n,)`` float64 on the norm's device.

    Raises:
        ValueError: when there is neither norm nor bias, or the norm has no statistics of its own.
    """
    if norm is None:
        if bias is None:
            raise ValueError("neither a norm nor a bias: removed channels emit act(0), of which the number is unknown")
        value = bias.double()
    else:
        if getattr(norm, "running_mean", None) is None:
            raise ValueError(f"a {type(norm).__name__} without running statistics emits no constant")
        value = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
        value = value * (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            value = value * norm.weight.double() + norm.bias.double()
    if act is not None:
        parameter = next(act.parameters(), value)
        value = act(value.to(parameter.dtype).view(1, -1, 1, 1)).flatten().double()
    return value


@torch.no_grad()
def fold_constant(consumer: nn.Module, constant: Tensor, removed: Tensor, norm: nn.Module | None = None) -> None:
    """Move what removed channels still emit into the layer that reads them, in place; then they may be cut.

    Exact for linear layers, for convolutions without padding and for padding that repeats the input. *Not* exact where
    a convolution pads with zeros: there the constant is missing in the padding, so what it adds depends on the
    position. Such layers are refused; either the shift of the norm is masked while the network is fine-tuned, or
    :func:`carry_constant` keeps one channel.

    Args:
        consumer: the convolution (a pair, too) or linear layer that reads the channels.
        constant: ``(n,)``, from :func:`removed_constant`.
        removed: boolean ``(n,)``, channels to remove.
        norm: batch norm behind the consumer, whose mean takes the constant when the consumer has no bias (a new bias
            would be a new parameter).

    Raises:
        ValueError: when it would not be exact, or there is neither bias nor norm.
    """
    constant = _removed_only(consumer, constant, removed)
    if not bool(constant.any()):
        return
    if not _is_position_free(consumer):
        raise ValueError(
            f"a {type(consumer).__name__} that pads with zeros cannot take a constant exactly: mask the norm's shift "
            "of removed channels while fine-tuning, or keep one of them (carry_constant)"
        )
    response = dense_kernel(consumer).double().unsqueeze(-1).flatten(2).sum(2) @ constant
    bias = (consumer.pair if is_paired(consumer) else consumer).bias
    if bias is not None:
        bias += response.to(bias.dtype)
    elif getattr(norm, "running_mean", None) is not None:
        norm.running_mean -= response.to(norm.running_mean.dtype)
    else:
        raise ValueError("the layer that reads the constant has no bias, and no batch norm behind it was given")


@torch.no_grad()
def carry_constant(consumer: nn.Module, constant: Tensor, removed: Tensor, carrier: int | None = None) -> int | None:
    """Let one removed channel stay and emit for all of them, in place: exact whatever the padding is.

    The kernels that read the removed channels are summed into those of the one with the largest constant, weighted
    with their constants, and set to zero elsewhere. Its own constant stays, and must not be masked.

    Args:
        consumer: the convolution or linear layer that reads the channels.
        constant: ``(n,)``, from :func:`removed_constant`.
        removed: boolean ``(n,)``, channels that emit nothing but their constant.
        carrier: the one that stays, which must not emit zero; None: the one with the largest constant.

    Returns:
        The channel to keep, or None when all of them emit zero and may go.
    """
    constant = _removed_only(consumer, constant, removed)
    if carrier is None:
        carrier = int(constant.abs().argmax()) if constant.numel() else 0
    columns = removed.to(constant.device).nonzero().flatten()
    if not bool(constant.any()):
        return None
    weight = consumer.weight.data
    total = torch.einsum("nc...,c->n...", weight.double(), constant) / constant[carrier]
    weight[:, columns] = 0
    weight[:, carrier] = total.to(weight.dtype)
    return carrier


def _removed_only(consumer: nn.Module, constant: Tensor, removed: Tensor) -> Tensor:
    """The constants of removed channels, and zero for the others, after checking the sizes."""
    if not isinstance(consumer, (*_CONVS, nn.Linear)) or getattr(consumer, "groups", 1) > 1:
        raise ValueError(f"a {type(consumer).__name__} with groups or without a kernel takes no constant")
    if consumer.weight.shape[1] != constant.numel() or removed.shape != constant.shape:
        found = (constant.numel(), removed.numel())
        raise ValueError(f"the layer reads {consumer.weight.shape[1]} channels; constants and mask have {found}")
    return torch.where(removed.to(constant.device), constant.double(), 0.0).to(consumer.weight.device)


def _is_position_free(consumer: nn.Module) -> bool:
    """Whether a layer maps a constant input to a constant output."""
    if isinstance(consumer, nn.Linear) or consumer.padding_mode != "zeros" or consumer.padding == "valid":
        return True
    if consumer.padding == "same":
        return math.prod(consumer.kernel_size) == 1
    return not any(consumer.padding)

"""Trust, but run it: cut a copy at random, and freeze the groups whose cut form computes something else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.graph.groups import ChannelGraph, ChannelGroup, Shortcut
from prune_mm.graph.tensors import tensors_of
from prune_mm.structures.base import Structure
from prune_mm.structures.channel_slice import ChannelSlice, ShortcutSlice
from prune_mm.structures.plan import compact_stage
from prune_mm.structures.slots import get_tensor, set_tensor

#: Relative to the largest output; float32 round-off of deep nets is below 1e-5, a wrong cut is above 1e-2.
TOLERANCE = 1e-4

#: A hard-coded width can fit one random cut by luck, hardly two in a row.
CUTS_THROUGH_SIZES = 2

_NOT_FINITE = "the output is not finite (are all weights initialised?)"


def freeze_what_fails(module: nn.Module, inputs: tuple, graph: ChannelGraph, seed: int = 0) -> None:
    """Freeze the groups of ``graph`` that cannot be cut exactly, with the reason.

    Everything is cut at once; only when that fails are halves of the groups tried, and halves of those. Groups that
    pass an operator with sizes come last, since code that hard-codes a width does so there.
    """
    checker = Checker(module, inputs, seed)
    together = False
    passed, wanted = 0, CUTS_THROUGH_SIZES if graph.fragile else 1
    while graph.prunable and passed < wanted:
        if checker.failure(graph.prunable) is None:
            passed += 1
            continue
        passed = 0
        baseline = checker.failure([])
        if baseline is not None:
            cause = baseline if baseline == _NOT_FINITE else "the module computes something else at every call"
            for group in graph.prunable:
                graph.freeze(group.name, f"no cut can be checked: {cause}")
            return
        # Small cuts are quick to check. What survives is cut together in the next round, and only if that fails,
        # does every further check cut it, too.
        context: list[ChannelGroup] | None = [] if together else None
        together = True
        fragile = [group for group in graph.prunable if group.name in graph.fragile]
        sound = [group for group in graph.prunable if group.name not in graph.fragile]
        for groups in (sound, fragile):
            for group, failure in rejected(checker, context, groups):
                cause = f"{graph.fragile[group.name]}; " if group.name in graph.fragile else ""
                graph.freeze(group.name, f"the code fixes its width ({cause}{failure})")


def drop_shortcuts_that_fail(module: nn.Module, inputs: tuple, graph: ChannelGraph, seed: int = 0) -> None:
    """Forget the shortcut projections of ``graph`` whose rows cannot be left out exactly."""
    if not graph.shortcuts:
        return
    checker = _ShortcutChecker(module, inputs, seed)
    if checker.failure(graph.shortcuts) is not None:
        failed = {shortcut.layer for shortcut, _ in rejected(checker, None, graph.shortcuts)}
        graph.shortcuts = [shortcut for shortcut in graph.shortcuts if shortcut.layer not in failed]


def rejected(checker: Checker, context: list | None, groups: list) -> Iterator[tuple[Any, str]]:
    """Yield the groups that cannot be cut, with what goes wrong; the others are added to ``context`` if there is one.

    Args:
        checker: cuts and compares.
        context: groups that are always cut as well; None to check on its own whatever is checked.
        groups: what to check: all of it, then halves of what fails.
    """
    if not groups:
        return
    failure = checker.failure([*(context or []), *groups])
    if failure is None:
        if context is not None:
            context.extend(groups)
    elif len(groups) == 1:
        yield groups[0], failure
    else:
        middle = len(groups) // 2
        yield from rejected(checker, context, groups[:middle])
        yield from rejected(checker, context, groups[middle:])


class Checker:
    """Compares masked and compact forms on one copy of the module, which is put back after every cut."""

    def __init__(self, module: nn.Module, inputs: tuple, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.subject = _randomised_copy(module, self.generator)
        self.inputs = inputs

    def failure(self, groups: list[ChannelGroup]) -> str | None:
        """Cut ``groups`` at random; None when masked and compact agree, else what went wrong."""
        return self.compare([self._random_slice(group) for group in groups], _tensors_of(groups))

    @torch.no_grad()
    def compare(self, pieces: list[Structure], written: set[str]) -> str | None:
        """Compare the two forms of a stage.

        Args:
            pieces: the stage.
            written: tensors that it masks, cuts or re-orders.

        Returns:
            None when they agree, else what went wrong.
        """
        # The compact form comes first, since most failures are errors that it raises early.
        try:
            with self._own_tensors(written):
                compact_stage(self.subject, pieces)
                found = tensors_of(self.subject(*self.inputs))
        except Exception as error:  # whatever the network's own code raises when its widths do not fit
            return f"cutting it raises {type(error).__name__}"
        with self._own_tensors(written):
            for piece in pieces:
                piece.apply_mask(self.subject)
            expected = tensors_of(self.subject(*self.inputs))
        if not all(bool(torch.isfinite(t).all()) for t in expected):
            return _NOT_FINITE
        if [t.shape for t in expected] != [t.shape for t in found]:
            return "cutting it changes the shape of the output"
        if not all(_close(a, b) for a, b in zip(expected, found)):
            return "cutting it changes the output"
        return None

    @contextmanager
    def _own_tensors(self, names: set[str]) -> Iterator[None]:
        """Let tensors be written to, and put everything back afterwards."""
        with _put_back(self.subject):
            for name in names:
                set_tensor(self.subject, name, get_tensor(self.subject, name).clone())
            yield

    def _random_slice(self, group: ChannelGroup) -> ChannelSlice:
        keep = torch.rand(group.channels, generator=self.generator) < 0.6
        keep[int(torch.randint(group.channels, (1,), generator=self.generator))] = True
        if bool(keep.all()):
            keep[int(torch.randint(group.channels, (1,), generator=self.generator))] = False
        return ChannelSlice.from_mask(group.name, keep, group.slots)


class _ShortcutChecker(Checker):
    """Checks shortcut projections that lose rows at random."""

    def failure(self, shortcuts: list[Shortcut]) -> str | None:
        """None when masked and compact agree, else what went wrong."""
        pieces = []
        for shortcut in shortcuts:
            keep = torch.rand(shortcut.channels, generator=self.generator) < 0.6
            keep[0], keep[-1] = True, False
            pieces.append(ShortcutSlice.from_shortcut(shortcut.layer, keep, shortcut.slots, shortcut.end))
        return self.compare(pieces, {slot.tensor for shortcut in shortcuts for slot in shortcut.slots})


def _tensors_of(groups: list[ChannelGroup]) -> set[str]:
    return {slot.tensor for group in groups for slot in group.slots}


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Undo whatever happens to the attributes of a module tree; tensors themselves must not be written to."""
    saved = []
    for child in module.modules():
        state = {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in vars(child).items()}
        saved.append((child, state))
    try:
        yield
    finally:
        for child, state in saved:
            vars(child).clear()
            vars(child).update(state)


def _close(expected: Tensor, found: Tensor) -> bool:
    if not (expected.dtype.is_floating_point or expected.dtype.is_complex):
        return bool((expected == found).all())
    scale = float(expected.abs().max()) + 1e-12 if expected.numel() else 1.0
    difference = float((expected - found).abs().max()) if expected.numel() else 0.0
    return bool(torch.isfinite(found).all()) and difference <= TOLERANCE * scale


@torch.no_grad()
def _randomised_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in eval mode whose parameters and statistics hide nothing (zero-initialised gammas would).

    It shares the other tensors with the module, so none may be written to.
    """
    shared = [*module.parameters(), *module.buffers()]
    subject = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    for child in subject.modules():
        child.training = False
        is_norm = isinstance(child, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if is_norm and name in ("weight", "bias", "running_mean", "running_var"):
                low, width = (-0.3 if name in ("bias", "running_mean") else 0.5), 1.0
            elif isinstance(tensor, nn.Parameter) and _hides_something(tensor):
                low, width = 0.1, (max(1, tensor[0].numel()) if tensor.ndim > 1 else 1) ** -0.5
            else:
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            set_tensor(child, name, low + width * noise)
    return subject


def _hides_something(tensor: Tensor) -> bool:
    """Whether a parameter is all but zero, or so large that it may be what was in memory before it is initialised."""
    if not tensor.numel() or not tensor.dtype.is_floating_point:
        return False
    low, high = (float(value) for value in torch.aminmax(tensor))
    largest = max(abs(low), abs(high))
    # Written so that NaN counts.
    return largest < 1e-3 or not (low > -1e3 and high < 1e3)

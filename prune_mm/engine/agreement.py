"""Decisions in a distributed run: rank 0 decides, everybody gets it, everybody checks."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_distributed
from mmengine import dist
from torch import Tensor, nn

from prune_mm.pruners import Decision, Pruner
from prune_mm.pruners.base import TensorBank

#: How long ranks wait for a decision of rank 0, whatever the time-out of the process group is.
PATIENCE = timedelta(hours=6)
#: Numbers that every rank computes for itself may differ by this share between kinds of GPUs.
TOLERANCE = 1e-3
_meetings = itertools.count()
#: Scores of feature maps by layer, where a method wants them.
Features = dict[str, Tensor] | None


@dataclass(frozen=True)
class Decided:
    """A decision, and the seconds that rank 0 took for it, while the others waited."""

    decision: Decision
    seconds: float


def decided_on_rank_0(
    pruner: Pruner,
    module: nn.Module,
    step: int | None,
    decide: Callable[[Features], Decision],
    collect: Callable[[], Features] = lambda: None,
) -> Decided:
    """Run ``decide`` on rank 0 and hand its result to every rank.

    Args:
        pruner: whose decision it is; parts of it that are independent are computed by all ranks side by side.
        module: its scope.
        step: of the update; None: the first decision.
        decide: takes the decision from the features of all ranks.
        collect: gives the features of this rank, which are summed over ranks.

    Raises:
        RuntimeError: on every rank, when ``decide`` fails on rank 0; nobody waits for a decision that never comes.
    """
    begin = time.perf_counter()
    if dist.get_world_size() == 1:
        decision = decide(collect())
        return Decided(decision, time.perf_counter() - begin)
    features = _summed(collect())
    _share_parts(pruner, module, step)
    message: list = [None, None, 0.0]
    cause = None
    if dist.get_rank() == 0:
        try:
            decision = {name: tensor.cpu() for name, tensor in decide(features).items()}
            message[1] = {name: (tuple(t.shape), str(t.dtype)) for name, t in decision.items()}
        except Exception as error:
            cause = error
            message[0] = f"{type(error).__name__}: {error}"
        message[2] = time.perf_counter() - begin
    _wait_for([0])
    pruner.give_parts({})
    dist.broadcast_object_list(message, src=0)
    failure, layout, seconds = message
    if failure is not None:
        raise RuntimeError(f"the pruning decision failed on rank 0: {failure}") from cause
    if dist.get_rank() != 0:
        decision = {n: torch.zeros(s, dtype=getattr(torch, d.rpartition(".")[2])) for n, (s, d) in layout.items()}
    return Decided({name: _broadcast(tensor) for name, tensor in decision.items()}, seconds)


def time_of_decision(decided: Decided) -> str:
    """How long it took, and who waited, for the log."""
    others = dist.get_world_size() - 1
    waited = f" on rank 0, while {others} other{'s' if others > 1 else ''} waited" if others else ""
    return f"decided in {decided.seconds:.2f} s{waited}"


def _summed(features: Features) -> Features:
    """Sums over ranks, in one collective."""
    if features is None:
        return None
    _wait_for(range(dist.get_world_size()))
    flat = torch.cat([tensor.flatten() for tensor in features.values()])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in features.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(features.items(), parts)}


def _share_parts(pruner: Pruner, module: nn.Module, step: int | None) -> None:
    """Let every rank compute some parts of a decision, and give all of them to every rank.

    It only saves time. Where a part fails, rank 0 meets the same error when it decides alone.
    """
    costs = pruner.parts(step)
    if not costs:
        return
    try:
        mine = {name: pruner.part(module, step, name) for name in shares(costs, dist.get_world_size())[dist.get_rank()]}
    except Exception:
        mine = {}
    _wait_for(range(dist.get_world_size()))
    found = dist.all_gather_object(mine)
    pruner.give_parts({name: part for parts in found for name, part in parts.items()})


def shares(costs: dict[str, float], ranks: int) -> list[list[str]]:
    """Names for each rank, so that none has much more to do than another: the longest goes to who has the least."""
    names: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        rank = loads.index(min(loads))
        names[rank].append(name)
        loads[rank] += costs[name]
    return names


def _wait_for(ranks: Sequence[int]) -> None:
    """Wait until these ranks are here, by the key-value store of the process group: a collective would end the run
    after its time-out (10 minutes with NCCL), however well they are doing.

    Raises:
        RuntimeError: when one of them has died or takes longer than ``PATIENCE``.
    """
    # There is no public way to the store; back ends that have none (MPI) wait in the collective that follows.
    store = torch_distributed.distributed_c10d._get_default_store()
    if store is None:
        return
    meeting = next(_meetings)
    keys = {rank: f"prune_mm/meeting_{meeting}/{rank}" for rank in ranks}
    if dist.get_rank() in keys:
        store.set(keys[dist.get_rank()], b"here")
    try:
        store.wait(list(keys.values()), PATIENCE)
    except RuntimeError as error:
        who = "rank 0 has" if len(keys) == 1 else "another rank has"
        raise RuntimeError(f"{who} ended, or has not decided what to prune within {PATIENCE}") from error


def _broadcast(tensor: Tensor) -> Tensor:
    # Not every backend broadcasts booleans.
    carrier = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    dist.broadcast(carrier, src=0)
    return carrier.to(tensor.dtype)


# -- agreement --------------------------------------------------------------------------------------------------------


def check_agreement(pruner: nn.Module, module: nn.Module, step: int) -> None:
    """Compare the pruner's state and the weights it prunes across ranks; numbers become those of rank 0.

    Masks, permutations and counters must be the same bit by bit. Numbers that steer (strengths, ratios of gradients)
    and the norms of weights may differ by round-off, as between kinds of GPUs.

    Args:
        pruner: the pruner of this rank.
        module: the scope of this rank.
        step: of the update, for the message.

    Raises:
        RuntimeError: naming the ranks that differ from rank 0.
    """
    if dist.get_world_size() == 1:
        return
    figures = dict(_figures(pruner))
    found = dist.all_gather_object(evidence(pruner, module))
    _refuse("hold other pruning decisions than", [digest != found[0][0] for digest, _, _ in found], "", step)
    for name in figures:
        odd = [not _close(numbers[name], found[0][1][name]) for _, numbers, _ in found]
        values = ", ".join(str(numbers[name]) for _, numbers, _ in found)[:200]
        _refuse(f"have another '{name}' than", odd, f" ({values})", step)
    for name in found[0][2]:
        odd = [not _close(norms[name], found[0][2][name]) for _, _, norms in found]
        _refuse(f"train other weights in '{name}' than", odd, "", step)
    for name, tensor in figures.items():
        tensor.copy_(torch.tensor(found[0][1][name], dtype=tensor.dtype))


def _refuse(what: str, odd: list[bool], values: str, step: int) -> None:
    if any(odd):
        ranks = [rank for rank, differs in enumerate(odd) if differs]
        raise RuntimeError(
            f"ranks {ranks} {what} rank 0 after the update at step {step}{values}; the run stops before the ranks "
            f"train different networks"
        )


def evidence(pruner: nn.Module, module: nn.Module) -> tuple[str, dict[str, float | list], dict[str, float]]:
    """What a rank tells the others: a digest of its state, the numbers that steer, and norms of weights by name."""
    return state_digest(pruner), {name: tensor.tolist() for name, tensor in _figures(pruner)}, _norms(module)


def state_digest(pruner: nn.Module) -> str:
    """SHA-256 of all integer and boolean buffers: masks, permutations, levels, counters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pruner.named_buffers()):
        if not tensor.dtype.is_floating_point:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _figures(pruner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point state that steers. Banks hold copies of weights and running statistics, which each rank has its
    own of.
    """
    for prefix, part in pruner.named_modules():
        if isinstance(part, TensorBank):
            continue
        for name, tensor in part.named_buffers(prefix, recurse=False):
            if tensor.dtype.is_floating_point:
                yield name, tensor


@torch.no_grad()
def _norms(module: nn.Module) -> dict[str, float]:
    """L1 norm of every parameter."""
    named = dict(module.named_parameters())
    norms = [torch.linalg.vector_norm(parameter, 1, dtype=torch.float64) for parameter in named.values()]
    return dict(zip(named, torch.stack(norms).tolist())) if norms else {}


def _close(value: float | list, other: float | list) -> bool:
    """Whether two numbers, or nested lists of them, are equal but for round-off; a NaN equals a NaN."""
    if isinstance(value, list):
        return len(value) == len(other) and all(map(_close, value, other))
    return math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=1e-12) or (math.isnan(value) and math.isnan(other))

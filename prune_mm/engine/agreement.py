"""Decisions in a distributed run: rank 0 decides, everybody gets it, everybody checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from mmengine import dist
from torch import Tensor, nn

from prune_mm.pruners import Decision


def decided_on_rank_0(decide: Callable[[], Decision]) -> Decision:
    """Run ``decide`` on rank 0 and hand its result to every rank.

    Raises:
        RuntimeError: on every rank, when ``decide`` fails on rank 0; nobody waits for a decision that never comes.
    """
    if dist.get_world_size() == 1:
        return decide()
    message: list = [None, None]
    cause = None
    if dist.get_rank() == 0:
        try:
            decision = {name: tensor.cpu() for name, tensor in decide().items()}
            message = [None, {name: (tuple(t.shape), str(t.dtype)) for name, t in decision.items()}]
        except Exception as error:
            cause = error
            message = [f"{type(error).__name__}: {error}", None]
    dist.broadcast_object_list(message, src=0)
    failure, layout = message
    if failure is not None:
        raise RuntimeError(f"the pruning decision failed on rank 0: {failure}") from cause
    if dist.get_rank() != 0:
        decision = {n: torch.zeros(s, dtype=getattr(torch, d.rpartition(".")[2])) for n, (s, d) in layout.items()}
    return {name: _broadcast(tensor) for name, tensor in decision.items()}


def _broadcast(tensor: Tensor) -> Tensor:
    # Not every backend broadcasts booleans.
    carrier = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    dist.broadcast(carrier, src=0)
    return carrier.to(tensor.dtype)


def check_agreement(pruner: nn.Module, step: int) -> None:
    """Compare the pruner's state across ranks.

    Raises:
        RuntimeError: naming the ranks that differ from rank 0.
    """
    if dist.get_world_size() == 1:
        return
    digests = dist.all_gather_object(state_digest(pruner))
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise RuntimeError(
            f"ranks {odd} hold other pruning decisions than rank 0 after the update at step {step}; the run stops "
            f"before the ranks train different networks"
        )


def state_digest(pruner: nn.Module) -> str:
    """SHA-256 of all integer and boolean buffers: masks, permutations, levels, counters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pruner.named_buffers()):
        if not tensor.dtype.is_floating_point:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Ordering a layer from the top: split rows and columns into halves, then each diagonal block again, tier by tier.

With the columns in two halves, the best halves of the rows are known exactly: sort the rows by what they have in the
one half minus what they have in the other. So a split costs products of the matrix with a few vectors of signs and a
selection, where an assignment costs the third power. Signs alone stop at the next local optimum; before them, the
same alternation runs with soft signs, tanh(beta * score), beta rising (mean-field annealing), from several starts.
Blocks of one tier are split together.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np

# Softness of the signs, first and last, for scores of unit root mean square: from linear (which finds the leading
# singular vectors) to almost hard.
_FIRST_BETA, _LAST_BETA = 0.3, 4.0
# Hard alternations at most; from an annealed start two or three are enough.
_HARD_STEPS = 12
# Blocks with a side of up to this many channels have few enough splits (35 for 8) to try them all.
_EXACT_SIDE = 8


def _soft_signs(scores: np.ndarray, beta: float) -> np.ndarray:
    """tanh(beta * score), for scores scaled to unit root mean square along the last axis; in place."""
    square = np.einsum("gkn,gkn->gk", scores, scores)
    scores *= (beta * np.sqrt(scores.shape[-1] / (square + np.float32(1e-30))))[..., None]
    return np.tanh(scores, out=scores)


def _hard_signs(scores: np.ndarray) -> np.ndarray:
    """+1 for the higher half along the last axis, -1 for the rest."""
    half = scores.shape[-1] // 2
    top = np.argpartition(scores, half - 1, axis=-1)[..., half:]
    signs = np.full_like(scores, -1.0)
    np.put_along_axis(signs, top, np.float32(1.0), axis=-1)
    return signs


def _centred(blocks: np.ndarray) -> np.ndarray:
    """Blocks less their row and column means, which no balanced split can feel."""
    blocks = blocks - blocks.mean(axis=2, keepdims=True)
    blocks -= blocks.mean(axis=1, keepdims=True)
    return blocks


@cache
def _all_halves(size: int) -> np.ndarray:
    """Every way to halve a few items, exchange apart, the present one first: +1 and -1, float32 (k, size)."""
    chosen = list(combinations(range(1, size), size // 2 - 1))
    signs = np.full((len(chosen), size), -1.0, dtype=np.float32)
    signs[:, 0] = 1.0
    for row, columns in zip(signs, chosen):
        row[list(columns)] = 1.0
    return signs


def split_blocks(
    blocks: np.ndarray, starts: int, anneal_steps: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Halve the rows and columns of every block so that little mass lies off the diagonal.

    Blocks with a side of up to 8 are split in the best way there is.

    Args:
        blocks: float32 (G, o, i), o and i even, values about 1 at most.
        starts: number of starts a block; the first one also tries the halves as they are.
        anneal_steps: soft alternations.
        generator: source of the starts.

    Returns:
        bool (G, o) and (G, i), True for the first half of each, the best of the starts.
    """
    count, height, width = blocks.shape
    if height > width:
        columns, rows = split_blocks(blocks.transpose(0, 2, 1), starts, anneal_steps, generator)
        return rows, columns
    blocks = _centred(blocks)
    if height <= _EXACT_SIDE:
        x = np.broadcast_to(_all_halves(height), (count, *_all_halves(height).shape))
        scores = x @ blocks
        y = _hard_signs(scores)
        agreement = np.einsum("gkn,gkn->gk", scores, y)
    else:
        x, y, agreement = _annealed(blocks, starts, anneal_steps, generator)
    best, block = agreement.argmax(axis=1), np.arange(count)
    return x[block, best] > 0, y[block, best] > 0


def _annealed(
    blocks: np.ndarray, starts: int, anneal_steps: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs of rows (G, k, o) and columns (G, k, i) from every start, and their agreement x^T A y (G, k)."""
    count, height, _ = blocks.shape
    transposed = blocks.transpose(0, 2, 1)
    x = generator.standard_normal((count, starts, height), dtype=np.float32)
    for beta in np.geomspace(_FIRST_BETA, _LAST_BETA, anneal_steps, dtype=np.float32):
        y = _soft_signs(x @ blocks, beta)
        x = _soft_signs(y @ transposed, beta)
    x = _hard_signs(x)
    x[:, 0, : height // 2], x[:, 0, height // 2 :] = 1.0, -1.0
    agreement = None
    for _ in range(_HARD_STEPS):
        y = _hard_signs(x @ blocks)
        scores = y @ transposed
        x = _hard_signs(scores)
        before, agreement = agreement, np.einsum("gkn,gkn->gk", scores, x)
        if before is not None and (agreement.max(axis=1) <= before.max(axis=1) * np.float32(1.0 + 1e-6)).all():
            break
    return x, y, agreement


def _effort(size: int) -> tuple[int, int]:
    """Starts and soft alternations for blocks of a size: large ones differ little from start to start."""
    if size >= 256:
        return 4, 6
    return (6, 8) if size >= 64 else (8, 10)


def bisect_order(norms: np.ndarray, tiers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row and column order by repeated splitting; it depends on nothing but the arguments.

    Args:
        norms: float32 (O, I), values about 1 at most.
        tiers: number of splits; both sides are multiples of 2^tiers.
        seed: of the starts.

    Returns:
        int64 (O,) and (I,): permutations that order the matrix. What is kept in place stays in its old order.
    """
    generator = np.random.default_rng(seed)
    blocks = norms[None]
    rows, columns = np.arange(norms.shape[0])[None], np.arange(norms.shape[1])[None]
    for _ in range(tiers):
        count, height, width = blocks.shape
        first_rows, first_columns = split_blocks(blocks, *_effort(max(height, width)), generator)
        # A stable sort keeps the old order inside each half.
        row_order = np.argsort(~first_rows, axis=1, kind="stable")
        column_order = np.argsort(~first_columns, axis=1, kind="stable")
        rows = np.take_along_axis(rows, row_order, axis=1).reshape(2 * count, height // 2)
        columns = np.take_along_axis(columns, column_order, axis=1).reshape(2 * count, width // 2)
        row_order = row_order.reshape(2 * count, height // 2)
        column_order = column_order.reshape(2 * count, width // 2)
        if count <= 4:
            # Row copies, then a gather inside rows: several times faster than one gather of single elements.
            blocks = np.stack([blocks[b // 2][row_order[b]].take(column_order[b], axis=1) for b in range(2 * count)])
        else:
            parent = np.arange(2 * count)[:, None, None] // 2
            blocks = blocks[parent, row_order[:, :, None], column_order[:, None, :]]
    return rows.reshape(-1), columns.reshape(-1)

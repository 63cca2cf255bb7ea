"""Improving an order in place: exact reassignment of the rows of a layer, starting from where they are.

Positions in one innermost block (a *leaf*) cost the same, so with the columns fixed the rows are to be distributed
over L = 2^D leaves of s rows each: a transport problem far smaller than the assignment of rows to positions. Between
two leaves the best move is the row that loses least by it; a distribution is optimal exactly when no cycle of such
moves gains anything. From a good order few cycles do, so they are removed one by one: first swaps (cycles of two),
all disjoint ones at once, then any cycle, found by Bellman-Ford. The lengths it leaves behind are nearly the dual
solution, from which POT's network simplex finishes in a fraction of its usual time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Moves into a leaf that are looked at in the first, quick search for cycles.
_FEW = 16


def leaf_costs(ordered: np.ndarray, leaves: int, power: float) -> np.ndarray:
    """Cost of every row in every leaf, columns as they are.

    Args:
        ordered: float (O, I), the columns in their order, the rows in any.
        leaves: L = 2^D, the number of innermost blocks.
        power: decay of the cost from tier to tier.

    Returns:
        (O, L), of the type of `ordered`: entry (r, l) is sum_k C[l, k] * ordered[r, k], with C the cost matrix.
    """
    rows, columns = ordered.shape
    mass = ordered.reshape(rows, leaves, columns // leaves).sum(axis=2) if columns > leaves else ordered
    nodes = [mass] if leaves > 1 else []
    while nodes and nodes[-1].shape[1] > 2:
        nodes.append(nodes[-1][:, 0::2] + nodes[-1][:, 1::2])
    cost = np.zeros((rows, 1), dtype=ordered.dtype)
    # Down the tree of blocks: a row in one child pays for the mass it has under the other child.
    for tier, mass in enumerate(reversed(nodes)):
        below = np.empty_like(mass)
        np.multiply(mass[:, 1::2], power**tier, out=below[:, 0::2])
        np.multiply(mass[:, 0::2], power**tier, out=below[:, 1::2])
        below.reshape(rows, -1, 2)[...] += cost[:, :, None]
        cost = below
    return cost


def _tolerance(cost: np.ndarray) -> float:
    """Gains up to this may be round-off: chasing them could go on for ever."""
    return 32.0 * float(np.finfo(cost.dtype).eps) * float(cost.mean())


class _Distribution:
    """Rows in leaves, and the cheapest move between any two leaves.

    Attributes:
        order: int64 (L, s), the rows in every leaf.
        move: (L, L), least change of cost when a row of the first leaf goes to the second.
        distance: (L,), length of the cheapest chain of moves that ends in a leaf, as far as known.
    """

    def __init__(self, cost: np.ndarray, order: np.ndarray | None = None, distance: np.ndarray | None = None) -> None:
        rows, self.leaves = cost.shape
        self.cost, self.tolerance = cost, _tolerance(cost)
        self.index = np.arange(self.leaves)
        self.order = np.arange(rows).reshape(self.leaves, -1) if order is None else order.copy()
        self.distance = np.zeros(self.leaves, dtype=cost.dtype) if distance is None else distance.copy()
        self.move = np.empty((self.leaves, self.leaves), dtype=cost.dtype)
        self.refresh(self.index)

    def refresh(self, leaves: np.ndarray) -> None:
        """Find again what a move from each of the leaves named to any other one costs."""
        cost = self.cost[self.order[leaves]]
        cost -= cost[np.arange(len(leaves)), :, leaves][:, :, None]
        self.move[leaves] = cost.min(axis=1)
        self.move[leaves, leaves] = 0.0

    def apply(self, source: np.ndarray, target: np.ndarray) -> None:
        """Move the best row of source[j] to target[j], for all j; the pairs form disjoint cycles."""
        rows = self.order[source]
        slot = (self.cost[rows, target[:, None]] - self.cost[rows, source[:, None]]).argmin(axis=1)
        free = np.empty(self.leaves, dtype=np.int64)
        free[source] = slot
        self.order[target, free[target]] = rows[np.arange(len(source)), slot]
        self.refresh(source)

    def swap(self) -> None:
        """Swap rows between pairs of leaves until no pair gains."""
        change = self.move + self.move.T
        partner = change.argmin(axis=1)
        while True:
            value = change[self.index, partner]
            # Pairs that prefer each other are disjoint, and the best pair of all is among them.
            chosen = np.flatnonzero(
                (value < -self.tolerance) & (partner[partner] == self.index) & (self.index < partner)
            )
            if chosen.size == 0:
                return
            changed = np.concatenate([chosen, partner[chosen]])
            self.apply(changed, np.concatenate([partner[chosen], chosen]))
            change[changed] = self.move[changed] + self.move[:, changed].T
            change[:, changed] = change[changed].T
            # A leaf whose partner changed looks everywhere again, the others only at the leaves that changed.
            again = np.zeros(self.leaves, dtype=bool)
            again[changed] = True
            again |= again[partner]
            best = changed[change[:, changed].argmin(axis=1)]
            partner = np.where(change[self.index, best] < change[self.index, partner], best, partner)
            partner[again] = change[again].argmin(axis=1)

    def cancel_cycles(self, arcs: int | None = None) -> None:
        """Remove cycles that gain until none is left.

        Args:
            arcs: look only at so many of the cheapest moves into every leaf; None means all.
        """
        parent = np.full(self.leaves, -1)
        near = None
        if arcs is not None and arcs < self.leaves:
            near = np.argpartition(np.ascontiguousarray(self.move.T), arcs, axis=1)[:, :arcs]
        pending = self.index
        # Every removal gains, so this ends by itself; the limit guards against surprises of rounding.
        for _ in range(20 * self.leaves):
            shorter, source = self._relax(pending) if near is None else self._relax_near(near)
            nearer = np.flatnonzero(shorter < self.distance - self.tolerance)
            self.distance[nearer], parent[nearer] = shorter[nearer], source(nearer)
            pending = nearer
            cycle = _cycles(parent)
            if cycle.size:
                changed = parent[cycle]
                self.apply(changed, cycle)
                # Distances stay: any start is a valid one for Bellman-Ford. Only what changed is looked at again.
                parent[:] = -1
                pending = np.union1d(pending, changed)
            if pending.size == 0:
                return

    def _relax(self, pending: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Distances through the leaves named, and from which of them leaves are reached."""
        reach = self.move[pending]
        reach += self.distance[pending][:, None]
        return reach.min(axis=0), lambda targets: pending[reach[:, targets].argmin(axis=0)]

    def _relax_near(self, near: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """As `_relax`, through the moves (L, arcs) that are kept into every leaf."""
        reach = self.move[near, self.index[:, None]]
        reach += self.distance[near]
        return reach.min(axis=1), lambda targets: near[targets, reach[targets].argmin(axis=1)]


def _finish(cost: np.ndarray, order: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The optimal distribution (L, s), from one that is nearly optimal and distances that are nearly right."""
    per_leaf, flat = order.shape[1], order.reshape(-1).copy()
    leaf = np.empty_like(flat)
    leaf[flat] = np.arange(flat.size) // per_leaf
    here = cost[np.arange(flat.size), leaf]
    target = _transport(cost, per_leaf, distance, here - distance[leaf])
    if target is None:
        rows = _Distribution(cost, order, distance)
        rows.cancel_cycles()
        return rows.order
    if here.sum() - cost[np.arange(flat.size), target].sum() > _tolerance(cost):
        # Rows that stay keep their positions; the others take, leaf by leaf, what has become free.
        free = np.flatnonzero(target[flat] != leaf[flat])
        movers = flat[free]
        flat[free] = movers[np.argsort(target[movers], kind="stable")]
    return flat.reshape(order.shape)


def _transport(cost: np.ndarray, per_leaf: int, leaf_dual: np.ndarray, row_dual: np.ndarray) -> np.ndarray | None:
    """Leaf of every row in the cheapest distribution, by POT's network simplex; None where POT cannot do it."""
    try:
        import ot
    except ImportError:
        return None
    rows, leaves = cost.shape
    supply, demand = np.full(leaves, float(per_leaf)), np.ones(rows)
    try:
        plan = ot.emd(
            supply, demand, np.ascontiguousarray(cost.T), numItermax=10**9, potentials_init=(leaf_dual, row_dual)
        )
    except TypeError:  # POT before 0.9.7 cannot start from potentials.
        return None
    target = plan.argmax(axis=0)
    return target if (np.bincount(target, minlength=leaves) == per_leaf).all() else None


def _cycles(parent: np.ndarray) -> np.ndarray:
    """Nodes that lie on a cycle of the map node -> parent, -1 meaning none."""
    size = parent.size
    ancestor = np.append(np.where(parent >= 0, parent, size), size)
    # After at least `size` steps, every path has either ended or gone round a cycle, and reaches all of its nodes.
    for _ in range(max(size - 1, 1).bit_length()):
        ancestor = ancestor[ancestor]
    nodes = np.unique(ancestor)
    return nodes[nodes < size]


def reassign_rows(ordered: np.ndarray, leaves: int, power: float, exact: bool) -> np.ndarray:
    """Better row order of an ordered layer, columns fixed; rows that need not move stay where they are.

    Args:
        ordered: (O, I), both sides in their order; float64, or float32 where speed counts more than the last digits.
        leaves: L = 2^D, dividing both sides.
        power: decay of the cost from tier to tier.
        exact: go on to the optimum (what an assignment solver finds); otherwise stop where no swap gains.

    Returns:
        int64 (O,): `ordered[result]` costs no more than `ordered`, up to round-off.
    """
    cost = leaf_costs(ordered, leaves, power)
    rows = _Distribution(cost.astype(np.float32, copy=False))
    rows.swap()
    if exact and leaves > 2:
        rows.cancel_cycles(arcs=_FEW)
        return _finish(cost, rows.order, rows.distance.astype(cost.dtype)).reshape(-1)
    return rows.order.reshape(-1)

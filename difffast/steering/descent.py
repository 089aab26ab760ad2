"""Gradient descent while sampling: rows that descend each by itself, and never end worse than they began if guarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Losses in float16 are scaled up before the backward pass, for gradients below its smallest number; powers of two
#: change nothing else.
LOSS_SCALES = {torch.float16: 2.0**10}


@dataclass
class Leaf:
    """A tensor that the descent moves, in place.

    Attributes:
        value: [R, ...], a row for each thing that is optimised by itself.
        step_size: None: the tensor stays as it is and wants no gradient.
        movable: returns which entries of a row (along its first dimension) may move; None: all.
    """

    value: Tensor
    step_size: float | None
    movable: Callable[[int], Sequence[int]] | None = None


@dataclass
class Descended:
    """What happened to one row.

    Attributes:
        losses: before every update.
        outcome: "done" (``is_done`` said so), "iterations" (all were used), or "diverged" (the best was put back).
    """

    losses: list[float] = field(default_factory=list)
    outcome: str = "iterations"

    @property
    def best(self) -> float:
        """The lowest loss; NaN where there is none."""
        return min((loss for loss in self.losses if loss == loss), default=float("nan"))


def descend(
    rows: Sequence[int],
    leaves: Sequence[Leaf],
    evaluate: Callable[[Sequence[int], Sequence[Tensor]], Tensor],
    *,
    iterations: int,
    is_done: Callable[[int, float], bool] = lambda row, loss: False,
    loss_scale: float = 1.0,
) -> dict[int, Descended]:
    """Move the rows of ``leaves`` down their losses.

    A row whose loss is not finite, or above its first one, goes back to the best values that it has had and stops.
    What the last update has done is looked at as well, by one more evaluation without gradients.

    Args:
        rows: which rows of the leaves.
        leaves: what is moved.
        evaluate: takes some rows, and their values of each leaf, and returns their losses [len(rows)].
        iterations: most updates of a row.
        is_done: takes a row and its loss, and returns whether it is low enough.
        loss_scale: factor of the losses in the backward pass, taken out of the gradients again.

    Returns:
        what happened, per row.
    """
    found = {row: Descended() for row in rows}
    best: dict[int, tuple[float, list[Tensor]]] = {}
    active = list(rows)
    for _ in range(iterations if active else 0):
        values, losses = _evaluate(leaves, active, evaluate)
        going = [i for i, loss in enumerate(losses.tolist()) if _goes_on(active[i], loss, leaves, found, best, is_done)]
        if not going or not losses.requires_grad:  # a constant loss moves nothing
            break
        _update(leaves, active, going, values, losses, loss_scale)
        active = [active[i] for i in going]
    else:
        _look_back(active if iterations else (), leaves, evaluate, found, best)
    for row in rows:
        if not all(bool(leaf.value[row].isfinite().all()) for leaf in leaves):
            _put_back(row, leaves, best)
            found[row].outcome = "diverged"
    return found


def descend_unguarded(
    rows: Sequence[int],
    leaves: Sequence[Leaf],
    evaluate: Callable[[Sequence[int], Sequence[Tensor]], Tensor],
    *,
    iterations: int,
    is_done: Callable[[int, float], bool] = lambda row, loss: False,
    loss_scale: float = 1.0,
) -> dict[int, Descended]:
    """Move the rows of ``leaves`` down their losses as ToMe's released code does.

    A row is updated first and asked then whether its loss was low enough, so that every row moves at least once.  None
    goes back, whatever its loss.  For the arguments and what is returned see :func:`descend`.
    """
    found = {row: Descended() for row in rows}
    active = list(rows)
    for _ in range(iterations if active else 0):
        values, losses = _evaluate(leaves, active, evaluate)
        if losses.requires_grad:
            _update(leaves, active, list(range(len(active))), values, losses, loss_scale)
        for row, loss in zip(active, losses.tolist(), strict=True):
            found[row].losses.append(loss)
            if is_done(row, loss):
                found[row].outcome = "done"
        active = [row for row in active if found[row].outcome != "done"]
        if not active:
            break
    return found


def _evaluate(
    leaves: Sequence[Leaf], rows: Sequence[int], evaluate: Callable[[Sequence[int], Sequence[Tensor]], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return copies of the rows' values, which want gradients where the leaf moves, and the losses there."""
    values = [leaf.value[list(rows)].requires_grad_(leaf.step_size is not None) for leaf in leaves]
    return values, evaluate(rows, values)


def _update(
    leaves: Sequence[Leaf],
    rows: Sequence[int],
    going: Sequence[int],
    values: Sequence[Tensor],
    losses: Tensor,
    loss_scale: float,
) -> None:
    """Move those of ``rows`` whose places are in ``going``."""
    wanted = [value for value in values if value.requires_grad]
    gradients = iter(torch.autograd.grad(losses[list(going)].sum() * loss_scale, wanted))
    for leaf in leaves:
        if leaf.step_size is not None:
            _step(leaf, [rows[i] for i in going], next(gradients)[list(going)] / loss_scale)


def _goes_on(
    row: int,
    loss: float,
    leaves: Sequence[Leaf],
    found: dict[int, Descended],
    best: dict[int, tuple[float, list[Tensor]]],
    is_done: Callable[[int, float], bool],
) -> bool:
    """Record a row's loss; returns whether it is to be updated."""
    record = found[row]
    record.losses.append(loss)
    if not _is_sound(loss, record):
        record.outcome = "diverged"
        _put_back(row, leaves, best)
        return False
    if row not in best or loss < best[row][0]:
        best[row] = loss, [leaf.value[row].clone() for leaf in leaves]
    if is_done(row, loss):
        record.outcome = "done"
        return False
    return True


def _look_back(
    rows: Sequence[int],
    leaves: Sequence[Leaf],
    evaluate: Callable[[Sequence[int], Sequence[Tensor]], Tensor],
    found: dict[int, Descended],
    best: dict[int, tuple[float, list[Tensor]]],
) -> None:
    """Put back the rows whose last update has made them worse than they began."""
    if not rows:
        return
    with torch.no_grad():
        losses = evaluate(rows, [leaf.value[list(rows)] for leaf in leaves]).tolist()
    for row, loss in zip(rows, losses, strict=True):
        if not _is_sound(loss, found[row]):
            found[row].outcome = "diverged"
            _put_back(row, leaves, best)


def _is_sound(loss: float, record: Descended) -> bool:
    """Return whether a loss is finite and not above the row's first; NaN is neither."""
    return loss <= record.losses[0] < float("inf")


def _put_back(row: int, leaves: Sequence[Leaf], best: dict[int, tuple[float, list[Tensor]]]) -> None:
    for leaf, value in zip(leaves, best[row][1] if row in best else (), strict=False):
        leaf.value[row] = value


def _step(leaf: Leaf, rows: Sequence[int], gradient: Tensor) -> None:
    if leaf.movable is None:
        leaf.value[list(rows)] -= leaf.step_size * gradient
        return
    for row, each in zip(rows, gradient, strict=True):
        entries = list(leaf.movable(row))
        leaf.value[row, entries] -= leaf.step_size * each[entries]

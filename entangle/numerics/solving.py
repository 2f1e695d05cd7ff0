"""Solving a pruned weight again: the weights, or the mask too, that change a layer's outputs least.

A method chooses which weights to keep and leaves their values unsolved: SparseGPT solves each only
for the weights that were pruned before it, Wanda and magnitude for none. `exact` keeps the mask and
solves all kept weights together, `admm` looks for a better mask first.

Weights are ``(neurons, inputs)``, of one expert. Guarantees (checked by
``tests/numerics/test_solving.py``): the number of zeros is that of the pruned weight, to the last
one. By the Gram that is given, a row's error never grows; it is compared in float64, after the
weights were rounded to their dtype. A row has the same bits whatever rows are solved with it.

Source: ALPS, arXiv 2406.07831, section 3.2 (ADMM for the mask) and 3.3 (conjugate gradients for the
values).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.kernels.masks_cpu import TILE
from entangle.numerics.moments import InputMoments, output_energy
from entangle.numerics.processors import kernels_of

TOLERANCE = (
    0.05  # of a row's residual, over that of the pruned weights; little of the error is left
)
STEPS = 20  # most steps of conjugate gradients
_TOGETHER = 2**22  # values of the rows that are solved together
_PENALTIES = (0.1, 0.2, 0.4, 0.8, 1.6)  # ADMM's, one after the other; the Gram's diagonal is 1
_ITERATIONS = 4  # of ADMM, for each penalty

Marks = Callable[[torch.Tensor], torch.Tensor]  # from scores to the marks of those to prune


def exact(
    weight: torch.Tensor, pruned: torch.Tensor, moments: InputMoments, damping: float
) -> torch.Tensor:
    """Return the pruned weight with the values that minimise ‖(W - V)X‖² on its support.

    The Gram is damped by ``damping`` times its mean diagonal, as SparseGPT's. A row that does not
    gain by the Gram without damping keeps its weights.
    """
    solved = _solved(weight, pruned, _damped(moments, damping))
    return _best(weight, [pruned, solved], moments)


def admm(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    moments: InputMoments,
    damping: float,
    lowest: Marks,
    *,
    by_row: bool = True,
) -> torch.Tensor:
    """Return the weight (neurons, inputs) with a better mask than that of ``pruned``, solved.

    ``lowest`` marks the weights to prune, from scores (neurons, inputs) that are not negative. With
    ``by_row`` it treats each row alone, and each row is the better of the two masks, both solved.
    Otherwise this holds for the whole weight.
    """
    hessian = _damped(moments, damping)
    found = _admm(weight, pruned, hessian, moments.squares == 0, lowest)
    solved = [_solved(weight, one, hessian) for one in (pruned, found)]
    return _best(weight, [pruned, *solved], moments, by_row=by_row)


def _damped(moments: InputMoments, damping: float) -> torch.Tensor:
    """Return the whole Gram (inputs, inputs), damped by ``damping`` times its mean diagonal."""
    gram = moments.gram
    gram.diagonal().add_(damping * float(moments.squares.double().mean()))
    return gram


def _best(
    weight: torch.Tensor,
    candidates: Sequence[torch.Tensor],
    moments: InputMoments,
    *,
    by_row: bool = True,
) -> torch.Tensor:
    """Return each row of the candidate whose error is the least there; of equal ones the first."""
    errors = torch.stack(
        [output_energy(weight.double() - one.double(), moments) for one in candidates]
    )  # (candidates, neurons)
    zeros = torch.stack([(one == 0).sum(dim=-1) for one in candidates])
    if not by_row:
        errors, zeros = (values.sum(dim=1, keepdim=True) for values in (errors, zeros))
    # Never NaN, and never another number of zeros: a weight of the dense model may be zero too.
    errors = errors.nan_to_num(nan=torch.inf).masked_fill(zeros != zeros[0], torch.inf)
    place = errors.argmin(dim=0)
    best = candidates[0]
    for index, one in enumerate(candidates[1:], start=1):
        best = torch.where((place == index).unsqueeze(-1), one, best)
    return best


def _solved(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the weights solved on the support of ``pruned``, rounded to the dtype of the weight."""
    size = max(_TOGETHER // len(hessian) // TILE, 1) * TILE
    parts = zip(weight.split(size), pruned.split(size), strict=True)
    solved = torch.cat([_conjugate_gradients(*part, hessian) for part in parts]).to(weight.dtype)
    # What is rounded to zero stays as it was.
    return torch.where(solved == 0, pruned.to(weight.dtype), solved)


def _conjugate_gradients(
    weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Return rows solved on the support of ``pruned``, in float32, from its values on.

    The preconditioner is the diagonal. Each row has steps of its own, and stays as it is once its
    residual is below `TOLERANCE`.
    """
    dense, values = as_columns(weight), as_columns(pruned)  # (inputs, padded)
    inverse = hessian.diagonal().reciprocal().unsqueeze(1) * (values != 0)  # 0 off the support
    residual = _product(hessian, dense.sub_(values))
    direction = residual * inverse
    size = _sums(residual * direction)  # (padded): the squared norm of the residual
    least = size * TOLERANCE**2
    for _ in range(STEPS):
        moving = size > least
        if not bool(moving.any()):
            break
        image = _product(hessian, direction)
        length = torch.where(moving, size / _sums(direction * image), 0)
        values += direction * length
        residual -= image.mul_(length)
        scaled = residual * inverse
        before, size = size, _sums(residual * scaled)
        direction.mul_(torch.where(moving, size / before, 0)).add_(scaled)
    return values[:, : len(weight)].mT.contiguous()


def _admm(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    hessian: torch.Tensor,
    dead: torch.Tensor,
    lowest: Marks,
) -> torch.Tensor:
    """Return unsolved weights (neurons, inputs) float32 with the mask that ADMM finds.

    ``dead`` marks the inputs that are always zero.

    The inputs are scaled so that the diagonal of H is 1. With the dense weight W, the sparse D and
    the dual U over the penalty r (ALPS, section 3.2):

        W' = (H + r)⁻¹ (H W + r (D - U)) = W + r (H + r)⁻¹ (D - U - W)
        D = W' + U without its lowest values; U = U + W' - D

    There the penalty grows until the mask stays. Here it has few values, since an inverse serves all
    rows and steps with one penalty, and the values do not depend on the rows.
    """
    neurons, scale = len(weight), hessian.diagonal().sqrt().unsqueeze(1)
    scaled = hessian / scale / scale.mT
    scale = scale.masked_fill(dead.unsqueeze(1), 0)  # their scores are 0: they are pruned first
    dense, sparse = as_columns(weight).mul_(scale), as_columns(pruned).mul_(scale)
    dual, before = torch.zeros_like(dense), _PENALTIES[0]
    for penalty in _PENALTIES:
        inverse = scaled.clone()
        inverse.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse)).mul_(penalty)
        dual.mul_(before / penalty)
        before = penalty
        for _ in range(_ITERATIONS):
            near = _product(inverse, sparse.sub_(dual).sub_(dense)).add_(dense)
            sparse = near.add_(dual)
            scores = sparse[:, :neurons].mT.abs().contiguous()
            dual = sparse.clone()
            sparse[:, :neurons].masked_fill_(lowest(scores).mT, 0)
            dual -= sparse
    return (sparse / scale)[:, :neurons].mT.nan_to_num()


def as_columns(rows: torch.Tensor) -> torch.Tensor:
    """Return rows (rows, inputs) as float32 columns (inputs, padded), padded to whole tiles.

    Columns are the first dimension, so that a column's rows are contiguous.
    """
    columns = torch.zeros(rows.shape[1], -(-len(rows) // TILE) * TILE, device=rows.device)
    columns[:, : len(rows)] = rows.detach().float().T
    return columns


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add aᵀb to ``out`` (columns, rows); a row has the same bits whatever rows are beside it."""
    if kernels_of(out.device) == "triton":
        triton_kernels().add_product(out, a, b)
    else:
        out.addmm_(a.T, b)


def _product(symmetric: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    product = torch.zeros_like(columns)
    add_product(product, symmetric, columns)
    return product


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of each column, and change the values.

    The order is fixed here: that of `torch.sum` depends on the columns beside.
    """
    while len(values) > 1:
        half = -(-len(values) // 2)
        values[: len(values) - half] += values[half:]
        values = values[:half]
    return values[0]


def triton_kernels() -> Any:
    """Import the kernels for CUDA; Triton comes only with the torch that can use them."""
    from entangle.numerics.kernels import masks_triton

    return masks_triton

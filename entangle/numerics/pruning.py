"""One-shot pruning of one weight matrix, from the moments of its inputs.

The data come first and without weights (`InputMoments`), then the weights without data: one Gram
serves every method, sparsity and subset of rows. Weights are ``(neurons, inputs)``; moments of
several experts give as many pruned copies ``(experts, neurons, inputs)``.

Guarantees (``tests/test_pruning.py`` holds them): the pruned count is exact, on ties too; with
``mask="row"`` a neuron's result is the same bits whatever other neurons, or experts, are pruned
with it.

Sources: Wanda, arXiv 2306.11695, eq. 1; SparseGPT, arXiv 2301.00774, section 3 and algorithm 1.
"""

import dataclasses
from typing import Literal, Self

import numba
import numpy as np
import torch

from entangle.numerics.moments import InputMoments, inverse_factor

Mask = Literal["row", "block"]
Method = Literal["sparsegpt", "wanda", "magnitude"]

BLOCK = 128  # columns that SparseGPT solves before it updates those to their right, as published
_TILE = 64  # rows that the column kernel takes at a time


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """How many weights are zero: a share of a row, or all but ``kept`` of every ``group``."""

    share: float
    kept: int = 0
    group: int = 0  # 0: unstructured

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """Read ``0.8`` or ``n:m``, n kept of m: ``1:4`` is 75% sparse.

        Raises:
            ValueError: neither a share from 0 to 1 nor n:m with 0 <= n <= m.
        """
        try:
            if ":" in str(text):
                kept, group = map(int, str(text).split(":"))
                share = 1 - kept / group
            else:
                kept, group, share = 0, 0, float(text)
        except (ValueError, ZeroDivisionError):
            kept, group, share = 0, 0, -1.0
        if not 0 <= share <= 1 or group < 0:
            raise ValueError(
                f"expected a sparsity from 0 to 1, or n:m as n kept of every m, got {text!r}"
            )
        return cls(share, kept, group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.share:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned weight matrix, one for each expert, and the damping that SparseGPT needed for it."""

    weight: torch.Tensor  # ([experts,] neurons, inputs)
    damping: tuple[float, ...]  # of each expert; 0 for the other methods


def prune(
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity,
    *,
    method: Method = "sparsegpt",
    mask: Mask = "row",
) -> Pruned:
    """Prune a weight (neurons, inputs) by a method's name.

    Raises:
        ValueError: as the method's own function does, or an unknown name of method or mask.
    """
    if mask not in {"row", "block"}:
        raise ValueError(f"mask must be 'row' or 'block', got {mask!r}")
    if method == "sparsegpt":
        return sparse_gpt(weight, moments, sparsity, mask=mask)
    experts = moments.lower.shape[:-2]
    if method == "wanda":
        pruned = wanda(weight, moments, sparsity, mask=mask)
    elif method == "magnitude":
        pruned = magnitude(weight, sparsity, mask=mask).expand(*experts, *weight.shape)
    else:
        raise ValueError(f"method must be 'sparsegpt', 'wanda' or 'magnitude', got {method!r}")
    return Pruned(pruned, (0.0,) * (experts[0] if experts else 1))


def magnitude(weight: torch.Tensor, sparsity: Sparsity, *, mask: Mask = "row") -> torch.Tensor:
    """Return the weight (neurons, inputs) without its smallest entries.

    Raises:
        ValueError: weights that are not finite, or inputs that n:m does not divide.
    """
    _check_finite(weight, "weights")
    return _without_lowest(weight, weight.abs().float(), sparsity, mask)


def wanda(
    weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity, *, mask: Mask = "row"
) -> torch.Tensor:
    """Return the weight without the entries of smallest |w| · ‖x‖, ‖x‖ its input's norm.

    Raises:
        ValueError: moments of other inputs or not finite, or inputs that n:m does not divide.
    """
    _check(weight, moments)
    scores = weight.abs().float() * moments.squares.sqrt().unsqueeze(-2)
    return _without_lowest(weight, scores, sparsity, mask)


def _without_lowest(
    weight: torch.Tensor, scores: torch.Tensor, sparsity: Sparsity, mask: Mask
) -> torch.Tensor:
    neurons, inputs = weight.shape
    _check_group(inputs, sparsity)
    if sparsity.group:
        groups = scores.unflatten(-1, (-1, sparsity.group))
        pruned = _lowest(groups, sparsity.group - sparsity.kept).flatten(-2)
    elif mask == "row":
        pruned = _lowest(scores, round(sparsity.share * inputs))
    else:
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        for first, end, count in _block_counts(neurons, inputs, sparsity):
            block = scores[..., first:end]
            pruned[..., first:end] = _lowest(block.flatten(-2), count).view_as(block)
    return weight.masked_fill(pruned, 0)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the ``count`` lowest scores along the last axis are, of ties the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    highest = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, ties = scores < highest, scores == highest
    spare = count - below.sum(dim=-1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= spare))


def _block_counts(rows: int, inputs: int, sparsity: Sparsity) -> list[tuple[int, int, int]]:
    """Return each column block's first and end column, and how many weights to prune.

    The counts are differences of one rounded line, so that they add up to the exact total.
    """
    total = round(sparsity.share * inputs) * rows
    edges = [*range(0, inputs, BLOCK), inputs]
    line = [round(total * edge / inputs) for edge in edges]
    return [
        (first, end, after - before)
        for first, end, before, after in zip(edges, edges[1:], line, line[1:], strict=False)
    ]


def sparse_gpt(
    weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity, *, mask: Mask = "row"
) -> Pruned:
    """Prune by optimal brain surgeon, column after column, as SparseGPT does.

    ``mask="row"`` gives every neuron exactly the sparsity, its count carried over the blocks of
    128 columns; ``"block"``, as published, chooses in each block among the weights of all rows.
    n:m chooses in each row and group of m columns, as published.

    Raises:
        ValueError: moments of other inputs or not finite, a Gram that no damping makes regular,
            or inputs that n:m does not divide.
    """
    _check(weight, moments)
    _check_group(weight.shape[1], sparsity)
    grams = moments.gram.reshape(-1, moments.inputs, moments.inputs)
    factors = [inverse_factor(gram) for gram in grams]
    upper = torch.stack([factor.upper for factor in factors])  # (experts, inputs, inputs)
    neurons, inputs = weight.shape
    padded = -(-neurons // _TILE) * _TILE
    # Columns first, so that a column's neurons lie side by side.
    columns = upper.new_zeros(len(upper), inputs, padded)
    columns[:, :, :neurons] = weight.detach().float().T
    for (first, end, count), (_, _, joint) in zip(
        _block_counts(1, inputs, sparsity), _block_counts(neurons, inputs, sparsity), strict=True
    ):
        block, square = columns[:, first:end], upper[:, first:end, first:end].contiguous()
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if mask == "block" and not sparsity.group:
            diagonal = square.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            scores = (block[:, :, :neurons] / diagonal).square()
            pruned[:, :, :neurons] = _lowest(scores.flatten(1), joint).view_as(scores)
            count = 0  # nothing is left to choose
        errors = torch.zeros_like(block)
        if block.device.type == "cpu":
            arrays = (tensor.numpy() for tensor in (block, pruned, square, errors))
            _solve_numba(*arrays, count, sparsity.kept, sparsity.group)  # type: ignore[call-arg]
            for later, factor, error in zip(columns[:, end:], upper, errors, strict=True):
                later.addmm_(factor[first:end, end:].T, error, alpha=-1)
        else:
            _solve_torch(block, pruned, square, errors, count, sparsity)
            columns[:, end:].baddbmm_(upper[:, first:end, end:].mT, errors, alpha=-1)
    solved = columns[:, :, :neurons].mT.to(weight.dtype).contiguous()
    return Pruned(
        solved.reshape(*moments.lower.shape[:-2], neurons, inputs),
        tuple(factor.damping for factor in factors),
    )


def _check(weight: torch.Tensor, moments: InputMoments) -> None:
    inputs = weight.shape[1]
    if moments.inputs != inputs:
        raise ValueError(f"expected the moments of {inputs} inputs, got those of {moments.inputs}")
    _check_finite(weight, "weights")
    _check_finite(moments.lower.tril(), "moments of the inputs")


def _check_finite(values: torch.Tensor, name: str) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{bad:,} of the {name} are NaN or infinite: the model or its inputs overflow, "
            "try another dtype, or leave the layer out with a narrower pattern"
        )


def _check_group(inputs: int, sparsity: Sparsity) -> None:
    if sparsity.group and inputs % sparsity.group:
        raise ValueError(
            f"{sparsity} needs groups of {sparsity.group}, but there are {inputs} inputs"
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def _solve_numba(block, pruned, factor, errors, count, kept, group):  # type: ignore[no-untyped-def]
    """Solve a block (experts, columns, rows) in place, 64 rows at a time, and fill its errors.

    A row's ``count`` lowest weights are chosen first, or those of a group when it is reached.
    A row is alone with its mask and its errors: what lies beside it changes no bit.
    """
    experts, columns, rows = block.shape
    tiles = rows // _TILE
    for part in numba.prange(experts * tiles):
        expert, begin = part // tiles, part % tiles * _TILE
        end = begin + _TILE
        u = factor[expert]
        if count > 0 and group == 0:
            _choose(block[expert], pruned[expert], u, 0, columns, begin, end, count)
        for j in range(columns):
            if group > 0 and j % group == 0:
                _choose(block[expert], pruned[expert], u, j, j + group, begin, end, group - kept)
            w, e = block[expert, j, begin:end], errors[expert, j, begin:end]
            p = pruned[expert, j, begin:end]
            for r in range(_TILE):
                e[r] = w[r] / u[j, j] if p[r] else np.float32(0)
                w[r] = np.float32(0) if p[r] else w[r]
            for k in range(j + 1, columns):
                later = block[expert, k, begin:end]
                for r in range(_TILE):
                    later[r] -= e[r] * u[j, k]


@numba.njit(cache=True)
def _choose(block, pruned, factor, first, last, begin, end, count):  # type: ignore[no-untyped-def]
    """Mark in each row the ``count`` lowest of some columns by (w / U_jj)², of ties the first."""
    scores = np.empty(last - first, np.float32)
    for r in range(begin, end):
        for j in range(first, last):
            scores[j - first] = (block[j, r] / factor[j, j]) ** 2
        highest = np.inf
        if 0 < count < len(scores):
            highest = np.partition(scores, count - 1)[count - 1]
        ties = count
        for score in scores:
            ties -= score < highest
        for j in range(first, last):
            if count == 0:
                break
            if scores[j - first] < highest:
                pruned[j, r] = True
            elif scores[j - first] == highest and ties > 0:
                pruned[j, r] = True
                ties -= 1


def _solve_torch(
    block: torch.Tensor,
    pruned: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    count: int,
    sparsity: Sparsity,
) -> None:
    """Do as `_solve_numba` with torch, on any device."""
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # (experts, columns, 1)
    if count and not sparsity.group:
        pruned.copy_(_lowest((block / diagonal).square().mT, count).mT)
    for j in range(block.shape[1]):
        if sparsity.group and j % sparsity.group == 0:
            part = slice(j, j + sparsity.group)
            scores = (block[:, part] / diagonal[:, part]).square().mT
            pruned[:, part] = _lowest(scores, sparsity.group - sparsity.kept).mT
        errors[:, j] = torch.where(pruned[:, j], block[:, j] / diagonal[:, j], 0.0)
        block[:, j].masked_fill_(pruned[:, j], 0.0)
        block[:, j + 1 :].baddbmm_(
            factor[:, j, j + 1 :].unsqueeze(-1), errors[:, j].unsqueeze(1), alpha=-1
        )

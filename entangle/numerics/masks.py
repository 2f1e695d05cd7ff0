"""One-shot pruning of one weight matrix, from the second moments of its inputs.

`InputMoments` are computed without the weights, and pruning does not read the data: one Gram serves
every method, sparsity and subset of rows. Weights are ``(neurons, inputs)``; moments of several
experts give a pruned copy for each expert ``(experts, neurons, inputs)``.

``sparsity`` is one `Sparsity` for all rows, or the number of weights to prune in each row
``(neurons,)``.

Guarantees (checked by ``tests/numerics/test_masks.py``): the pruned count is exact, on ties too.
With ``mask="row"`` a neuron's result has the same bits whatever other neurons or experts are pruned
with it, and at whatever sparsity. This holds for the kernels of Numba and Triton, in which no sum
depends on the number of rows or experts. Where plain torch multiplies, the last bits may depend on it.

The kernels are in `masks_cpu` and, for CUDA and ROCm, in `masks_triton` (see `processors`).

Sources: Wanda, arXiv 2306.11695, eq. 1; SparseGPT, arXiv 2301.00774, section 3 and algorithm 1.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.kernels.masks_cpu import mark_lowest, solve_block
from entangle.numerics.moments import InputMoments, inverse_factor
from entangle.numerics.processors import kernels_of
from entangle.numerics.solving import add_product, admm, as_columns, exact, triton_kernels
from entangle.numerics.sparsity import Mask, Method, Solve, Sparsity

BLOCK = 128  # columns that SparseGPT solves together, as published
_TOGETHER = 2**26  # values of the factors and float32 weights of experts that are pruned together


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """The pruned weight matrix of each expert, and the damping that its Gram needed."""

    weight: torch.Tensor  # ([experts,] neurons, inputs)
    damping: tuple[float, ...]  # one for each expert; 0 if no Gram was factored


def prune(
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    *,
    method: Method = "sparsegpt",
    mask: Mask = "row",
    solve: Solve = "greedy",
    shrinkage: float | None = None,
    experts: Sequence[int] | None = None,
) -> Pruned:
    """Prune a weight (neurons, inputs) by the named method.

    With ``solve`` other than ``greedy``, which leaves the method's weights as published, they are
    solved again by the same Gram (see `solving`).

    ``sparsity`` is one for all rows, or the number of weights to prune in each row (neurons,).
    Moments of several experts are shrunk by ``shrinkage``, if it is given (see
    `InputMoments.shrunk`), and ``experts`` are those to prune for, by default all. Large matrices
    are pruned for one expert at a time, so that memory has one shrunk Gram and one factor.

    Raises:
        ValueError: the method or mask is unknown, or the method's own function raises it.
    """
    if mask not in {"row", "block"}:
        raise ValueError(f"mask must be 'row' or 'block', got {mask!r}")
    if moments.count.ndim == 0:
        return _prune_together(weight, moments, sparsity, method, mask, solve)
    neurons, inputs = weight.shape
    chosen = list(range(len(moments.count)) if experts is None else experts)
    pooled = None if shrinkage is None else moments.pooled()
    together = max(_TOGETHER // (inputs * (inputs + neurons)), 1)
    result = weight.new_empty(len(chosen), neurons, inputs)
    damping: list[float] = []
    for first in range(0, len(chosen), together):
        part = slice(first, first + together)
        used = moments.of_experts(chosen[part])
        if shrinkage is not None:
            used = used.shrunk(shrinkage, pooled)
        found = _prune_together(weight, used, sparsity, method, mask, solve)
        result[part] = found.weight
        damping += found.damping
    return Pruned(result, tuple(damping))


def _prune_together(
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    method: Method,
    mask: Mask,
    solve: Solve,
) -> Pruned:
    experts = moments.lower.shape[:-2]
    undamped = (0.0,) * (experts[0] if experts else 1)
    if method == "sparsegpt":
        pruned = sparse_gpt(weight, moments, sparsity, mask=mask)
    elif method == "wanda":
        pruned = Pruned(wanda(weight, moments, sparsity, mask=mask), undamped)
    elif method == "magnitude":
        alike = magnitude(weight, sparsity, mask=mask).expand(*experts, *weight.shape)
        pruned = Pruned(alike, undamped)
    else:
        raise ValueError(f"method must be 'sparsegpt', 'wanda' or 'magnitude', got {method!r}")
    if solve == "greedy":
        return pruned
    if solve not in {"exact", "admm"}:
        raise ValueError(f"solve must be 'greedy', 'exact' or 'admm', got {solve!r}")
    _check(weight, moments)  # magnitude has not read the moments
    return _solve_again(weight, pruned, moments, sparsity, mask, solve)


def _solve_again(
    weight: torch.Tensor,
    pruned: Pruned,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    mask: Mask,
    solve: Solve,
) -> Pruned:
    """Solve the weights of each expert again, with the damping that its Gram needs."""
    several = moments.count.ndim > 0
    weights, dampings = [], []
    for index, one in enumerate(pruned.weight.view(-1, *weight.shape)):
        own = moments.expert(index) if several else moments
        damping = pruned.damping[index] or inverse_factor(own.lower).damping
        if solve == "exact":
            one = exact(weight, one, own, damping)
        else:
            lowest = partial(_lowest_of_mask, sparsity=sparsity, mask=mask)
            by_row = mask == "row" or (isinstance(sparsity, Sparsity) and sparsity.group > 0)
            one = admm(weight, one, own, damping, lowest, by_row=by_row)
        weights.append(one)
        dampings.append(damping)
    return Pruned(torch.stack(weights).view(pruned.weight.shape), tuple(dampings))


def magnitude(
    weight: torch.Tensor, sparsity: Sparsity | torch.Tensor, *, mask: Mask = "row"
) -> torch.Tensor:
    """Return the weight (neurons, inputs) without its smallest entries.

    Raises:
        ValueError: weights are not finite, n:m does not divide the inputs, or the numbers of zeros
            do not fit the rows.
    """
    _check_finite(weight, "weights")
    return _without_lowest(weight, weight.abs().float(), sparsity, mask)


def wanda(
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    *,
    mask: Mask = "row",
) -> torch.Tensor:
    """Return the weight without the entries of smallest |w| · ‖x‖ (see `wanda_scores`).

    Raises:
        ValueError: the moments are of other inputs, values are not finite, n:m does not divide the
            inputs, or the numbers of zeros do not fit the rows.
    """
    _check(weight, moments)
    return _without_lowest(weight, wanda_scores(weight, moments.squares), sparsity, mask)


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return |w| · ‖x‖ of each weight, where ``squares`` (inputs,) has each input's ‖x‖²."""
    return weight.abs().float() * squares.sqrt().unsqueeze(-2)


def _without_lowest(
    weight: torch.Tensor, scores: torch.Tensor, sparsity: Sparsity | torch.Tensor, mask: Mask
) -> torch.Tensor:
    if isinstance(sparsity, torch.Tensor):
        sparsity = _check_zeros(sparsity, weight, mask)
    else:
        check_group(weight.shape[1], sparsity)
    return weight.masked_fill(_lowest_of_mask(scores, sparsity, mask), 0)


def _lowest_of_mask(
    scores: torch.Tensor, sparsity: Sparsity | torch.Tensor, mask: Mask
) -> torch.Tensor:
    """Return a mask of the lowest scores ([experts,] neurons, inputs), as many as are pruned."""
    if isinstance(sparsity, torch.Tensor):
        return _lowest(scores, sparsity)
    neurons, inputs = scores.shape[-2:]
    if sparsity.group:
        groups = scores.unflatten(-1, (-1, sparsity.group))
        return _lowest(groups, sparsity.group - sparsity.kept).flatten(-2)
    if mask == "row":
        return _lowest(scores, round(sparsity.share * inputs))
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for first, end, count in _block_counts(neurons, inputs, sparsity):
        block = scores[..., first:end]
        pruned[..., first:end] = _lowest(block.flatten(-2), count).view_as(block)
    return pruned


def _lowest(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return a mask of the ``count`` lowest scores along the last axis; ties mark the first.

    There is one count for all rows, or one for each row (rows,). Scores are float32, not negative.
    """
    device = scores.device
    if isinstance(count, int):
        count = torch.full((), count, device=device)  # a copy from the host would wait for the GPU
    counts = count.to(device).expand(scores.shape[:-1])
    kernels = kernels_of(device)
    if kernels == "torch":
        return _lowest_torch(scores, counts)
    flat = scores.detach().reshape(-1, scores.shape[-1]).contiguous()
    lowest = torch.empty_like(flat, dtype=torch.bool)
    rows = counts.reshape(-1).contiguous()
    if kernels == "numba":
        mark_lowest(flat.numpy(), lowest.numpy(), rows.numpy())
    else:
        triton_kernels().mark_lowest(flat, lowest, rows)
    return lowest.view_as(scores)


def _lowest_torch(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    counts = counts.unsqueeze(-1)
    last = (counts - 1).clamp(min=0)
    highest = scores.sort(dim=-1).values.gather(-1, last)
    below, ties = scores < highest, scores == highest
    spare = counts - below.sum(dim=-1, keepdim=True)
    chosen = below | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= spare))
    return chosen & (counts > 0)


def _block_counts(rows: int, inputs: int, sparsity: Sparsity) -> list[tuple[int, int, int]]:
    """Return the first and end column of each column block, and how many weights to prune in it.

    A block holds whole groups of an n:m sparsity. The counts are differences of a rounded
    cumulative count, so that they add up to the exact total.
    """
    total = round(sparsity.share * inputs * rows)
    step = max(BLOCK // sparsity.group, 1) * sparsity.group if sparsity.group else BLOCK
    edges = [*range(0, inputs, step), inputs]
    line = [round(total * edge / inputs) for edge in edges]
    return [
        (first, end, after - before)
        for first, end, before, after in zip(edges, edges[1:], line, line[1:], strict=False)
    ]


def sparse_gpt(
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    *,
    mask: Mask = "row",
) -> Pruned:
    """Prune by optimal brain surgeon, column by column, as SparseGPT does.

    ``mask="row"`` gives every neuron exactly its sparsity, with its zeros spread evenly over the
    blocks of 128 columns. ``"block"`` chooses in each block among the weights of all rows, and n:m
    in each row and group of m columns, both as published.

    As published, a block B of columns changes by -E·U[:B, B], where E are the errors of the columns
    left of it. Let D be the dense minus the pruned weights of those columns. Then E = D·R with
    R = U⁻¹, and since R·U = I the change is D·R[:B, B]·U[B, B]. So only the squares U[B, B] are
    computed.

    Raises:
        ValueError: the moments are of other inputs, values are not finite, the Gram stays singular
            with any damping, n:m does not divide the inputs, or the numbers of zeros do not fit
            the rows.
    """
    _check(weight, moments)
    neurons, inputs = weight.shape
    if isinstance(sparsity, torch.Tensor):
        zeros, sparsity = _check_zeros(sparsity, weight, mask), Sparsity(0)
    else:
        check_group(inputs, sparsity)
        zeros = torch.full((neurons,), round(sparsity.share * inputs))
    factors = [inverse_factor(lower) for lower in moments.lower.reshape(-1, inputs, inputs)]
    columns = as_columns(weight)
    # The pruned weights of solved blocks; in the others D·R.
    solved = columns.new_zeros(len(factors), *columns.shape)
    blocks = _block_counts(neurons, inputs, sparsity)
    zeros_of_blocks = _spread(zeros, [0, *(end for _, end, _ in blocks)], inputs, columns)
    spans = [(first, end) for first, end, _ in blocks]
    squares = zip(*(factor.squares(spans) for factor in factors), strict=True)
    # A GPU computes this loop without waiting for the host.
    for (first, end, joint), counts, alike in zip(blocks, zeros_of_blocks, squares, strict=True):
        square = torch.stack(alike)
        block = columns[first:end].repeat(len(factors), 1, 1)  # (experts, columns, padded)
        finite = square.nan_to_num(posinf=0.0)  # a dead input is not updated
        for one, u, carried in zip(block, finite, solved, strict=True):
            add_product(one, u, carried[first:end])
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if mask == "block" and not sparsity.group:
            diagonal = square.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            scores = (block[:, :, :neurons] / diagonal).abs()
            pruned[:, :, :neurons] = _lowest(scores.flatten(1), joint).view_as(scores)
            counts.zero_()  # all are chosen already
        _solve(block, pruned, square, counts, sparsity)
        solved[:, first:end] = block
        for later, factor, one in zip(solved[:, end:], factors, block, strict=True):
            add_product(later, factor.root[first:end, end:], columns[first:end] - one)
    result = solved[:, :, :neurons].mT.to(weight.dtype).contiguous()
    return Pruned(
        result.reshape(*moments.lower.shape[:-2], neurons, inputs),
        tuple(factor.damping for factor in factors),
    )


def _spread(
    zeros: torch.Tensor, edges: Sequence[int], inputs: int, columns: torch.Tensor
) -> torch.Tensor:
    """Return the zeros (blocks, padded) of each row in each block, spread evenly over the columns.

    ``zeros`` (neurons,) are those of the rows, and ``edges`` the first column of each block and the
    end of the last. The rows that pad ``columns`` have none.
    """
    before = (zeros.double() * torch.tensor(edges).unsqueeze(-1) / inputs).round().long()
    counts = torch.zeros(len(edges) - 1, columns.shape[1], dtype=torch.int64)
    counts[:, : len(zeros)] = before.diff(dim=0)
    return counts.to(columns.device)


def _solve(
    block: torch.Tensor,
    pruned: torch.Tensor,
    square: torch.Tensor,
    counts: torch.Tensor,
    sparsity: Sparsity,
) -> None:
    """Solve a block (experts, columns, rows) in place, see `masks_cpu.solve_block`."""
    kernels = kernels_of(block.device)
    if kernels == "numba":
        arrays = (tensor.numpy() for tensor in (block, pruned, square, counts))
        solve_block(*arrays, sparsity.kept, sparsity.group)  # type: ignore[call-arg]
    elif kernels == "triton":
        kept, group = sparsity.kept, sparsity.group
        triton_kernels().solve_block(block, pruned, square, counts, kept, group)
    else:
        _solve_torch(block, pruned, square, counts, sparsity)


def _check_zeros(zeros: torch.Tensor, weight: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Check the number of weights to prune in each row, and return it as int64 (neurons,).

    Raises:
        ValueError: the numbers are not whole, one for each row and from 0 to the number of inputs,
            or the mask is by block.
    """
    neurons, inputs = weight.shape
    if mask == "block":
        raise ValueError(
            "the mask block chooses zeros among all rows, so rows have no budget: use mask row"
        )
    if zeros.shape != (neurons,) or zeros.is_floating_point():
        raise ValueError(
            f"expected a whole number of zeros for each of {neurons} rows, got a tensor "
            f"{tuple(zeros.shape)} of {zeros.dtype}"
        )
    if bool(((zeros < 0) | (zeros > inputs)).any()):
        raise ValueError(
            f"expected 0 to {inputs} zeros in each row of {inputs} weights, got "
            f"{int(zeros.min())} to {int(zeros.max())} zeros"
        )
    return zeros.long().cpu()


def _check(weight: torch.Tensor, moments: InputMoments) -> None:
    inputs = weight.shape[1]
    if moments.inputs != inputs:
        raise ValueError(f"expected the moments of {inputs} inputs, got those of {moments.inputs}")
    _check_finite(weight, "weights")
    _check_finite(moments.lower.tril(), "moments of the inputs")


def _check_finite(values: torch.Tensor, name: str) -> None:
    if bool(values.sum().isfinite()):
        return  # a finite sum has finite terms
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{bad:,} of the {name} are NaN or infinite: try another dtype, or leave the layer out "
            "with exclude"
        )


def check_group(inputs: int, sparsity: Sparsity) -> None:
    """Check that the groups of an n:m sparsity divide the inputs.

    Raises:
        ValueError: they do not.
    """
    if sparsity.group and inputs % sparsity.group:
        raise ValueError(
            f"sparsity {sparsity} needs groups of {sparsity.group}, which do not divide the "
            f"layer's {inputs} inputs: use another sparsity, or leave the layer out with "
            "exclude"
        )


def _solve_torch(
    block: torch.Tensor,
    pruned: torch.Tensor,
    factor: torch.Tensor,
    counts: torch.Tensor,
    sparsity: Sparsity,
) -> None:
    """Do the same as `solve_block` with torch, on any device; bits may depend on the rows beside."""
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # (experts, columns, 1)
    if not sparsity.group and bool(counts.any()):
        pruned.copy_(_lowest((block / diagonal).abs().mT, counts).mT)
    for j in range(block.shape[1]):
        if sparsity.group and j % sparsity.group == 0:
            part = slice(j, j + sparsity.group)
            scores = (block[:, part] / diagonal[:, part]).abs().mT
            pruned[:, part] = _lowest(scores, sparsity.group - sparsity.kept).mT
        error = torch.where(pruned[:, j], block[:, j] / diagonal[:, j], 0.0)
        block[:, j].masked_fill_(pruned[:, j], 0.0)
        block[:, j + 1 :].baddbmm_(
            factor[:, j, j + 1 :].unsqueeze(-1), error.unsqueeze(1), alpha=-1
        )

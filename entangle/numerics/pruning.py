"""One-shot pruning of one weight matrix, from the moments of its inputs.

The data come first and without weights (`InputMoments`), then the weights without data: one Gram
serves every method, sparsity and subset of rows. Weights are ``(neurons, inputs)``.

Guarantees (``tests/test_pruning.py`` holds them): the pruned count is exact, on ties too; with
``mask="row"`` a neuron's result is the same bits whatever other neurons are pruned with it.

Sources: Wanda, arXiv 2306.11695, eq. 1; SparseGPT, arXiv 2301.00774, section 3 and algorithm 1.
"""

import dataclasses
from typing import Literal, Self

import numba
import numpy as np
import torch

Mask = Literal["row", "block"]

BLOCK = 128  # columns that SparseGPT solves before it updates those to their right, as published
_TILE = 64  # rows that the column kernel takes at a time
_LADDER = (0.01, 0.1, 1.0)  # damping, times the Gram's mean diagonal: as published, and then more


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
class InputMoments:
    """The Gram of a layer's inputs, XᵀX over tokens: all that pruning wants to know of the data."""

    gram: torch.Tensor  # (inputs, inputs) float32
    count: torch.Tensor  # () int64: tokens

    @classmethod
    def zeros(cls, inputs: int, *, device: torch.device | str = "cpu") -> Self:
        """Return the moments of no tokens."""
        gram = torch.zeros(inputs, inputs, device=device)
        return cls(gram, torch.zeros((), dtype=torch.int64, device=device))

    def add(self, rows: torch.Tensor) -> None:
        """Add input rows (tokens, inputs) of any floating dtype."""
        rows = rows.detach().float()
        self.gram.addmm_(rows.T, rows)
        self.count.add_(len(rows))

    def merged(self, other: Self) -> Self:
        """Return the moments of both sets of rows together."""
        return type(self)(self.gram + other.gram, self.count + other.count)


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """What SparseGPT made of a weight matrix, and the damping it needed."""

    weight: torch.Tensor  # (neurons, inputs)
    damping: float  # times the Gram's mean diagonal; 0.01 unless that Gram was singular


def magnitude(weight: torch.Tensor, sparsity: Sparsity, *, mask: Mask = "row") -> torch.Tensor:
    """Return the weight (neurons, inputs) without its smallest entries.

    Raises:
        ValueError: inputs that n:m does not divide.
    """
    return _without_lowest(weight, weight.abs().float(), sparsity, mask)


def wanda(
    weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity, *, mask: Mask = "row"
) -> torch.Tensor:
    """Return the weight without the entries of smallest |w| · ‖x‖, ‖x‖ its input's norm.

    Raises:
        ValueError: moments of other inputs or not finite, or inputs that n:m does not divide.
    """
    _check(weight, moments)
    return _without_lowest(
        weight, weight.abs().float() * moments.gram.diag().sqrt(), sparsity, mask
    )


def _without_lowest(
    weight: torch.Tensor, scores: torch.Tensor, sparsity: Sparsity, mask: Mask
) -> torch.Tensor:
    neurons, inputs = weight.shape
    _check_group(inputs, sparsity)
    if sparsity.group:
        groups = scores.reshape(neurons, -1, sparsity.group)
        pruned = _lowest(groups, sparsity.group - sparsity.kept).reshape(neurons, inputs)
    elif mask == "row":
        pruned = _lowest(scores, round(sparsity.share * inputs))
    else:
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        for first, end, count in _block_counts(neurons, inputs, sparsity):
            block = scores[:, first:end].reshape(-1)
            pruned[:, first:end] = _lowest(block, count).reshape(neurons, -1)
    return weight.masked_fill(pruned, 0)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the ``count`` lowest scores along the last axis are, of ties the first."""
    order = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, value=True)


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


def reconstruction_error(
    weight: torch.Tensor, pruned: torch.Tensor, moments: InputMoments
) -> torch.Tensor:
    """Return each neuron's ‖(w - ŵ)X‖² and ‖wX‖² over the tokens of the moments (neurons, 2)."""
    gram = moments.gram.double()
    both = torch.stack([weight.double() - pruned.double(), weight.double()], dim=1)
    return ((both @ gram) * both).sum(dim=-1)


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
    factor, damping = _inverse_factor(moments.gram)
    neurons, inputs = weight.shape
    padded = -(-neurons // _TILE) * _TILE
    # Columns first, so that a column's neurons lie side by side.
    columns = factor.new_zeros(inputs, padded)
    columns[:, :neurons] = weight.detach().float().T
    for (first, end, count), (_, _, joint) in zip(
        _block_counts(1, inputs, sparsity), _block_counts(neurons, inputs, sparsity), strict=True
    ):
        block, square = columns[first:end], factor[first:end, first:end].contiguous()
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if mask == "block" and not sparsity.group:
            scores = (block[:, :neurons] / square.diag()[:, None]).square()
            pruned[:, :neurons] = _lowest(scores.reshape(-1), joint).reshape(-1, neurons)
            count = 0  # nothing is left to choose
        errors = torch.zeros_like(block)
        if block.device.type == "cpu":
            arrays = (tensor.numpy() for tensor in (block, pruned, square, errors))
            _solve_numba(*arrays, count, sparsity.kept, sparsity.group)  # type: ignore[call-arg]
        else:
            _solve_torch(block, pruned, square, errors, count, sparsity)
        columns[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    return Pruned(columns[:, :neurons].T.to(weight.dtype).contiguous(), damping)


def _check(weight: torch.Tensor, moments: InputMoments) -> None:
    inputs = weight.shape[1]
    if moments.gram.shape != (inputs, inputs):
        raise ValueError(
            f"expected the moments of {inputs} inputs, got those of {moments.gram.shape[0]}"
        )
    for name, values in (("weights", weight), ("moments of the inputs", moments.gram)):
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


def _inverse_factor(gram: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the upper U with UᵀU = H⁻¹, H the damped Gram, and the damping that it took.

    With the order of the inputs reversed, H = LLᵀ turns into H = RRᵀ with R upper, and U = R⁻¹:
    one Cholesky and one triangular solve, and no inverse is formed.

    Raises:
        ValueError: no damping of the ladder makes the Gram regular.
    """
    mean = float(gram.diag().double().mean())
    if mean > 0:
        for dtype, damping in [(torch.float32, _LADDER[0]), *((torch.float64, d) for d in _LADDER)]:
            damped = gram.to(dtype, copy=True)
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(failed):
                continue
            identity = torch.eye(len(gram), dtype=dtype, device=gram.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
            if bool(torch.isfinite(factor).all()):
                factor = factor.contiguous()
                # An input that is always zero goes first and changes no other: w / U_jj is 0.
                factor.diagonal()[gram.diag() == 0] = torch.inf
                return factor, damping
    raise ValueError(
        f"the Gram of {len(gram)} inputs is singular, damped by up to {_LADDER[-1]:g} times its mean "
        f"diagonal ({mean:.3g}): did any token reach this layer?"
    )


@numba.njit(parallel=True, nogil=True, cache=True)
def _solve_numba(block, pruned, factor, errors, count, kept, group):  # type: ignore[no-untyped-def]
    """Solve a block (columns, rows) in place, 64 rows at a time, and return its errors.

    A row's ``count`` lowest weights are chosen first, or those of a group when it is reached.
    A row is alone with its mask and its errors: what lies beside it changes no bit.
    """
    columns, rows = block.shape
    for tile in numba.prange(rows // _TILE):
        begin = tile * _TILE
        end = begin + _TILE
        if count > 0 and group == 0:
            _choose(block, pruned, factor, 0, columns, begin, end, count)
        for j in range(columns):
            if group > 0 and j % group == 0:
                _choose(block, pruned, factor, j, j + group, begin, end, group - kept)
            w, e, p = block[j, begin:end], errors[j, begin:end], pruned[j, begin:end]
            for r in range(_TILE):
                e[r] = w[r] / factor[j, j] if p[r] else np.float32(0)
                w[r] = np.float32(0) if p[r] else w[r]
            for k in range(j + 1, columns):
                u, later = factor[j, k], block[k, begin:end]
                for r in range(_TILE):
                    later[r] -= e[r] * u


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
    diagonal = factor.diag()[:, None]
    if count and not sparsity.group:
        pruned.copy_(_lowest((block / diagonal).square().T, count).T)
    for j in range(len(block)):
        if sparsity.group and j % sparsity.group == 0:
            part = slice(j, j + sparsity.group)
            scores = (block[part] / diagonal[part]).square().T
            pruned[part] = _lowest(scores, sparsity.group - sparsity.kept).T
        errors[j] = torch.where(pruned[j], block[j] / diagonal[j], 0.0)
        block[j].masked_fill_(pruned[j], 0.0)
        block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)

"""Cost of pruning: our SparseGPT compared with the published algorithm. Run `make bench`.

The published side is algorithm 1 of arXiv 2301.00774 in plain torch and float32, with the steps and
the precision of its authors' code, but without its logging. Both sides begin with a weight and its
moments and end with the pruned weight. A second table of each case has what solving again costs and
gains.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.timing import machine, side_by_side
from entangle.numerics.masks import BLOCK, prune, sparse_gpt
from entangle.numerics.moments import InputMoments, inverse_factor, output_energy
from entangle.numerics.sparsity import Mask, Sparsity

SHAPES = [(512, 2048), (2048, 512), (2048, 2048)]  # neurons, inputs
EXPERTS = 16
MASKS: tuple[Mask, ...] = ("block", "row")  # as published, and ours
MOST = 1.0001  # largest error over the published one, for the same mask

Cases = dict[str, Callable[[], Any]]


def main() -> None:
    """Run the benchmark and print its tables."""
    print(machine(), end="\n\n")
    for neurons, inputs in SHAPES:
        one_matrix(neurons, inputs, Sparsity(0.5))
    one_matrix(2048, 2048, Sparsity.parse("2:4"))
    experts(2048, 512, Sparsity(0.5))


def problem(
    neurons: int, inputs: int, seed: int = 0, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, InputMoments]:
    """Return a weight and the moments of inputs that depend on each other, four times as many."""

    def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(rows, inputs, generator=generator, device=device)

    generator = torch.Generator(device).manual_seed(seed)
    mixing = draw(inputs, generator)
    moments = InputMoments.zeros(inputs, device=device)
    moments.add(draw(4 * inputs, generator) @ mixing)
    # The weight is that of all seeds: experts differ in their moments.
    return draw(neurons, torch.Generator(device).manual_seed(1)), moments


def published_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper factor of the inverse by the published way, through the inverse itself."""
    damped = gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def published_columns(
    weight: torch.Tensor, upper: torch.Tensor, sparsity: Sparsity
) -> torch.Tensor:
    """Prune by a factor, column after column: a rank-1 update of its block for each of them."""
    weight = weight.clone()
    for first in range(0, weight.shape[1], BLOCK):
        end = min(first + BLOCK, weight.shape[1])
        block, square = weight[:, first:end].clone(), upper[first:end, first:end]
        diagonal = square.diagonal()
        mask, errors = torch.zeros_like(block, dtype=torch.bool), torch.zeros_like(block)
        if not sparsity.group:
            scores = block**2 / diagonal**2
            count = int(sparsity.share * scores.numel())
            mask = scores <= scores.flatten().sort().values[count]  # as published: one more
        for j in range(end - first):
            if sparsity.group and j % sparsity.group == 0:
                group = slice(j, j + sparsity.group)
                scores = block[:, group] ** 2 / diagonal[group] ** 2
                lowest = scores.topk(sparsity.group - sparsity.kept, dim=1, largest=False).indices
                mask.scatter_(1, j + lowest, value=True)
            column = block[:, j].clone()
            column[mask[:, j]] = 0
            errors[:, j] = (block[:, j] - column) / square[j, j]
            block[:, j:] -= errors[:, j : j + 1] @ square[j : j + 1, j:]
            block[:, j] = column
        weight[:, first:end] = block
        weight[:, end:] -= errors @ upper[first:end, end:]
    return weight


def published(weight: torch.Tensor, gram: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Prune a weight (neurons, inputs) as published, from the whole Gram of its inputs."""
    return published_columns(weight, published_factor(gram), sparsity)


def one_matrix(neurons: int, inputs: int, sparsity: Sparsity) -> None:
    """Compare both sides on one matrix, and also the factors alone."""
    weight, moments = problem(neurons, inputs)
    gram = moments.gram
    factors: Cases = {
        "published factor": partial(published_factor, gram),
        "our factor": partial(inverse_factor, moments.lower),
    }
    theirs = partial(published, weight, gram, sparsity)
    title = f"{neurons} x {inputs}, {sparsity}"
    compare(title, theirs, weight, moments, sparsity, factors)
    again(title, weight, moments, sparsity)


def experts(neurons: int, inputs: int, sparsity: Sparsity) -> None:
    """Compare both sides on one weight with the moments of 16 experts.

    The published side prunes the experts one after the other, ours prunes them together.
    """
    weight = problem(neurons, inputs)[0]
    moments = InputMoments.stack([problem(neurons, inputs, seed)[1] for seed in range(EXPERTS)])
    grams = moments.gram

    def theirs() -> torch.Tensor:
        return torch.stack([published(weight, gram, sparsity) for gram in grams])

    title = f"{EXPERTS} experts of {neurons} x {inputs}, {sparsity}"
    compare(title, theirs, weight, moments, sparsity, {})
    again(title, weight, moments, sparsity)


def again(title: str, weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity) -> None:
    """Print the time and the error of `exact` and `admm` over those of the method's own weights."""
    ours: Cases = {
        solve: partial(prune, weight, moments, sparsity, solve=solve)
        for solve in ("greedy", "exact", "admm")
    }
    seconds = side_by_side(ours, rounds=3)
    errors = {solve: loss(case().weight, weight, moments) for solve, case in ours.items()}
    print(f"| {title} | greedy | exact | admm | exact over greedy | admm over greedy |")
    print("|---|---|---|---|---|---|")
    for name, values, scale in (("ms", seconds, 1e3), ("error", errors, 1 / errors["greedy"])):
        cells = [f"{scale * values[solve]:.4g}" for solve in ours]
        ratios = [f"{values[solve] / values['greedy']:.3g}" for solve in ("exact", "admm")]
        print(f"| {' | '.join([name, *cells, *ratios])} |")
    print(flush=True)


def compare(
    title: str,
    theirs: Callable[[], torch.Tensor],
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity,
    factors: Cases,
) -> None:
    """Time both sides in turns and print a table; the time of the columns is without the factor."""
    masks = MASKS[:1] if sparsity.group else MASKS  # n:m is the same with either
    ours: Cases = {
        mask: partial(sparse_gpt, weight, moments, sparsity, mask=mask) for mask in masks
    }
    seconds = side_by_side({**factors, "published": theirs, **ours})
    print(f"| {title} | published, ms | ours, ms | times faster | error over published |")
    print("|---|---|---|---|---|")
    if factors:
        first, second = (seconds[name] for name in factors)
        row("factor", first, second)
        for mask in masks:
            row(f"columns, mask {mask}", seconds["published"] - first, seconds[mask] - second)
    expected = loss(theirs(), weight, moments)
    for mask in masks:
        error = loss(ours[mask]().weight, weight, moments) / expected
        row(f"total, mask {mask}", seconds["published"], seconds[mask], f"{error:.6f}")
        assert mask == "row" or error <= MOST, (
            f"{error:.6f} times the published error, limit {MOST}"
        )
    print(flush=True)


def loss(pruned: torch.Tensor, weight: torch.Tensor, moments: InputMoments) -> float:
    """Return the energy of the change of the outputs."""
    return float(output_energy(weight - pruned, moments).sum())


def row(name: str, theirs: float, ours: float, error: str = "") -> None:
    """Print a row of a table of times; both are given in seconds."""
    print(f"| {name} | {1e3 * theirs:.4g} | {1e3 * ours:.4g} | {theirs / ours:.2f} | {error} |")


if __name__ == "__main__":
    main()

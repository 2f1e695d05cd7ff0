"""Cost of a mixture of sparse experts compared with one layer. Run `make bench`.

Making: one pruned copy of a weight and sixteen (with the router, the Grams and SparseGPT) are made
from the same rows. Running: the mixture is compared with the dense layer, and the router's share of
its time is given.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.timing import machine, side_by_side
from entangle.model.experts import ExpertLinear
from entangle.numerics.masks import prune
from entangle.numerics.moments import ExpertMoments, InputMoments
from entangle.numerics.routing import fit_router
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.calibration import SAMPLE
from entangle.pruning.options import SHRINKAGE

SHAPES = [(1536, 576), (576, 1536), (2048, 2048)]  # neurons, inputs; the first two SmolLM2-135M's
EXPERTS = 16
CALIBRATION = 65_536  # tokens
BATCH = 512
LENGTHS = (1, 64, 4096)
SPARSITY = Sparsity(0.7)
MOST = 8  # largest time of making 16 experts, in times of making one

Cases = dict[str, Callable[[], Any]]


def main() -> None:
    """Run the benchmark and print its tables."""
    print(machine(), end="\n\n")
    for neurons, inputs in SHAPES:
        layer = nn.Linear(inputs, neurons).requires_grad_(False)
        rows = rows_of(inputs)
        build(layer, rows)
        run(layer, mixture(layer, rows), rows)


def rows_of(inputs: int) -> torch.Tensor:
    """Return inputs (tokens, inputs) that depend on each other, around 64 centres."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    centres = torch.randn(64, inputs, generator=generator)
    chosen = torch.randint(64, (CALIBRATION,), generator=generator)
    noise = torch.randn(CALIBRATION, inputs, generator=generator)
    rows: torch.Tensor = (noise + centres[chosen]) @ mixing
    return rows


def one_expert(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Prune a layer's weight by rows."""
    moments = InputMoments.zeros(rows.shape[1])
    for batch in rows.split(BATCH):
        moments.add(batch)
    return prune(layer.weight, moments, SPARSITY).weight


def mixture(layer: nn.Linear, rows: torch.Tensor) -> ExpertLinear:
    """Make sixteen experts of a layer by rows."""
    router = fit_router(rows[:: len(rows) // SAMPLE], EXPERTS)
    empty = InputMoments.zeros(rows.shape[1], experts=router.experts)
    sums = ExpertMoments(empty, router.assign)
    for batch in rows.split(BATCH):
        sums.add(batch)
    moments = sums.moments()
    weight = prune(layer.weight, moments.shrunk(SHRINKAGE), SPARSITY).weight
    return ExpertLinear(weight, layer.bias, router, moments.count.tolist())


def build(layer: nn.Linear, rows: torch.Tensor) -> None:
    """Compare the times of making one expert and sixteen."""
    cases: Cases = {
        "one": partial(one_expert, layer, rows),
        "sixteen": partial(mixture, layer, rows),
    }
    seconds = side_by_side(cases, rounds=3)
    times = seconds["sixteen"] / seconds["one"]
    print(f"| {layer.out_features} x {layer.in_features} | one expert, s | 16 experts, s | times |")
    print("|---|---|---|---|")
    numbers = f"{seconds['one']:.3g} | {seconds['sixteen']:.3g} | {times:.2f}"
    print(f"| to make, {CALIBRATION:,} tokens | {numbers} |\n")
    assert times <= MOST, f"16 experts take {times:.3g} times as long as one, limit {MOST}"


def run(layer: nn.Linear, experts: ExpertLinear, rows: torch.Tensor) -> None:
    """Compare forward passes; rows are a new tensor each time, so that no assignment is reused."""
    print("| tokens | dense, us | 16 experts, us | times | router, us | its share |")
    print("|---|---|---|---|---|---|")
    for length in LENGTHS:
        seen = rows[:: CALIBRATION // length]
        cases: Cases = {
            "dense": partial(layer, seen),
            "experts": partial(on_view, experts, seen),
            "router": partial(on_view, experts.router, seen),
        }
        repeated = {name: repeat(case, max(1, 200 // length)) for name, case in cases.items()}
        micro = {
            name: 1e6 * seconds / max(1, 200 // length)
            for name, seconds in side_by_side(repeated, rounds=15).items()
        }
        dense, mixed, router = micro.values()
        print(
            f"| {length} | {dense:.4g} | {mixed:.4g} | {mixed / dense:.2f} | {router:.4g} "
            f"| {router / mixed:.0%} |"
        )
    print(flush=True)


def on_view(module: nn.Module, rows: torch.Tensor) -> Any:
    """Run a module on rows as a new tensor."""
    return module(rows[:])


def repeat(case: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a function that runs the case so many times."""

    def run() -> None:
        for _ in range(times):
            case()

    return run


if __name__ == "__main__":
    main()

"""Solving again: against a least-squares solve of each row, and never worse than before."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from entangle.numerics import masks, solving
from entangle.numerics.masks import BLOCK, prune
from entangle.numerics.moments import InputMoments, output_energy
from entangle.numerics.solving import _damped, _solved, _sums, exact
from entangle.numerics.sparsity import Mask, Method, Solve, Sparsity
from tests.numerics.test_masks import on, problem

Array = npt.NDArray[np.float64]
METHODS: tuple[Method, ...] = ("sparsegpt", "wanda", "magnitude")
SOLVED: tuple[Solve, ...] = ("exact", "admm")


def least_squares(weight: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor) -> Array:
    """Solve each row on its support by NumPy, from the normal equations with the damping."""
    gram = rows.double().numpy().T @ rows.double().numpy()
    gram += 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    dense = weight.double().numpy()
    found = np.zeros_like(dense)
    for row, support, solved in zip(dense, kept.numpy(), found, strict=True):
        solved[support] = np.linalg.solve(gram[np.ix_(support, support)], (gram @ row)[support])
    return found


def errors(weight: torch.Tensor, pruned: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    return output_energy(weight.double() - pruned.double(), moments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["0.3", "0.7", "2:4"])
def test_exact_is_a_least_squares_solve_of_each_row(
    method: Method, text: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "TOLERANCE", 1e-6)
    monkeypatch.setattr(solving, "STEPS", 200)
    weight, rows, moments = problem(neurons=20, tokens=400)
    own, sparsity = on(device, weight, moments), Sparsity.parse(text)
    greedy = prune(*own, sparsity, method=method).weight.cpu()
    found = prune(*own, sparsity, method=method, solve="exact")
    assert found.damping == (0.01,)
    assert torch.equal(found.weight.cpu() == 0, greedy == 0)
    expected = least_squares(weight, greedy != 0, rows)
    assert np.allclose(found.weight.cpu().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_few_steps_are_near_the_least_error(method: Method) -> None:
    """Of the error that a solve takes away, the usual tolerance leaves little."""
    weight, rows, moments = problem(neurons=32, inputs=150, tokens=1000)
    greedy = prune(weight, moments, Sparsity(0.6), method=method).weight
    found = prune(weight, moments, Sparsity(0.6), method=method, solve="exact").weight
    best = torch.from_numpy(least_squares(weight, greedy != 0, rows))
    before, after, least = (float(errors(weight, w, moments).sum()) for w in (greedy, found, best))
    assert after - least < 0.05 * (before - least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solve", SOLVED)
@pytest.mark.parametrize(("mask", "text"), [("row", "0.6"), ("block", "0.6"), ("row", "1:4")])
def test_no_error_grows_and_no_zero_is_lost(
    dtype: torch.dtype, solve: Solve, mask: Mask, text: str
) -> None:
    weight, _, _ = problem(neurons=70, inputs=160)
    weight = weight.to(dtype)
    alone = [problem(inputs=160, tokens=300, seed=seed)[2] for seed in range(2)]
    sparsity = Sparsity.parse(text)
    for method, moments in itertools.product(METHODS, (alone[0], InputMoments.stack(alone))):
        how: dict[str, Any] = {"method": method, "mask": mask}
        order: tuple[Solve, ...] = ("greedy", "exact", solve)
        found = {one: prune(weight, moments, sparsity, solve=one, **how).weight for one in order}
        before, least, after = (errors(weight, found[one], moments) for one in order)
        if mask == "block":
            before, least, after = (one.sum(dim=-1) for one in (before, least, after))
        assert found[solve].dtype == dtype
        assert (least <= before).all()
        assert (after <= least).all()
        assert float(least.sum()) < 0.9 * float(before.sum())
        zeros = {name: one == 0 for name, one in found.items()}
        assert torch.equal(zeros["exact"], zeros["greedy"])
        if sparsity.group:
            kept = (~zeros[solve]).unflatten(-1, (-1, sparsity.group)).sum(dim=-1)
            assert (kept == sparsity.kept).all()
        elif mask == "row":
            assert (zeros[solve].sum(dim=-1) == round(0.6 * 160)).all()
        else:
            for part, columns in zip(zeros[solve].split(BLOCK, dim=-1), (BLOCK, 32), strict=True):
                assert (part.flatten(-2).sum(dim=-1) == round(0.6 * 70 * columns)).all()


@pytest.mark.parametrize("method", METHODS)
def test_admm_finds_a_better_mask(method: Method) -> None:
    weight, _, moments = problem(neurons=64, inputs=128, tokens=1000)
    found = {
        solve: float(
            errors(
                weight,
                prune(weight, moments, Sparsity(0.6), method=method, solve=solve).weight,
                moments,
            ).sum()
        )
        for solve in ("exact", "admm")
    }
    assert found["admm"] < 0.9 * found["exact"]


@pytest.mark.parametrize("solve", SOLVED)
def test_each_row_has_the_zeros_of_its_budget(solve: Solve) -> None:
    weight, _, moments = problem(neurons=70, inputs=150, tokens=400)
    zeros = torch.randint(0, 151, (70,), generator=torch.Generator().manual_seed(1))
    zeros[:3] = torch.tensor([0, 150, 149])
    found = prune(weight, moments, zeros, solve=solve).weight
    assert (found == 0).sum(dim=1).tolist() == zeros.tolist()
    assert torch.equal(found[0], weight[0])  # a row without zeros is the dense one


@pytest.mark.parametrize("solve", SOLVED)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_and_an_expert_have_the_same_bits_alone_and_among_others(
    solve: Solve, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "_TOGETHER", 128 * 300)  # 200 rows are solved in two parts
    weight, _, _ = problem(neurons=200, inputs=300)
    alone = [problem(inputs=300, tokens=400, seed=seed)[2] for seed in range(2)]
    how: dict[str, Any] = {"method": method, "solve": solve}
    together = prune(weight, InputMoments.stack(alone), Sparsity(0.6), **how)
    for found, moments in zip(together.weight, alone, strict=True):
        assert torch.equal(found, prune(weight, moments, Sparsity(0.6), **how).weight)
    for rows in ([3], [199, 5, 64], list(range(0, 200, 2))):
        part = prune(weight[rows], alone[0], Sparsity(0.6), **how).weight
        assert torch.equal(part, together.weight[0, rows])


@pytest.mark.parametrize("solve", SOLVED)
def test_dead_inputs_and_dead_neurons_change_no_count(solve: Solve) -> None:
    weight, rows, _ = problem(neurons=20, inputs=60, tokens=300)
    rows[:, ::3] = 0
    weight[4] = 0
    weight[5, 30:] = 0
    moments = InputMoments.zeros(60)
    moments.add(rows)
    for method in METHODS:
        for text in ("0.25", "0.5", "2:4"):
            greedy, found = (
                prune(weight, moments, Sparsity.parse(text), method=method, solve=one).weight
                for one in ("greedy", solve)
            )
            assert found.isfinite().all()
            assert torch.equal((found == 0).sum(dim=1), (greedy == 0).sum(dim=1))
            assert (errors(weight, found, moments) <= errors(weight, greedy, moments)).all()


def test_a_weight_that_is_rounded_to_zero_keeps_its_place() -> None:
    """In float16 a solved weight below 3e-8 would be a zero more.

    The second and the third input are opposite, and so are what their equal weights do: with the
    third pruned, the solved second is 0.
    """
    rows = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0], [0.0, 2.0, -2.0]])
    moments = InputMoments.zeros(3)
    moments.add(rows)
    weight = torch.tensor([[0.5, 6e-8, 6e-8]], dtype=torch.float16)
    pruned = torch.tensor([[0.25, 6e-8, 0.0]], dtype=torch.float16)  # 0.25: worse than solved
    assert (weight != 0).all()
    found = exact(weight, pruned, moments, 0.01)
    assert found.dtype == torch.float16
    assert float(found[0, 0]) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(found == 0, pruned == 0)


def test_a_gram_that_is_not_one_keeps_the_methods_weights() -> None:
    """Steps that diverge lose the comparison in float64."""
    weight, _, moments = problem(neurons=8)
    pruned = prune(weight, moments, Sparsity(0.5)).weight
    noise = torch.randn(moments.lower.shape, generator=torch.Generator().manual_seed(0)).tril(-1)
    wrong = InputMoments(moments.lower + 4 * moments.lower.diagonal().mean() * noise, moments.count)
    before = errors(weight, pruned, wrong)
    worse = errors(weight, _solved(weight, pruned, _damped(wrong, 0.01)), wrong) > before
    assert worse.any()
    found = exact(weight, pruned, wrong, 0.01)
    assert torch.equal(found[worse], pruned[worse])
    assert (errors(weight, found, wrong) <= before).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 577])
def test_sums_are_sums_in_one_order(count: int) -> None:
    values = torch.randn(count, 128, generator=torch.Generator().manual_seed(0))
    found = _sums(values.clone())
    assert torch.allclose(found.double(), values.double().sum(dim=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(_sums(values[:, 5:9].clone()), found[5:9])


def test_what_is_no_solver_is_refused() -> None:
    weight, _, moments = problem()
    wrong: Any = "luck"
    with pytest.raises(ValueError, match=r"solve.*greedy.*exact.*admm.*'luck'"):
        prune(weight, moments, Sparsity(0.5), solve=wrong)
    poisoned = InputMoments(moments.lower * torch.nan, moments.count)
    with pytest.raises(ValueError, match="moments of the inputs are NaN"):
        prune(weight, poisoned, Sparsity(0.5), method="magnitude", solve="exact")
    assert masks.prune(weight, poisoned, Sparsity(0.5), method="magnitude").damping == (0.0,)

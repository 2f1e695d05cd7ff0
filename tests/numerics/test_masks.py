"""Pruning: against definitions written naively, and optimal brain surgeon by brute force."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from entangle.numerics import masks
from entangle.numerics.masks import (
    BLOCK,
    _lowest,
    _lowest_torch,
    _solve_torch,
    magnitude,
    sparse_gpt,
    wanda,
)
from entangle.numerics.moments import InputMoments, inverse_factor, output_energy
from entangle.numerics.sparsity import Mask, Method, Sparsity

Array = npt.NDArray[np.float64]
SPARSITIES = ["0", "0.3", "0.5", "0.875", "1", "2:4", "1:4", "0:4", "4:4", "3:8"]


def on(
    device: torch.device, weight: torch.Tensor, moments: InputMoments
) -> tuple[torch.Tensor, InputMoments]:
    """Return a weight and moments on a device."""
    return weight.to(device), InputMoments(moments.lower.to(device), moments.count.to(device))


def problem(
    neurons: int = 7, inputs: int = 24, tokens: int = 200, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, InputMoments]:
    """Return weights, inputs that depend on each other, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(neurons, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator)
    rows = torch.randn(tokens, inputs, generator=generator) @ mixing
    moments = InputMoments.zeros(inputs)
    moments.add(rows)
    return weight, rows, moments


@functools.lru_cache(maxsize=2)  # several tests are of one Gram
def inverses_of(gram: bytes, inputs: int) -> list[Array]:
    """Return the inverse of the damped Gram of the columns from j on, for each j."""
    hessian = np.frombuffer(gram).reshape(inputs, inputs)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * np.eye(inputs)
    return [np.linalg.inv(hessian[j:, j:]) for j in range(inputs)]


def brute_force(weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity) -> Array:
    """Optimal brain surgeon, row by row and column by column, each with a fresh inverse.

    A column's removal changes the columns right of it by -w_j / [H⁻¹]_jj · H⁻¹_j, H the Gram of
    the columns from j on. The choice is made at the first column of a block of 128 or of a group,
    among w² / [H⁻¹]_jj of each of its columns with the H of its own; a block's count is its share
    of the row's, carried over.
    """
    gram = moments.gram.double().numpy()
    inputs = len(gram)
    inverses = inverses_of(gram.tobytes(), inputs)
    size, total = sparsity.group or BLOCK, round(sparsity.share * inputs)
    result = weight.double().numpy().copy()
    for row in result:
        chosen: set[int] = set()
        for j in range(inputs):
            if j % size == 0:
                end = min(j + size, inputs)
                count = round(total * end / inputs) - round(total * j / inputs)
                count = sparsity.group - sparsity.kept if sparsity.group else count
                scores = [row[k] ** 2 / inverses[k][0, 0] for k in range(j, end)]
                chosen = {j + int(k) for k in np.argsort(scores, kind="stable")[:count]}
            if j in chosen:
                row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return result


@pytest.mark.parametrize("text", SPARSITIES)
def test_sparse_gpt_is_optimal_brain_surgeon(text: str, device: torch.device) -> None:
    weight, _, moments = problem()
    sparsity = Sparsity.parse(text)
    found = sparse_gpt(*on(device, weight, moments), sparsity)
    expected = brute_force(weight, moments, sparsity)
    assert found.damping == (0.01,)
    assert np.array_equal(found.weight.cpu().numpy() == 0, expected == 0)
    assert np.allclose(found.weight.cpu().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["numba", "torch"])
@pytest.mark.parametrize("text", ["0.3", "0.75", "1:3", "4:6", "48:144"])
def test_it_is_over_several_blocks_and_groups_that_cross_them(
    text: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _, moments = problem(neurons=3, inputs=288, tokens=900)
    sparsity = Sparsity.parse(text)
    if solver == "torch":  # as on a GPU

        def on_torch(*arrays: Any) -> None:
            block, pruned, square, counts = map(torch.from_numpy, arrays[:4])
            _solve_torch(block, pruned, square, counts, sparsity)

        monkeypatch.setattr(masks, "solve_block", on_torch)
    found = sparse_gpt(weight, moments, sparsity).weight.numpy()
    expected = brute_force(weight, moments, sparsity)
    assert np.array_equal(found == 0, expected == 0)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)
    if sparsity.group:
        kept = (found != 0).reshape(3, -1, sparsity.group).sum(axis=-1)
        assert (kept == sparsity.kept).all()


@pytest.mark.parametrize("text", SPARSITIES)
def test_magnitude_and_wanda_are_their_definitions(text: str, device: torch.device) -> None:
    weight, rows, moments = problem()
    sparsity = Sparsity.parse(text)
    size = sparsity.group or weight.shape[1]
    count = (size - sparsity.kept) if sparsity.group else round(sparsity.share * size)
    scores = {"magnitude": weight.abs(), "wanda": weight.abs() * rows.norm(dim=0)}
    for name, score in scores.items():
        expected = weight.clone()
        for row, values in zip(expected, score, strict=True):
            for first in range(0, weight.shape[1], size):
                for j in sorted(range(first, first + size), key=lambda j: float(values[j]))[:count]:
                    row[j] = 0
        own = on(device, weight, moments)
        pruned = magnitude(own[0], sparsity) if name == "magnitude" else wanda(*own, sparsity)
        assert torch.equal(pruned.cpu(), expected), name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparse_gpt"])
@pytest.mark.parametrize("mask", ["row", "block"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.77, 1])
def test_the_pruned_count_is_exact_on_ties_too(
    method: str, mask: Mask, share: float, device: torch.device
) -> None:
    weight, _, moments = problem(neurons=70, inputs=300, tokens=400)
    weight = weight.sign() + weight.sign().roll(1, dims=0) * 2  # four values only, none of them 0
    sparsity = Sparsity(share)
    pruned = prune(method, *on(device, weight, moments), sparsity, mask)
    zeros = (pruned == 0).sum(dim=1)
    assert int(zeros.sum()) == 70 * round(300 * share)
    if mask == "row":
        assert set(zeros.tolist()) == {round(300 * share)}
    elif 0 < share < 1:
        assert len(set(zeros.tolist())) > 1


@pytest.mark.parametrize("text", ["0.25", "0.5", "2:4", "1:8"])
def test_of_equal_scores_the_first_are_pruned(text: str) -> None:
    """Of inputs that are orthogonal and equally large all weights of a row score alike."""
    moments = InputMoments(torch.eye(32), torch.tensor(32))
    weight = torch.tensor([1.0, -1.0]).repeat(3, 16)
    sparsity = Sparsity.parse(text)
    size, count = sparsity.group or 32, round(sparsity.share * (sparsity.group or 32))
    found = sparse_gpt(weight, moments, sparsity).weight
    assert torch.equal(found == 0, (torch.arange(32) % size < count).expand(3, -1))


def prune(
    method: str, weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity, mask: Mask
) -> torch.Tensor:
    if method == "magnitude":
        return magnitude(weight, sparsity, mask=mask)
    if method == "wanda":
        return wanda(weight, moments, sparsity, mask=mask)
    return sparse_gpt(weight, moments, sparsity, mask=mask).weight


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparse_gpt"])
def test_two_of_four_never_leaves_three(method: str) -> None:
    weight, _, moments = problem(neurons=70, inputs=300, tokens=400)
    weight[:, ::3] = 1.0  # ties
    pruned = prune(method, weight, moments, Sparsity.parse("2:4"), "row")
    assert set((pruned.reshape(70, -1, 4) != 0).sum(dim=-1).flatten().tolist()) == {2}


@pytest.mark.parametrize("text", ["0.6", "1:4"])
def test_a_row_has_the_same_bits_whatever_lies_beside_it(text: str) -> None:
    weight, _, moments = problem(neurons=200, inputs=300, tokens=400)
    whole = sparse_gpt(weight, moments, Sparsity.parse(text)).weight
    for rows in ([3], [199, 5, 64], list(range(0, 200, 2))):
        part = sparse_gpt(weight[rows], moments, Sparsity.parse(text)).weight
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("text", ["0.6", "1:4"])
def test_an_expert_has_the_same_bits_whatever_lies_beside_it(text: str) -> None:
    weight, _, _ = problem(neurons=70, inputs=300)
    alone = [problem(inputs=300, tokens=400, seed=seed)[2] for seed in range(3)]
    together = sparse_gpt(weight, InputMoments.stack(alone), Sparsity.parse(text))
    assert together.damping == (0.01, 0.01, 0.01)
    for found, moments in zip(together.weight, alone, strict=True):
        assert torch.equal(found, sparse_gpt(weight, moments, Sparsity.parse(text)).weight)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_experts_that_are_pruned_one_at_a_time_have_the_bits_of_all_together(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory has one shrunk Gram and one factor at a time."""
    weight, _, _ = problem(neurons=20, inputs=150)
    moments = InputMoments.stack([problem(inputs=150, seed=seed)[2] for seed in range(5)])
    together = masks.prune(weight, moments.shrunk(0.5), Sparsity(0.6), method=method)
    given: list[int] = []

    def counted(weight: torch.Tensor, moments: InputMoments, *rest: Any) -> Any:
        given.append(len(moments.count))
        return prune_together(weight, moments, *rest)

    prune_together = masks._prune_together
    monkeypatch.setattr(masks, "_prune_together", counted)
    for size, experts, sizes in [
        (0, None, [1] * 5),
        (60_000, None, [2, 2, 1]),
        (0, [3, 1], [1, 1]),
    ]:
        monkeypatch.setattr(masks, "_TOGETHER", size)
        given.clear()
        found = masks.prune(
            weight, moments, Sparsity(0.6), method=method, shrinkage=0.5, experts=experts
        )
        assert given == sizes
        chosen = range(5) if experts is None else experts
        assert torch.equal(found.weight, together.weight[list(chosen)])
        assert found.damping == tuple(together.damping[expert] for expert in chosen)


def test_the_inverse_factor_is_one_and_needs_half_a_gram() -> None:
    moments = problem(inputs=150, tokens=400)[2]
    gram = moments.gram
    factor = inverse_factor(gram)
    hessian = gram.double() + 0.01 * gram.diag().mean() * torch.eye(150)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper @ hessian @ upper.mT, torch.eye(150).double(), atol=1e-3)
    assert torch.allclose(
        factor.squares([(20, 90)])[0], factor.upper[20:90, 20:90], rtol=1e-4, atol=1e-8
    )
    spans = [(0, 60), (60, 120), (120, 150)]
    for (first, end), square in zip(spans, factor.squares(spans), strict=True):
        assert torch.equal(square, factor.squares([(first, end)])[0])
    half = gram + torch.full_like(gram, torch.nan).triu(1)
    assert torch.equal(inverse_factor(half).root, factor.root)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_blocks_are_as_the_published_columns(text: str) -> None:
    weight, _, moments = problem(neurons=40, inputs=320, tokens=500)
    sparsity = Sparsity.parse(text)
    found = sparse_gpt(weight, moments, sparsity, mask="block")
    expected = published(weight, moments, sparsity)
    ours = output_energy(weight - found.weight, moments).sum()
    theirs = output_energy(weight - expected, moments).sum()
    assert float(ours / theirs) == pytest.approx(1, abs=1e-4)


def published(weight: torch.Tensor, moments: InputMoments, sparsity: Sparsity) -> torch.Tensor:
    """SparseGPT's algorithm 1 in float64, its factor from an explicit inverse."""
    gram = moments.gram.double()
    hessian = gram + 0.01 * gram.diag().mean() * torch.eye(len(gram))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w = weight.double().clone()
    for first in range(0, len(gram), BLOCK):
        end = min(first + BLOCK, len(gram))
        scores = (w[:, first:end] / upper.diag()[first:end]) ** 2
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if not sparsity.group:
            count = round(sparsity.share * scores.numel())
            mask.view(-1)[scores.flatten().argsort()[:count]] = True
        errors = torch.zeros_like(scores)
        for j in range(first, end):
            if sparsity.group and j % sparsity.group == 0:
                group = (w[:, j : j + sparsity.group] / upper.diag()[j : j + sparsity.group]) ** 2
                lowest = group.argsort(dim=1)[:, : sparsity.group - sparsity.kept]
                mask[:, j - first : j - first + sparsity.group].scatter_(1, lowest, value=True)
            error = torch.where(mask[:, j - first], w[:, j] / upper[j, j], 0.0)
            w[:, j:end] -= error[:, None] * upper[j, j:end]
            w[mask[:, j - first], j] = 0
            errors[:, j - first] = error
        w[:, end:] -= errors @ upper[first:end, end:]
    return w


def test_the_torch_columns_do_as_the_numba_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moments = problem(neurons=40, inputs=160, tokens=300)
    for text in ("0.4", "2:4"):
        sparsity = Sparsity.parse(text)
        expected = sparse_gpt(weight, moments, sparsity).weight

        def on_torch(*arrays: Any, s: Sparsity = sparsity) -> None:
            block, pruned, square, counts = map(torch.from_numpy, arrays[:4])
            _solve_torch(block, pruned, square, counts, s)

        with monkeypatch.context() as patch:
            patch.setattr(masks, "solve_block", on_torch)
            found = sparse_gpt(weight, moments, sparsity).weight
        assert torch.equal(found == 0, expected == 0)
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("count", [1, 64, 150, 299, 300])
def test_the_lowest_are_a_stable_sort_s_first(count: int) -> None:
    scores = torch.randint(0, 40, (5, 3, 300), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 0] = 0.0
    scores[1, 1] = torch.inf
    first = scores.argsort(dim=-1, stable=True)[..., :count]
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, first, value=True)
    assert torch.equal(_lowest(scores, count), expected)
    assert torch.equal(_lowest_torch(scores, torch.full((5, 3), count)), expected)


def test_the_lowest_of_each_row_are_as_many_as_it_is_told() -> None:
    scores = torch.randint(0, 9, (7, 50), generator=torch.Generator().manual_seed(0)).float()
    counts = torch.tensor([0, 1, 50, 25, 0, 49, 3])
    order = scores.argsort(dim=-1, stable=True)
    expected = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        expected[row, order[row, :count]] = True
    assert torch.equal(_lowest(scores, counts), expected)
    assert torch.equal(_lowest_torch(scores, counts), expected)
    assert torch.equal(_lowest(scores, 0), torch.zeros_like(expected))


@pytest.mark.parametrize("solver", ["numba", "torch"])
def test_each_row_has_its_zeros_and_is_pruned_as_if_all_had_as_many(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a budget a row's bits are those that it has in a layer of its own sparsity."""
    weight, _, moments = problem(neurons=70, inputs=300, tokens=900)
    zeros = torch.randint(0, 301, (70,), generator=torch.Generator().manual_seed(1))
    zeros[:3] = torch.tensor([0, 300, 299])
    if solver == "torch":

        def on_torch(*arrays: Any) -> None:
            block, pruned, square, counts = map(torch.from_numpy, arrays[:4])
            _solve_torch(block, pruned, square, counts, Sparsity(0))

        monkeypatch.setattr(masks, "solve_block", on_torch)
    methods: tuple[Method, ...] = ("sparsegpt", "wanda", "magnitude")
    for method in methods:
        found = masks.prune(weight, moments, zeros, method=method).weight
        assert (found == 0).sum(dim=1).tolist() == zeros.tolist()
        for row in (0, 1, 2, 33, 64, 69):
            alike = torch.full((70,), int(zeros[row]))
            same = masks.prune(weight, moments, alike, method=method).weight
            assert torch.equal(found[row], same[row])
        uniform = masks.prune(weight, moments, torch.full((70,), 210), method=method)
        share = masks.prune(weight, moments, Sparsity(0.7), method=method)
        assert torch.equal(uniform.weight, share.weight)


def test_a_budget_of_rows_inside_experts_is_each_experts() -> None:
    weight, _, first = problem(neurons=10, inputs=40, tokens=200)
    _, _, second = problem(neurons=10, inputs=40, tokens=150, seed=5)
    zeros = torch.arange(0, 40, 4)
    both = sparse_gpt(weight, InputMoments.stack([first, second]), zeros).weight
    for one, moments in zip(both, (first, second), strict=True):
        assert (one == 0).sum(dim=1).tolist() == zeros.tolist()
        assert torch.equal(one, sparse_gpt(weight, moments, zeros).weight)


def test_what_is_no_budget_of_rows_is_refused() -> None:
    weight, _, moments = problem(neurons=4, inputs=12, tokens=50)
    zeros = torch.tensor([1, 2, 3, 4])
    for function in (sparse_gpt, wanda):
        with pytest.raises(ValueError, match=r"block.*budget.*mask row"):
            function(weight, moments, zeros, mask="block")
        with pytest.raises(ValueError, match=r"\b4 rows.*\(3,\)"):
            function(weight, moments, zeros[:3])
        with pytest.raises(ValueError, match=r"\b4 rows.*torch\.float32"):
            function(weight, moments, zeros.float())
        with pytest.raises(ValueError, match=r"\b12 weights.* -1 to 13 zeros"):
            function(weight, moments, torch.tensor([-1, 2, 13, 4]))


def test_sparse_gpt_reconstructs_better_than_wanda_and_wanda_than_magnitude() -> None:
    weight, rows, moments = problem(neurons=64, inputs=128, tokens=1000)
    errors = {}
    for method in ("magnitude", "wanda", "sparse_gpt"):
        pruned = prune(method, weight, moments, Sparsity(0.5), "row")
        error = output_energy(weight - pruned, moments)
        outputs = (weight - pruned).double() @ rows.double().T
        assert torch.allclose(error, outputs.square().sum(dim=1), rtol=1e-3)
        errors[method] = float(error.sum())
    assert errors["sparse_gpt"] < errors["wanda"] < errors["magnitude"]


def test_inputs_that_are_always_zero_are_pruned_first() -> None:
    weight, rows, _ = problem(inputs=24)
    rows[:, [2, 9, 17]] = 0
    moments = InputMoments.zeros(24)
    moments.add(rows)
    for prune_one in (
        sparse_gpt(weight, moments, Sparsity(0.25)).weight,
        wanda(weight, moments, Sparsity(0.25)),
    ):
        assert (prune_one[:, [2, 9, 17]] == 0).all()


def test_moments_add_up() -> None:
    _, rows, moments = problem()
    parts = [InputMoments.zeros(24), InputMoments.zeros(24)]
    parts[0].add(rows[:50])
    parts[1].add(rows[50:].to(torch.float64))
    merged = parts[0].merged(parts[1])
    assert int(merged.count) == int(moments.count) == 200
    assert torch.allclose(merged.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)


def test_fewer_tokens_than_inputs_are_damped_in_the_end() -> None:
    weight, _, moments = problem(inputs=24, tokens=3)
    assert sparse_gpt(weight, moments, Sparsity(0.5)).damping == (0.01,)
    gram = moments.gram - 0.05 * moments.gram.diag().mean() * torch.eye(24)  # not a Gram any more
    found = sparse_gpt(weight, InputMoments(gram, moments.count), Sparsity(0.5))
    assert found.damping == (0.1,)
    assert torch.isfinite(found.weight).all()


def test_what_cannot_be_pruned_is_said() -> None:
    weight, _, moments = problem()
    half = Sparsity(0.5)
    with pytest.raises(ValueError, match=r"moments.*\b23 inputs.* 24$"):
        wanda(weight[:, :23], moments, half)
    with pytest.raises(ValueError, match=r"Gram of 24 inputs .*singular"):
        sparse_gpt(weight, InputMoments.zeros(24), half)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^1 of .*weights.*NaN"):
        sparse_gpt(broken, moments, half)
    gram = moments.gram.clone()
    gram[3] = float("inf")  # of which the lower triangle has four
    with pytest.raises(ValueError, match=r"^4 of .*moments.*NaN"):
        wanda(weight, InputMoments(gram, moments.count), half)
    with pytest.raises(ValueError, match=r"2:5 .*groups of 5\b.*\b24 inputs"):
        magnitude(weight, Sparsity.parse("2:5"))
    for text in ("1.1", "-0.1", "5:4", "2:0", "x", "nan", "-1:4"):
        with pytest.raises(ValueError, match=f"sparsity.*n:m.*'{text}'$"):
            Sparsity.parse(text)


def test_a_sparsity_is_printed_as_it_is_written() -> None:
    assert [str(Sparsity.parse(text)) for text in ("0.8", "2:4", "1")] == ["0.8", "2:4", "1"]
    assert Sparsity.parse("1:4").share == 0.75
    assert Sparsity.parse(str(Sparsity(1 / 3))) == Sparsity(1 / 3)

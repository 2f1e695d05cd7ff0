"""The Triton kernels of pruning, here by Triton's interpreter: against Numba's and by brute force."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from entangle.numerics import masks
from entangle.numerics.kernels import masks_cpu, masks_triton
from entangle.numerics.masks import Pruned, sparse_gpt
from entangle.numerics.moments import InputMoments
from entangle.numerics.sparsity import Mask, Sparsity
from tests.numerics import test_masks
from tests.numerics.test_masks import brute_force, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_block(columns: int, experts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block of 64 rows, among them rows of ties, and squares of U with a dead input."""
    generator = torch.Generator().manual_seed(columns)
    block = torch.randn(experts, columns, 64, generator=generator)
    block[:, :, 3:6] = block[:, :, 3:6].sign()
    square = torch.randn(experts, columns, columns, generator=generator).triu(1) / 8
    square += torch.eye(columns)
    square[-1, 1, 1] = torch.inf
    return block, square


def solved(
    block: torch.Tensor, square: torch.Tensor, counts: torch.Tensor, kept: int = 0, group: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block as Numba and as Triton solve it."""
    by_numba, by_triton = block.clone(), block.to(DEVICE, copy=True)
    none = torch.zeros_like(block, dtype=torch.bool)
    solve(by_numba, none, square, counts, kept, group)
    chosen, square, counts = (array.to(DEVICE) for array in (none, square, counts))
    masks_triton.solve_block(by_triton, chosen, square, counts, kept, group)
    return by_numba, by_triton.cpu()


def solve(*arguments: Any) -> None:
    """Solve by Numba; the arguments are those of `masks_triton.solve_block`."""
    arrays = (tensor.numpy() for tensor in arguments[:4])
    masks_cpu.solve_block(*arrays, *arguments[4:])


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve more rows in a program, since the interpreter runs one after the other."""
    monkeypatch.setattr(masks_triton, "_ROWS", 64)
    monkeypatch.setattr(masks_triton, "_TILE", 64 * 64)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("columns", [1, 24])
def test_a_block_has_the_bits_of_numba(columns: int) -> None:
    block, square = random_block(columns + 1)
    counts = torch.randint(0, columns + 2, (64,), generator=torch.Generator().manual_seed(0))
    counts[:4] = torch.tensor([0, columns + 1, columns, columns // 2])
    by_numba, by_triton = solved(block, square, counts)
    assert torch.equal(by_triton, by_numba)
    assert ((by_triton == 0).sum(dim=1) == counts).all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("text", ["2:4", "1:3", "0:6", "9:18"])
def test_groups_have_the_bits_of_numba(text: str) -> None:
    sparsity = Sparsity.parse(text)
    block, square = random_block(18 if 18 % sparsity.group == 0 else 12)
    counts = torch.zeros(64, dtype=torch.int64)
    by_numba, by_triton = solved(block, square, counts, sparsity.kept, sparsity.group)
    assert torch.equal(by_triton, by_numba)
    kept = (by_triton != 0).unflatten(1, (-1, sparsity.group)).sum(dim=2)
    assert (kept == sparsity.kept).all()


def test_every_tile_is_solved() -> None:
    block, square = random_block(4)
    by_numba, by_triton = solved(block, square, torch.full((64,), 2))
    assert torch.equal(by_triton, by_numba)


@pytest.mark.usefixtures("large_tiles")
def test_weights_that_are_chosen_already_are_pruned() -> None:
    block, square = random_block(6, experts=1)
    chosen = block.abs() < 0.5
    by_triton, by_numba = block.to(DEVICE, copy=True), block.clone()
    none = torch.zeros(64, dtype=torch.int64)
    solve(by_numba, chosen, square, none, 0, 0)
    arrays = [by_triton, *(array.to(DEVICE) for array in (chosen, square, none))]
    masks_triton.solve_block(arrays[0], arrays[1], arrays[2], arrays[3], kept=0, group=0)
    assert torch.equal(by_triton.cpu(), by_numba)
    assert torch.equal(by_triton.cpu() == 0, chosen)


@pytest.fixture(params=["one program for a row", "many programs for a row"])
def row_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("many"):
        monkeypatch.setattr(masks_triton, "_LONGEST", 0)
        monkeypatch.setattr(masks_triton, "_CHUNK", 64)


@pytest.mark.usefixtures("row_programs")
@pytest.mark.parametrize("columns", [1, 150])
def test_the_lowest_are_a_stable_sort_s_first(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, columns, generator=generator).abs()
    scores[1] = torch.randint(0, 4, (columns,), generator=generator).float()
    scores[2] = 0.0
    scores[3, ::2] = torch.inf
    scores[4] = 1 + torch.randint(0, 9, (columns,), generator=generator) * 2.0**-23  # last bits
    counts = torch.tensor([columns // 2, columns // 2, columns // 3, columns, columns // 2, 0])
    expected = torch.zeros_like(scores, dtype=torch.bool)
    for row, order in enumerate(scores.argsort(dim=-1, stable=True)):
        expected[row, order[: counts[row]]] = True
    found = torch.ones_like(expected).to(DEVICE)
    masks_triton.mark_lowest(scores.to(DEVICE), found, counts.to(DEVICE))
    assert torch.equal(found.cpu(), expected)


def random_product(columns: int, rows: int, depth: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(depth)
    shapes = ((columns, rows), (depth, columns), (depth, rows))
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize(("columns", "rows", "depth"), [(1, 1, 1), (70, 130, 33), (64, 128, 16)])
def test_products_are_of_float32(columns: int, rows: int, depth: int) -> None:
    out, a, b = random_product(columns, rows, depth)
    expected = out.double() + a.double().T @ b.double()
    masks_triton.add_product(out, a, b)
    assert torch.allclose(out.double(), expected, rtol=1e-6, atol=1e-5)


def test_products_take_the_parts_of_larger_tensors() -> None:
    whole, a, b = random_product(40, 64, 50)
    expected = whole.double()
    expected[10:30] += a[5:20, 10:30].double().T @ b[5:20].double()
    masks_triton.add_product(whole[10:30], a.T.contiguous().T[5:20, 10:30], b[5:20])
    assert torch.allclose(whole.double(), expected, rtol=1e-6, atol=1e-5)


def by_triton(
    monkeypatch: pytest.MonkeyPatch,
    weight: torch.Tensor,
    moments: InputMoments,
    sparsity: Sparsity | torch.Tensor,
    mask: Mask = "row",
) -> Pruned:
    """Prune as on a GPU."""

    def solve_block(*arrays: Any) -> None:
        block, pruned, square, counts = map(torch.from_numpy, arrays[:4])
        masks_triton.solve_block(block, pruned, square, counts, *arrays[4:])

    def mark_lowest(*arrays: Any) -> None:
        scores, lowest, counts = map(torch.from_numpy, arrays)
        masks_triton.mark_lowest(scores, lowest, counts)

    with monkeypatch.context() as patch:
        if DEVICE.type == "cuda":
            weight = weight.to(DEVICE)
            moments = InputMoments(moments.lower.to(DEVICE), moments.count.to(DEVICE))
        else:
            patch.setattr(masks, "solve_block", solve_block)
            patch.setattr(masks, "mark_lowest", mark_lowest)
            patch.setattr(masks, "add_product", masks_triton.add_product)
        found = sparse_gpt(weight, moments, sparsity, mask=mask)
    return Pruned(found.weight.cpu(), found.damping)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, large_tiles: None) -> None:
    """Blocks of 10 columns, so that few columns are several blocks; the last has 4."""
    monkeypatch.setattr(masks, "BLOCK", 10)
    monkeypatch.setattr(test_masks, "BLOCK", 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["0", "0.3", "1", "2:4", "5:8"])
def test_it_is_optimal_brain_surgeon(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moments = problem()
    sparsity = Sparsity.parse(text)
    found = by_triton(monkeypatch, weight, moments, sparsity).weight.numpy()
    expected = brute_force(weight, moments, sparsity)
    assert np.array_equal(found == 0, expected == 0)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mask", ["row", "block"])
def test_experts_are_pruned_as_by_numba(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, first = problem()
    moments = InputMoments.stack([first, problem(seed=1)[2]])
    found = by_triton(monkeypatch, weight, moments, Sparsity(0.4), mask)
    expected = sparse_gpt(weight, moments, Sparsity(0.4), mask=mask)
    assert found.damping == expected.damping
    assert torch.equal(found.weight == 0, expected.weight == 0)
    assert torch.allclose(found.weight, expected.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_has_the_same_bits_whatever_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, first = problem(neurons=70)
    moments = InputMoments.stack([first, problem(seed=1)[2]])
    zeros = torch.arange(70) % 25  # 0 and all 24 among them
    whole = by_triton(monkeypatch, weight, moments, zeros).weight
    assert ((whole == 0).sum(dim=-1) == zeros).all()
    rows = [3, 69, 24]
    part = by_triton(monkeypatch, weight[rows], moments.expert(1), zeros[rows]).weight
    assert torch.equal(part, whole[1, rows])

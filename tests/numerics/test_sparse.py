"""Products of sparse matrices against float64 dense ones, and slices against all ways to make them.

A sum of n products is wrong by at most n roundings of the sum of their sizes: that is the bound.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from entangle.numerics import threads as numba_threads
from entangle.numerics.kernels import sparse_cpu
from entangle.numerics.sparse import Sliced, slice_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 15, 16, 17, 32, 33, 50, 90)  # a tile has 16 or 32
ROUNDING = 2.0**-24


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(*shape: int, density: float = 0.3, seed: int = 3) -> torch.Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    return torch.where(keep, noise(*shape, seed=seed), 0.0)


def with_lengths(lengths: list[int], inputs: int, seed: int = 0) -> torch.Tensor:
    """Return a weight (neurons, inputs) whose rows have so many nonzeros, anywhere in the row."""
    weight = torch.zeros(len(lengths), inputs)
    generator = torch.Generator().manual_seed(seed)
    for row, length in zip(weight, lengths, strict=True):
        columns = torch.randperm(inputs, generator=generator)[:length]
        row[columns] = torch.rand(length, generator=generator) + 0.5
    return weight


def unequal() -> torch.Tensor:
    """Return rows of all lengths from none to all, in no order."""
    lengths = torch.randperm(31, generator=torch.Generator().manual_seed(0)).tolist()
    return with_lengths(lengths, 30)[None]


def emptied() -> torch.Tensor:
    """Return experts of which one has empty rows, one has nothing at all, and the last is full."""
    weight = sparse(4, 19, 21)
    weight[0, [0, 3, 4, 18]] = 0.0
    weight[1] = 0.0
    weight[3] = noise(19, 21, seed=8)
    return weight


WEIGHTS: dict[str, Callable[[], torch.Tensor]] = {
    "slices that are whole": lambda: sparse(1, 16, 24),
    "neurons left over": lambda: sparse(2, 11, 24),
    "one neuron": lambda: sparse(3, 1, 9, density=0.5),
    "one input": lambda: sparse(2, 5, 1, density=0.5),
    "unequal rows": unequal,
    "empty rows and experts": emptied,
    "nothing": lambda: torch.zeros(2, 9, 12),
    "all": lambda: noise(2, 10, 13),
    "experts of unequal density": lambda: torch.cat(
        [sparse(1, 13, 50, density=density) for density in (0.9, 0.02, 0.5, 0.1)]
    ),
}


def check(sliced: Sliced, weight: torch.Tensor, rows: torch.Tensor) -> None:
    """See that all experts' products are those in float64, but for the roundings of float32."""
    for expert, dense in enumerate(weight.double()):
        found = sliced.product(rows, expert)
        assert (found.shape, found.dtype) == ((len(rows), len(dense)), torch.float32)
        expected = rows.double() @ dense.T
        size = rows.double().abs() @ dense.abs().T
        bound = ((dense != 0).sum(1) + 1) * ROUNDING * size
        assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_products_are_the_dense_ones_in_float64(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]().to(dtype)
    sliced = slice_rows(weight)
    assert (sliced.neurons, sliced.inputs) == weight.shape[1:]
    for tokens in TOKENS:
        check(sliced, weight, noise(tokens, weight.shape[2], seed=tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 18])
def test_rows_of_any_dtype_are_summed_in_float32(dtype: torch.dtype, tokens: int) -> None:
    weight = sparse(2, 11, 200, density=0.5).bfloat16()
    rows = noise(tokens, 200).to(dtype)
    check(slice_rows(weight), weight, rows.float())
    found = slice_rows(weight).product(rows, 1)
    assert torch.equal(found, slice_rows(weight).product(rows.float(), 1))
    assert not torch.equal(found, found.bfloat16().float())  # which sums in bfloat16 would be


@pytest.mark.parametrize(
    ("inputs", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32), (70_000, np.uint32)]
)
def test_columns_beyond_65536_are_not_mixed_up(inputs: int, kind: type) -> None:
    weight = torch.zeros(2, 9, inputs)
    weight[0, :, [0, 1, 65_534, 65_535, inputs - 2, inputs - 1]] = noise(9, 6)
    weight[1, 3, inputs - 1] = 2.0
    sliced = slice_rows(weight)
    assert sliced.columns.dtype == kind
    for tokens in (1, 3):
        check(sliced, weight, noise(tokens, inputs, seed=tokens))
    assert torch.equal(sliced.dense(0), weight[0])
    assert torch.equal(sliced.dense(1), weight[1])


def test_rows_and_weights_may_lie_in_memory_as_they_like() -> None:
    weight = sparse(24, 11, 3).permute(2, 1, 0)
    rows = noise(24, 17).T
    single = noise(1, 48)[:, ::2]
    assert not (weight.is_contiguous())
    assert not (rows.is_contiguous())
    assert single.stride() == (48, 2)
    sliced = slice_rows(weight)
    check(sliced, weight, rows)
    check(sliced, weight, single)
    check(sliced, weight, noise(1, 24)[:, :1].expand(5, 24))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_no_other(value: float) -> None:
    weight = sparse(1, 11, 24, density=0.6)
    rows = noise(20, 24)
    spoilt = rows.clone()
    spoilt[3], spoilt[17, 0] = value, value
    expected, found = (slice_rows(weight).product(each, 0) for each in (rows, spoilt))
    others = [token for token in range(20) if token not in {3, 17}]
    assert torch.equal(found[others], expected[others])
    assert not found[3].isfinite().any()
    assert not found[17][weight[0, :, 0] != 0].isfinite().any()


def test_rows_are_read_and_not_written_to() -> None:
    weight = sparse(1, 11, 24)
    sliced = slice_rows(weight)
    for tokens in (1, 17):
        rows = noise(tokens, 24)
        before = rows.clone()
        first = sliced.product(rows, 0)
        kept = first.clone()
        sliced.product(rows + 1, 0)
        assert torch.equal(rows, before)
        assert torch.equal(first, kept)  # no buffer is shared


# Threads.


@pytest.mark.parametrize("name", WEIGHTS)
def test_more_threads_give_the_same_bits(name: str) -> None:
    weight = WEIGHTS[name]()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sliced = slice_rows(weight)
        for expert, tokens in itertools.product(range(len(weight)), (1, 17, 150)):
            rows = noise(tokens, weight.shape[2])
            found.append((threads, sliced.product(rows, expert), sliced.dense(expert)))
    half = len(found) // 2
    for (_, product, dense), (_, other, twin) in zip(found[:half], found[half:], strict=True):
        assert torch.equal(product, other)
        assert torch.equal(dense, twin)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("experts", [1, 3, 16, 40])
def test_one_token_finds_its_expert_and_its_outputs(
    experts: int, shape: tuple[int, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    weight = sparse(experts, 11, 24)
    sliced = slice_rows(weight)
    matrix, bias = noise(24, experts, seed=1), noise(experts, seed=2)
    met = set()
    for seed in range(60):
        inputs = noise(*shape, 24, seed=seed)
        scores = inputs.double() @ matrix.double() + bias.double()
        outputs, expert = sliced.one(inputs, None, matrix.numpy(), bias.numpy())
        assert expert == int(scores.argmax())
        assert outputs.shape == (*shape, 11)
        again, same = sliced.one(inputs, expert, matrix.numpy(), bias.numpy())
        assert (again.tolist(), same) == (outputs.tolist(), expert)
        expected = inputs.double() @ weight[expert].double().T
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)
        met.add(expert)
    assert len(met) > experts / 3
    arrays = matrix.numpy(), bias.numpy()
    no_expert = rf"^expected an expert from 0 to {experts - 1}, got"
    router = rf"router.*\(24, {experts}\).*\b{experts} biases, got"
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((noise(23), 0), r"^expected 24 inputs, got 23$"),
        ((noise(2, 24), None, *arrays), r"^expected 24 inputs, got 48$"),
        ((noise(24), experts), f"{no_expert} {experts}$"),
        ((noise(24), -1), f"{no_expert} -1$"),
        ((noise(24), None), f"{router} neither$"),
        ((noise(24), None, arrays[0][:-1], arrays[1]), rf"{router}.*\(23, {experts}\)"),
        (
            (noise(24), None, np.tile(arrays[0], 2), np.tile(arrays[1], 2)),
            rf"{router}.*\(24, {2 * experts}\) and {2 * experts} biases$",
        ),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            sliced.one(*arguments)
    for tokens, expert in ((1, experts), (2, experts), (2, -1)):
        with pytest.raises(ValueError, match=f"{no_expert} {expert}$"):
            sliced.product(noise(tokens, 24), expert)
    for tokens in (1, 2):
        with pytest.raises(ValueError, match=r"^expected 24 inputs, got 25$"):
            sliced.product(noise(tokens, 25), 0)
    ties = np.zeros((24, experts), np.float32), np.zeros(experts, np.float32)
    assert sliced.one(inputs, None, *ties)[1] == 0


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("counts", [(3, 40, 0, 90), (1, 1, 1, 1), (0, 0, 16, 17), (0, 0, 0, 200)])
def test_several_experts_share_a_text(
    counts: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(min(threads, 2))
    if threads > 2:
        monkeypatch.setattr(numba_threads, "TorchThreads", lambda: nullcontext(threads))
    weight = emptied()
    sliced = slice_rows(weight)
    rows = noise(sum(counts), 21)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    lasts = np.cumsum(counts).tolist()
    spans = [
        (e, last - n, last) for e, (n, last) in enumerate(zip(counts, lasts, strict=True)) if n
    ]
    for chosen in (spans, spans[1:], spans[::-1]):
        found = sliced.products(rows, order, chosen)
        assert found.shape == (len(rows), 19)
        for expert, first, last in chosen:
            mine = order[first:last]
            alone = sliced.product(torch.cat([rows[mine], rows[:1]]), expert)[:-1]
            assert torch.equal(found[mine], alone)  # no bit depends on a token's company
            expected = rows[mine].double() @ weight[expert].double().T
            torch.testing.assert_close(found[mine].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("name", WEIGHTS)
def test_in_as_many_parts_as_one_likes_no_row_is_left_out(
    name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = WEIGHTS[name]()
    monkeypatch.setattr(numba_threads, "TorchThreads", lambda: nullcontext(parts))
    sliced = slice_rows(weight)
    for expert, dense in enumerate(weight):
        starts = sliced.starts[expert]
        ends = 0
        for part in range(parts):
            begin, end = sparse_cpu._part(starts, part, parts)
            assert begin == ends
            ends = end
            longest = np.diff(starts).max()
            share = (starts[-1] - starts[0]) / parts
            assert starts[end] - starts[begin] <= share + longest  # as fair as whole slices are
        assert ends == len(starts) - 1
        assert torch.equal(sliced.dense(expert), dense)
    for tokens in (1, 17, 90):
        check(sliced, weight, noise(tokens, weight.shape[2]))


# What is stored.


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_gives_every_bit_back_but_of_negative_zeros(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]().to(dtype)
    kinds = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).tiny])
    kinds = torch.cat(
        [kinds.to(dtype), torch.tensor([1], dtype=torch.int16).view(torch.float16).to(dtype)]
    )
    weight[-1, -1, : len(kinds)] = kinds[: weight.shape[2]]
    sliced = slice_rows(weight)
    held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert sliced.dtype == held
    assert sliced.values.dtype == (np.uint16 if held == torch.bfloat16 else np.float32)
    for expert, dense in enumerate(weight):
        found = sliced.dense(expert)
        assert found.dtype == held
        assert raw(found) == raw(torch.where(dense == 0, 0.0, dense).to(held))


def test_the_smallest_numbers_are_not_lost() -> None:
    weight = torch.tensor([[[1, 0, 2, 0x8001]]], dtype=torch.uint16).view(torch.bfloat16)
    sliced = slice_rows(weight)
    assert len(sliced.values) == 3 * 8
    assert raw(sliced.dense(0)) == raw(weight[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    message = f"float32, bfloat16.*float16.*packed.* {dtype}$"
    with pytest.raises(ValueError, match=message):
        slice_rows(torch.zeros(1, 3, 4, dtype=dtype))


def test_a_weight_that_learns_is_packed_as_it_is() -> None:
    weight = torch.nn.Parameter(sparse(2, 9, 12))
    assert torch.equal(slice_rows(weight).dense(1), weight[1])


@pytest.mark.parametrize(("neurons", "slots"), [(8, 8), (16, 16), (24, 24), (9, 16), (1, 8)])
def test_rows_of_equal_length_have_no_padding(neurons: int, slots: int) -> None:
    weight = torch.stack([with_lengths([5] * neurons, 20, seed) for seed in range(3)])
    sliced = slice_rows(weight)
    assert len(sliced.values) == len(sliced.columns) == 3 * slots * 5
    assert (sliced.values != 0).sum() == 3 * neurons * 5


@pytest.mark.parametrize("seed", range(6))
def test_with_unequal_rows_no_other_slices_of_eight_are_smaller(seed: int) -> None:
    """Of eleven rows there are two slices: all ways to choose the first one are tried."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(21, (11,), generator=generator).tolist()
    least = min(
        8 * (max(lengths[i] for i in first) + max(lengths[i] for i in {*range(11)} - {*first}))
        for size in range(3, 9)
        for first in itertools.combinations(range(11), size)
    )
    sliced = slice_rows(with_lengths(lengths, 20, seed)[None])
    assert len(sliced.values) == len(sliced.columns) == least
    assert (sliced.values != 0).sum() == sum(lengths)


def test_padding_is_what_sorting_by_length_leaves() -> None:
    weight = torch.cat([unequal(), sparse(1, 31, 30, density=0.2)])
    lengths = [sorted(((one != 0).sum(1)).tolist(), reverse=True) for one in weight]
    steps = [[one[at] for at in range(0, 31, 8)] for one in lengths]
    sliced = slice_rows(weight)
    assert len(sliced.values) == 8 * sum(map(sum, steps))
    assert np.diff(sliced.starts).tolist() == steps
    for expert in range(2):
        assert sliced.density(expert) == pytest.approx(8 * sum(steps[expert]) / (31 * 30))
    assert sliced.starts[0, -1] == sliced.starts[1, 0]


@pytest.mark.parametrize(
    ("dtype", "inputs", "bytes_each"),
    [
        (torch.float32, 20, 4 + 2),
        (torch.float16, 20, 4 + 2),
        (torch.bfloat16, 20, 2 + 2),
        (torch.float32, 65_537, 4 + 4),
    ],
)
def test_bytes_are_those_of_entries_rows_and_slices(
    dtype: torch.dtype, inputs: int, bytes_each: int
) -> None:
    weight = torch.zeros(3, 9, inputs)
    weight[:, :, :4] = noise(3, 9, 4)
    weight[1, 5, 10] = 1.0  # one more step of a slice
    sliced = slice_rows(weight.to(dtype))
    entries = 3 * 2 * 8 * 4 + 8
    assert sliced.nbytes == entries * bytes_each + 8 * 3 * 16 + 8 * 3 * 3
    assert sliced.density(0) == pytest.approx(2 * 8 * 4 / (9 * inputs))
    assert sliced.density(1) == pytest.approx((2 * 8 * 4 + 8) / (9 * inputs))


# When it pays.


def of_density(density: float, dtype: torch.dtype) -> Sliced:
    """Return two experts, of which the second has this density and the first none."""
    weight = torch.zeros(2, 8, 100)
    weight[1, :, : round(100 * density)] = 1.0
    return slice_rows(weight.to(dtype))


DENSITIES = (0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0)
MANY = (*range(2, 70), *(2**k for k in range(7, 21)))


def switch(sliced: Sliced) -> int:
    """Return the first number of tokens for which an expert is unpacked; 2^21 if none is."""
    return next((n for n in MANY if not sliced.is_faster(n, 1)), 1 << 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", DENSITIES)
def test_a_single_token_is_never_unpacked_for(density: float, dtype: torch.dtype) -> None:
    sliced = of_density(density, dtype)
    assert sliced.density(1) == pytest.approx(density)
    assert sliced.is_faster(1, 1)
    assert sliced.is_faster(1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", DENSITIES)
def test_more_tokens_never_turn_it_back(density: float, dtype: torch.dtype) -> None:
    sliced = of_density(density, dtype)
    answers = [sliced.is_faster(tokens, 1) for tokens in MANY]
    assert answers == sorted(answers, reverse=True)


def test_it_is_unpacked_the_earlier_the_denser_and_in_bfloat16() -> None:
    exact = [switch(of_density(density, torch.float32)) for density in DENSITIES]
    lower = [switch(of_density(density, torch.bfloat16)) for density in DENSITIES]
    assert exact == sorted(exact, reverse=True)
    assert lower == sorted(lower, reverse=True)
    assert exact[:5] == [1 << 21] * 5  # up to 0.25, never
    assert all(one < other for one, other in zip(lower[1:], exact[1:], strict=True))
    assert exact[-1] < 100
    assert lower[-1] < 20


def test_each_expert_is_asked_for_its_own_density() -> None:
    sliced = of_density(1.0, torch.float32)
    assert sliced.is_faster(10_000, 0)
    assert not sliced.is_faster(10_000, 1)

"""The GPU's products with experts, by the interpreter without a GPU: against dense ones in float64.

The interpreter cuts a float32 to bfloat16 instead of rounding it, hence the bounds.
"""

import itertools

import pytest
import torch

from entangle.numerics import device_weights
from entangle.numerics.device_weights import DeviceDense, DeviceSliced, moved, multiply_few
from entangle.numerics.routing import Routes
from entangle.numerics.sparse import Sliced, slice_rows
from tests.numerics.test_sparse import ROUNDING, WEIGHTS, noise, sparse

kernel = pytest.importorskip("entangle.numerics.kernels.sparse_triton")

CUT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FLOATS = (*CUT,)
CASES = [*zip(WEIGHTS, itertools.cycle(FLOATS), strict=False)]
CASES += [("neurons left over", dtype) for dtype in FLOATS]


def on(device: torch.device, weight: torch.Tensor) -> DeviceSliced:
    found = moved(slice_rows(weight), device)
    assert isinstance(found, DeviceSliced)
    return found


def check(
    found: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    chosen: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """See that each token has its expert's product, but for the roundings of sums and outputs."""
    weights, rows = weight.double()[chosen], rows.double()
    size = torch.einsum("ti,tni->tn", rows.abs(), weights.abs())
    expected = torch.einsum("ti,tni->tn", rows, weights)
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    bound = ((weights != 0).sum(2) + 2) * ROUNDING * size + CUT[found.dtype] * expected.abs()
    assert found.shape == expected.shape
    assert bool(((found.cpu().double() - expected).abs() <= bound + 1e-7).all())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, steps and slices for each program, of few neurons and inputs."""
    monkeypatch.setattr(kernel, "_TILES", {2: (16, 16, 16), 4: (16, 16, 16)})
    monkeypatch.setattr(kernel, "_LONGEST", 16)
    monkeypatch.setattr(kernel, "_ROUTING", 2)
    monkeypatch.setattr(kernel, "_ROUTED", 16)
    monkeypatch.setattr(kernel, "_ZEROS", 16)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_are_the_dense_ones(name: str, dtype: torch.dtype, gpu: torch.device) -> None:
    weight = WEIGHTS[name]().to(dtype)
    experts, neurons, inputs = weight.shape
    rows, bias = noise(3, inputs).to(dtype), noise(neurons, seed=1).to(dtype)
    chosen = torch.tensor([experts - 1, 0, experts - 1])
    routes = Routes(chosen.to(gpu), experts)
    sliced = on(gpu, weight)
    assert sliced.dtype == dtype
    assert torch.equal(sliced.dense(0, experts).cpu(), weight)
    for weights in (sliced, DeviceDense(weight.to(gpu))):
        check(multiply_few(weights, rows.to(gpu), routes.chosen, None), weight, rows, chosen)
        found = weights.many(rows.to(gpu), routes, bias.to(gpu))
        assert found.dtype == dtype
        check(found, weight, rows, chosen, bias)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("experts", [1, 3, 17])
def test_one_token_is_routed_and_multiplied_at_once(experts: int, gpu: torch.device) -> None:
    weight, bias = sparse(experts, 27, 50, density=0.5), noise(27, seed=4)
    router = noise(50, experts, seed=1), noise(experts, seed=2)
    on_card = router[0].to(gpu), router[1].to(gpu)
    twins: list[DeviceSliced | DeviceDense] = [on(gpu, weight), DeviceDense(weight.to(gpu))]
    for seed, weights in enumerate(twins):
        row, chosen = noise(1, 50, seed=seed), torch.full((1,), -1, device=gpu)
        found = multiply_few(weights, row.to(gpu), chosen, bias.to(gpu), on_card)
        expected = (row.double() @ router[0].double() + router[1].double()).argmax(dim=1)
        assert torch.equal(chosen.cpu(), expected)
        check(found, weight, row, expected, bias)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_of_equal_scores_the_first_expert_is_chosen_and_always_one_that_exists(
    value: float, gpu: torch.device
) -> None:
    weight, chosen = on(gpu, sparse(3, 5, 6)), torch.full((1,), -1, device=gpu)
    router = torch.ones(6, 3, device=gpu), torch.tensor([0.0, 1.0, 1.0], device=gpu)
    multiply_few(weight, torch.full((1, 6), value, device=gpu), chosen, None, router)
    assert int(chosen) in ([1] if value == 0 else [0, 1, 2])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("counts", [(17, 0, 19), (0, 0, 18), (1, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_have_as_many_tokens_as_they_get(
    counts: tuple[int, ...], dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sparse(3, 19, 21).to(dtype)
    chosen = torch.arange(3).repeat_interleave(torch.tensor(counts))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    rows, routes = noise(len(chosen), 21).to(dtype), Routes(chosen.to(gpu), 3)
    assert routes.offsets.tolist() == [0, *itertools.accumulate(counts)]
    sliced = on(gpu, weight)
    found = sliced.many(rows.to(gpu), routes, None)
    check(found, weight, rows, chosen)
    assert torch.equal(found, DeviceDense(weight.to(gpu)).many(rows.to(gpu), routes, None))
    monkeypatch.setattr(device_weights, "_SCRATCH", 2 * 19 * 21 * dtype.itemsize)  # two experts
    assert torch.equal(found, sliced.many(rows.to(gpu), routes, None))


def test_an_expert_may_have_more_tokens_than_a_tile(gpu: torch.device) -> None:
    """The tiles are those of a GPU: at most 128 tokens."""
    weight, chosen = sparse(2, 19, 21), torch.tensor([1] * 131 + [0] * 3 + [1])
    rows, routes = noise(len(chosen), 21), Routes(chosen.to(gpu), 2)
    found = on(gpu, weight).many(rows.to(gpu), routes, None)
    check(found, weight, rows, chosen)


@pytest.mark.usefixtures("small_tiles")
def test_tokens_of_one_expert_need_no_routes(gpu: torch.device) -> None:
    weight, rows, bias = sparse(1, 19, 40), noise(3, 40), noise(19, seed=1)
    sliced, none = on(gpu, weight), torch.zeros(3, dtype=torch.int64)
    check(multiply_few(sliced, rows.to(gpu), None, bias.to(gpu)), weight, rows, none, bias)
    check(sliced.many(rows.to(gpu), None, bias.to(gpu)), weight, rows, none, bias)


@pytest.mark.parametrize("inputs", [1 << 16, (1 << 16) + 1])
def test_columns_beyond_65536_are_not_mixed_up(
    inputs: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_ZEROS", 1 << 15)
    weight = torch.zeros(1, 2, inputs)
    weight[0, :, [0, 1, 40_000, 65_534, inputs - 1]] = noise(2, 5)
    sliced, rows = on(gpu, weight), noise(2, inputs)
    assert sliced.columns.dtype == (torch.uint16 if inputs == 1 << 16 else torch.uint32)
    none = torch.zeros(2, dtype=torch.int64)
    check(multiply_few(sliced, rows.to(gpu), None, None), weight, rows, none)
    assert torch.equal(sliced.dense(0, 1).cpu(), weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_weights_move_there_and_back(
    dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = WEIGHTS["empty rows and experts"]().to(dtype)
    here = slice_rows(weight)
    there = on(gpu, weight)
    assert there.nbytes == len(here.values) * (dtype.itemsize + 2) + 8 * (4 * 24 + 4 * 4)
    if gpu.type == "cpu":
        monkeypatch.undo()
    back = moved(there, torch.device("cpu"))
    assert isinstance(back, Sliced)
    assert moved(here, torch.device("meta")) is here
    for expert in range(4):
        assert torch.equal(back.dense(expert), here.dense(expert))
    assert (back.dtype, back.packed, back.nbytes) == (here.dtype, dtype, here.nbytes)


@pytest.mark.parametrize("experts", [1, 4, 16])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.4])
def test_few_tokens_are_multiplied_packed_and_many_are_not(
    density: float, experts: int, gpu: torch.device
) -> None:
    weight = torch.zeros(experts, 8, 100)
    weight[:, :, : round(100 * density)] = 1.0
    sliced = on(gpu, weight)
    answers = [sliced.is_faster(tokens) for tokens in range(1, 400)]
    assert answers == sorted(answers, reverse=True)
    # By hand: at 80% a token takes 0.47 of a dense product, and unpacking an expert 2.4.
    expected = {0.1: 2.2 / 0.31, 0.2: 2.4 / 0.47, 0.4: 2.8 / 0.79}[density] * experts
    assert sum(answers) == int(expected)
    dense = DeviceDense(weight.to(gpu))
    assert [dense.is_faster(tokens) for tokens in (1, experts, experts + 1)] == [True, True, False]

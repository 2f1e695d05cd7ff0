"""Input moments and the factor of a Gram's inverse: against NumPy in float64."""

import numpy as np
import pytest
import torch

from entangle.numerics.moments import ExpertMoments, InputMoments, inverse_factor, output_energy

SIZES = (1, 5, 128, 129, 300, 520)


def rows_of(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    rows: torch.Tensor = torch.randn(tokens, inputs, generator=generator) @ mixing
    return rows


def moments_of(rows: torch.Tensor) -> InputMoments:
    moments = InputMoments.zeros(rows.shape[1])
    moments.add(rows)
    return moments


@pytest.mark.parametrize("inputs", SIZES)
def test_the_gram_is_that_of_all_rows_and_symmetric(inputs: int) -> None:
    rows = rows_of(400, inputs)
    moments = InputMoments.zeros(inputs)
    for part in rows.split(150):
        moments.add(part)
    exact = rows.double().numpy()
    gram = moments.gram
    assert int(moments.count) == 400
    assert torch.equal(gram, gram.T)
    assert np.allclose(gram, exact.T @ exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(moments.squares, gram.diagonal())


def test_moments_add_up_in_any_dtype() -> None:
    rows = rows_of(200, 24)
    parts = [InputMoments.zeros(24), InputMoments.zeros(24)]
    parts[0].add(rows[:50])
    parts[1].add(rows[50:].double())
    merged = parts[0].merged(parts[1])
    assert int(merged.count) == 200
    assert torch.allclose(merged.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
    half = rows.bfloat16()
    assert torch.allclose(moments_of(half).gram, half.float().T @ half.float(), rtol=1e-4)


def test_experts_are_stacked() -> None:
    experts = [moments_of(rows_of(100 + seed, 24, seed)) for seed in range(3)]
    stacked = InputMoments.stack(experts)
    assert stacked.count.tolist() == [100, 101, 102]
    assert stacked.inputs == 24
    for place, moments in enumerate(experts):
        assert torch.equal(stacked.gram[place], moments.gram)
        assert torch.equal(stacked.squares[place], moments.squares)


def test_the_energy_is_that_of_the_outputs() -> None:
    rows, weight = rows_of(300, 24), torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    energy = output_energy(weight, moments_of(rows))
    outputs = rows.double() @ weight.double().T
    assert energy.dtype == torch.float64
    assert torch.allclose(energy, outputs.square().sum(dim=0), rtol=1e-5)
    both = output_energy(weight, InputMoments.stack([moments_of(rows), moments_of(2 * rows)]))
    assert torch.allclose(both[1], 4 * both[0], rtol=1e-5)


@pytest.mark.parametrize("inputs", SIZES)
def test_the_energy_needs_nothing_above_the_diagonal(inputs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [rows_of(200, inputs, seed) for seed in (0, 1, 2)]
    weight = torch.randn(3, 7, inputs, generator=generator)
    stacked = InputMoments.stack([moments_of(part) for part in rows])
    above = torch.ones(inputs, inputs).triu(1).bool()
    stacked.lower[:, above] = torch.nan
    energy = output_energy(weight, stacked)
    assert energy.shape == (3, 7)
    shared = output_energy(weight[0], stacked)  # one weight for all
    for place, part in enumerate(rows):
        outputs = part.double() @ weight.double().mT
        exact = outputs.square().sum(dim=1)
        assert torch.allclose(energy[place], exact[place], rtol=1e-5)
        assert torch.allclose(shared[place], exact[0], rtol=1e-5)
        alone = output_energy(weight[place], stacked.expert(place))
        assert torch.allclose(alone, exact[place], rtol=1e-5)


def test_the_energy_of_a_difference_orthogonal_to_the_inputs_is_all_but_zero() -> None:
    rows = rows_of(300, 24)
    rows[:, 23] = rows[:, 22]
    weight = torch.zeros(1, 24)
    weight[0, 22:] = torch.tensor([1000.0, -1000.0])
    weight[0, 3] = 1e-3
    lost = float(output_energy(weight, moments_of(rows)))
    assert lost == pytest.approx(float(rows[:, 3].double().square().sum()) * 1e-6, rel=1e-3)


# Of experts.


def test_the_moments_of_no_tokens_are_zero_and_apart() -> None:
    moments = InputMoments.zeros(5, experts=3)
    assert (moments.lower.shape, moments.lower.dtype) == ((3, 5, 5), torch.float32)
    assert (moments.count.shape, moments.count.dtype) == ((3,), torch.int64)
    assert (InputMoments.zeros(5).lower.shape, InputMoments.zeros(5).count.shape) == ((5, 5), ())
    assert not moments.lower.any()
    assert not moments.count.any()
    assert InputMoments.zeros(5, experts=2, device="meta").lower.device.type == "meta"


@pytest.mark.parametrize("inputs", [5, 300])
def test_what_is_added_to_an_expert_is_added_to_it_alone(inputs: int) -> None:
    moments = InputMoments.zeros(inputs, experts=3)
    rows = rows_of(40, inputs)
    moments.expert(1).add(rows[:30])
    moments.expert(1).add(rows[30:])
    moments.expert(2).add(rows[:7])
    assert moments.count.tolist() == [0, 40, 7]
    exact = rows.double().numpy()
    assert not moments.gram[0].any()
    assert np.allclose(moments.gram[1], exact.T @ exact, rtol=1e-4, atol=1e-3)
    assert np.allclose(moments.gram[2], exact[:7].T @ exact[:7], rtol=1e-4, atol=1e-3)
    assert torch.equal(moments.expert(2).gram, moments.gram[2])
    assert int(moments.expert(2).count) == 7


def stacked_moments(inputs: int = 24) -> tuple[InputMoments, list[torch.Tensor]]:
    rows = [rows_of(tokens, inputs, seed) for seed, tokens in enumerate((30, 200, 1, 70))]
    return InputMoments.stack([moments_of(part) for part in rows]), rows


def test_pooled_moments_are_those_of_all_rows() -> None:
    moments, rows = stacked_moments()
    pooled = moments.pooled()
    exact = torch.cat(rows).double().numpy()
    assert (int(pooled.count), pooled.count.shape) == (301, ())
    assert np.allclose(pooled.gram, exact.T @ exact, rtol=1e-4, atol=1e-3)
    assert moments.count.tolist() == [30, 200, 1, 70]


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 2.0])
def test_an_expert_without_tokens_gets_at_least_an_average_one(shrinkage: float) -> None:
    full = rows_of(50, 24, 0)
    moments = InputMoments.stack([moments_of(full), InputMoments.zeros(24)])
    exact = full.double().numpy().T @ full.double().numpy() / 50 * max(shrinkage * 24, 1)
    assert np.allclose(moments.shrunk(shrinkage).gram[1], exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 3.0, 0.06])
def test_shrinkage_adds_average_tokens_to_each_expert(shrinkage: float) -> None:
    moments, rows = stacked_moments()
    before = moments.gram.clone()
    shrunk = moments.shrunk(shrinkage)
    every = torch.cat(rows).double().numpy()
    average = every.T @ every / len(every)
    for place, part in enumerate(rows):
        exact = part.double().numpy().T @ part.double().numpy() + shrinkage * 24 * average
        assert np.allclose(shrunk.gram[place], exact, rtol=1e-4, atol=1e-3)
        assert int(shrunk.count[place]) == len(part) + round(shrinkage * 24)
    assert shrunk.count.dtype == torch.int64
    assert torch.equal(moments.gram, before)  # and what was shrunk is as it was
    assert moments.count.tolist() == [30, 200, 1, 70]
    if not shrinkage:
        assert torch.equal(shrunk.gram, before)


def by_sign(rows: torch.Tensor) -> torch.Tensor:
    """Route rows to three of four experts by two of their signs; the fourth gets none."""
    return (rows[:, 0] > 0).long() + (rows[:, 1] > 0.5).long()


@pytest.mark.parametrize(
    "sizes", [[1], [7, 1, 300], [4095, 1], [4096], [4097], [1500] * 9, [9000, 0, 5], [1] * 50, []]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_expert_has_the_moments_of_its_rows(sizes: list[int], dtype: torch.dtype) -> None:
    rows = rows_of(sum(sizes), 8).to(dtype)
    found = ExpertMoments(InputMoments.zeros(8, experts=4), by_sign)
    for part in rows.split(sizes):
        found.add(part)
    exact, chosen = rows.double().numpy(), by_sign(rows.float()).numpy()
    for _ in range(2):  # and asked again it has not counted twice
        moments = found.moments()
        assert moments.count.tolist() == np.bincount(chosen, minlength=4).tolist()
        for expert in range(4):
            own = exact[chosen == expert]
            assert np.allclose(moments.gram[expert], own.T @ own, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [100, 4096])
def test_more_rows_may_be_added_after_the_moments_were_seen(tokens: int) -> None:
    rows = rows_of(2 * tokens, 8)
    found = ExpertMoments(InputMoments.zeros(8, experts=4), by_sign)
    found.add(rows[:tokens])
    assert int(found.moments().count.sum()) == tokens
    found.add(rows[tokens:])
    own = rows[by_sign(rows) == 1].double()
    assert np.allclose(found.moments().gram[1], own.T @ own, rtol=1e-4, atol=1e-2)
    assert int(found.moments().count.sum()) == 2 * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_change_after_they_were_added_change_nothing(dtype: torch.dtype) -> None:
    rows = rows_of(5000, 8).to(dtype)
    found, buffer = ExpertMoments(InputMoments.zeros(8, experts=4), by_sign), torch.empty(500, 8)
    buffer = buffer.to(dtype)
    for part in rows.split(500):
        buffer.copy_(part)
        found.add(buffer)
        buffer.fill_(torch.nan)
    chosen = by_sign(rows.float())
    for expert in range(3):
        own = rows[chosen == expert].double()
        assert np.allclose(found.moments().gram[expert], own.T @ own, rtol=1e-4, atol=1e-2)


def test_rows_wait_until_there_are_some_thousands_and_no_longer() -> None:
    seen: list[int] = []

    def router(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return by_sign(rows)

    found = ExpertMoments(InputMoments.zeros(8, experts=4), router)
    for part in rows_of(9000, 8).split(300):
        found.add(part)
    assert seen == [4200, 4200]
    found.moments()
    found.moments()
    assert seen == [4200, 4200, 600]


def test_rows_of_a_graph_are_added_without_it() -> None:
    rows = rows_of(100, 8).requires_grad_()
    found = ExpertMoments(InputMoments.zeros(8, experts=4), by_sign)
    found.add(rows)
    assert not found.moments().lower.requires_grad


# The inverse factor.


@pytest.mark.parametrize("inputs", SIZES)
def test_the_factor_is_that_of_the_damped_inverse(inputs: int) -> None:
    gram = moments_of(rows_of(4 * inputs + 10, inputs)).gram
    found = inverse_factor(gram)
    exact = gram.double().numpy()
    hessian = exact + 0.01 * exact.diagonal().mean() * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T  # NumPy's is lower
    assert found.damping == 0.01
    assert np.allclose(np.triu(found.upper), found.upper)
    assert np.allclose(found.upper, upper, rtol=1e-3, atol=1e-3 * np.abs(upper).max())


def test_the_damping_ladder_is_finite() -> None:
    gram = moments_of(rows_of(200, 24)).gram
    mean = float(gram.diagonal().mean())
    lowest = float(torch.linalg.eigvalsh(gram)[0])

    def shifted(damping: float) -> torch.Tensor:  # so that its least eigenvalue is -damping * mean
        return gram - (lowest + damping * mean) * torch.eye(24)

    assert inverse_factor(shifted(0.005)).damping == 0.01
    assert inverse_factor(shifted(0.05)).damping == 0.1
    assert inverse_factor(shifted(0.3)).damping == 1.0
    for bad in (shifted(2.0), torch.zeros(24, 24)):
        with pytest.raises(ValueError, match=r"Gram of 24 inputs .*singular.*\b1 times"):
            inverse_factor(bad)


def test_an_input_that_is_always_zero_is_left_out_of_the_factor() -> None:
    rows = rows_of(200, 24)
    rows[:, [2, 9]] = 0
    factor = inverse_factor(moments_of(rows).gram)
    assert torch.isinf(factor.upper.diagonal()).nonzero().flatten().tolist() == [2, 9]
    assert torch.isfinite(factor.upper.triu(1)).all()
    assert factor.dead.nonzero().flatten().tolist() == [2, 9]

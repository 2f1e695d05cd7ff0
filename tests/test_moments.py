"""Input moments and the factor of a Gram's inverse: against NumPy in float64."""

import numpy as np
import pytest
import torch

from entangle.numerics.moments import InputMoments, inverse_factor, output_energy

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
        with pytest.raises(ValueError, match="singular, damped by up to 1 times its mean diagonal"):
            inverse_factor(bad)


def test_an_input_that_is_always_zero_is_left_out_of_the_factor() -> None:
    rows = rows_of(200, 24)
    rows[:, [2, 9]] = 0
    factor = inverse_factor(moments_of(rows).gram)
    assert torch.isinf(factor.upper.diagonal()).nonzero().flatten().tolist() == [2, 9]
    assert torch.isfinite(factor.upper.triu(1)).all()
    assert factor.dead.nonzero().flatten().tolist() == [2, 9]

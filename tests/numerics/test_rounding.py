"""Rounded weights are torch's fake quantisation of each group."""

import pytest
import torch

from entangle.numerics.rounding import GROUP, round_to_nearest, rounded_bytes


def truth(part: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise a group (weights,) by torch, with zero among its values."""
    low, high = float(part.min().clamp(max=0)), float(part.max().clamp(min=0))
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    return torch.fake_quantize_per_tensor_affine(part, scale, round(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [2 * GROUP, GROUP + 7, 5])
def test_each_group_is_rounded_by_itself(bits: int, inputs: int) -> None:
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(bits))
    weight[1] += 3  # all above zero
    found = round_to_nearest(weight, bits)
    for row, rounded in zip(weight, found, strict=True):
        for part, ours in zip(row.split(GROUP), rounded.split(GROUP), strict=True):
            assert torch.allclose(ours, truth(part, bits), atol=1e-6)
            assert len(ours.unique()) <= 2**bits
    assert (found - weight).abs().max() < 8 / 2**bits


def test_zeros_stay_and_types_too() -> None:
    weight = torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0
    weight[2] = 0
    found = round_to_nearest(weight.bfloat16(), 4)
    assert found.dtype == torch.bfloat16
    assert bool((found[:, ::2] == 0).all())
    assert bool((found[2] == 0).all())


def test_bytes_are_those_of_numbers_scales_and_zeros() -> None:
    assert rounded_bytes(10, 2 * GROUP, 8) == 10 * (128 + 2 * (2 + 1))
    assert rounded_bytes(2, GROUP + 1, 4) == 65 + 2 * 2 * 2 + 2

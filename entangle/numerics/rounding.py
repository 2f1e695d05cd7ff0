"""Rounding weights to a few bits, each to the nearest of its group's values (RTN)."""

import torch

GROUP = 64  # weights of a row that share a scale and a zero


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Return a weight (..., inputs) whose groups have 2^bits evenly spaced values each.

    The values of a group reach from its least weight to its largest, and zero is one of them. The
    scale is rounded to float16. The last group of a row may be smaller.
    """
    parts = [_rounded(part, bits) for part in weight.float().split(group, dim=-1)]
    return torch.cat(parts, dim=-1).to(weight.dtype)


def _rounded(part: torch.Tensor, bits: int) -> torch.Tensor:
    low = part.amin(dim=-1, keepdim=True).clamp(max=0)
    high = part.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    step = scale.where(scale > 0, 1)  # a group of zeros stays
    zero = (-low / step).round().clamp(0, 2**bits - 1)
    numbers = (part / step + zero).round().clamp(0, 2**bits - 1)
    rounded: torch.Tensor = (numbers - zero) * step
    return rounded


def rounded_bytes(rows: int, inputs: int, bits: int, group: int = GROUP) -> int:
    """Return the bytes of a rounded weight: its numbers, and a float16 scale and a zero per group."""
    groups = -(-inputs // group)
    return -(-rows * (inputs * bits + groups * (16 + bits)) // 8)

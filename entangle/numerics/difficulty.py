"""Mapping difficulty: how far apart a neuron sends inputs that lie close together.

Over pairs of tokens it is the mean of (|Δy| / median |Δy|) / (‖Δx‖ / max ‖Δx‖), as published in
"Sparse Expansion and Neuronal Disentanglement" (arXiv 2405.15756). The maximum, and with it every
difficulty, grows with the number of pairs; within a layer it is only a factor.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Difficulty:
    """The mapping difficulty of a layer's neurons; NaN for one with half its |Δy| zero."""

    difficulty: npt.NDArray[np.float64]  # (neurons,)
    pairs: int  # counted
    equal: int  # left out, since their inputs are equal


def mapping_difficulty(
    inputs: torch.Tensor, outputs: torch.Tensor, pairs: int, *, seed: int = 0
) -> Difficulty:
    """Return the difficulty of inputs (tokens, inputs) and outputs (tokens, neurons).

    Over ``pairs`` disjoint pairs of tokens drawn at random by ``seed``, fewer where the tokens do
    not suffice. Pairs with equal inputs are left out.

    Raises:
        ValueError: inputs and outputs of different tokens, or no pair asked for.
    """
    if len(inputs) != len(outputs) or pairs < 1:
        raise ValueError(
            f"expected at least one pair, and outputs for {len(inputs)} inputs, got {pairs} pairs "
            f"and outputs for {len(outputs)}"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    first, second = order[: len(order) // 2 * 2].to(inputs.device).view(-1, 2)[:pairs].unbind(1)
    apart = (inputs[first].double() - inputs[second].double()).norm(dim=1)  # (pairs,)
    differ = apart > 0
    apart, first, second = apart[differ], first[differ], second[differ]
    equal = len(differ) - len(apart)
    if not len(apart):
        return Difficulty(np.full(outputs.shape[1], np.nan), 0, equal)
    change = (outputs[first].double() - outputs[second].double()).abs()  # (pairs, neurons)
    ranked = change.sort(dim=0).values
    median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    mean = (change / apart[:, None]).mean(dim=0)
    difficulty = torch.where(median > 0, mean * apart.max() / median, torch.nan)
    return Difficulty(difficulty.cpu().numpy(), len(apart), equal)

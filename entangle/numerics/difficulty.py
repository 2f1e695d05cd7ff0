"""Mapping difficulty: how far apart the outputs of a neuron are for inputs that are close.

It is the mean over pairs of tokens of (|Δy| / median |Δy|) / (‖Δx‖ / max ‖Δx‖), as published in
"Sparse Expansion and Neuronal Disentanglement" (arXiv 2405.15756). The maximum, and with it every
difficulty, grows with the number of pairs. Within a layer the maximum is a common factor.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Difficulty:
    """The mapping difficulty of a layer's neurons; NaN where the median |Δy| is zero."""

    difficulty: npt.NDArray[np.float64]  # (neurons,)
    pairs: int  # number of pairs used
    equal: int  # number of pairs left out, since their inputs are equal


def mapping_difficulty(
    inputs: torch.Tensor, outputs: torch.Tensor, pairs: int, *, seed: int = 0
) -> Difficulty:
    """Return the difficulty of inputs (tokens, inputs) and outputs (tokens, neurons).

    It is computed from ``pairs`` disjoint random pairs of tokens, drawn with ``seed``, or from
    fewer if there are too few tokens. Pairs with equal inputs are left out.

    Raises:
        ValueError: the numbers of inputs and outputs differ, or ``pairs`` is below 1.
    """
    if len(inputs) != len(outputs):
        raise ValueError(
            f"expected inputs and outputs of the same tokens, got inputs of {len(inputs)} tokens "
            f"and outputs of {len(outputs)}"
        )
    if pairs < 1:
        raise ValueError(f"expected at least 1 pair of tokens, got {pairs}")
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

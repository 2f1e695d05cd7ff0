"""Reconstruction of a block: its pruned MLP is tuned until the hidden states are the dense model's.

A solver of one layer sees neither the nonlinearity behind the layer nor what the pruned blocks
before it have lost. So the weights that a block's MLP has kept are tuned together: the block's
inputs are the pruned model's hidden states, and the target is the dense model's hidden states
behind the block. Masks and routers stay as they are, and each token trains its own experts.

A token's squared error is divided by its target's square, since the next block normalises the
hidden states. Without this the few tokens with massive activations, such as the first of each
window, would be all that counts.

Sources: Shin et al., arXiv 2406.15524, section 3 (reconstruction of blocks, which adds up errors if
the inputs are dense); Kingma and Ba, arXiv 1412.6980 (Adam).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer
from entangle.model.text import TokenWindows
from entangle.model.tokenwise import layers_of_tokens
from entangle.runs.setup import Setup

EPOCHS = 4
RATE = 3e-2  # Adam's first rate, times the root mean square of a layer's kept weights
STEP = 512  # tokens of a step: fewer if there are few windows, more if a window has more
HELD_OUT = 16  # one of so many batches chooses the epoch and is not trained on


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The errors of a block before and after its reconstruction, on held-out tokens.

    They are means over tokens of ‖ŷ - y‖² / ‖y‖², where y and ŷ are the hidden states behind the
    block in the dense and in the pruned model.
    """

    before: float
    after: float


def step_size(windows: TokenWindows) -> int:
    """Return the number of windows in a step of Adam, which is one batch.

    Raises:
        ValueError: there is only one window.
    """
    if len(windows) < 2:
        raise ValueError(
            "reconstruct mlp needs at least two windows, since one is held out, but there is only "
            "one: use more windows, or a longer text"
        )
    return max(min(STEP // windows.length, len(windows) // HELD_OUT), 1)


def tuned_layers(setup: Setup) -> list[LinearLayer]:
    """Return the layers of a setup that reconstruction tunes: those that work on each token alone.

    Raises:
        ValueError: there is none, or there is only one window.
    """
    assert setup.windows is not None
    step_size(setup.windows)
    layers = layers_of_tokens(setup.model, setup.layers)
    if not layers:
        raise ValueError(
            "reconstruct mlp tunes layers that work on each token alone, but all layers that can be "
            f"pruned among {', '.join(setup.patterns)} are parts of attention, of something else that "
            "mixes tokens, or of trained experts, which are not tuned: choose other layers of the MLP, or "
            "use reconstruct none"
        )
    return layers


class Targets:
    """The dense model's hidden states behind each block, to which the pruned block is tuned."""

    def __init__(self, setup: Setup) -> None:
        """Begin before the first block of a model that is not pruned yet.

        Raises:
            ValueError: as `tuned_layers`.
        """
        assert setup.windows is not None
        self._layers = tuned_layers(setup)
        self._seed = setup.seed
        self.batch_size = step_size(setup.windows)
        self.dense = setup.walk(self.batch_size)

    def advance_past(self, block: int) -> None:
        """Run the block, which is still dense, unless its outputs are known."""
        if self.dense.block == block:
            self.dense.advance()

    def reconstructing(
        self, walk: BlockWalk, layers: Sequence[LinearLayer]
    ) -> Callable[[], Reconstruction] | None:
        """Return a function that tunes the walk's block; None if no layer of it is to be tuned."""
        own = [layer for layer in self._layers if layer in layers]
        if not own:
            return None
        return lambda: reconstruct(walk, self.dense.hidden, own, seed=self._seed)


def reconstruct(
    walk: BlockWalk,
    targets: Sequence[torch.Tensor],
    layers: Sequence[LinearLayer],
    *,
    seed: int,
) -> Reconstruction:
    """Tune the weights of these layers of the walk's block in place.

    The block is pruned. ``targets`` are the dense model's hidden states behind it (windows, length,
    width), of each of the walk's batches. Each of the layers works on its own token (see
    `layers_of_tokens`). Weights that are zero stay zero, and the others do not become zero. If no
    epoch lowers the held-out error, all stay as they are. A step takes one batch; under torchrun one
    of each process.

    Raises:
        ValueError: the hidden states are not finite.
    """
    tuned = _TunedBlock(walk, targets, layers)
    trained, held_out = _split(len(walk.hidden))
    order = np.random.default_rng([seed, walk.block, ranks.rank()])
    best = before = tuned.error(held_out)
    if not math.isfinite(before):
        raise ValueError(
            f"the hidden states behind block {walk.block} are not finite, so it cannot be "
            "reconstructed: try another dtype, or reconstruct none"
        )
    count = max(ranks.all_gather(len(trained)))
    rates = iter(np.linspace(1, 0, EPOCHS * count, endpoint=False))
    for _ in range(EPOCHS):
        shuffled = iter(order.permutation(len(trained)).tolist())
        for _ in range(count):
            place = next(shuffled, None)  # None: only other processes have a batch left
            tuned.step(None if place is None else trained[place], next(rates))
        error = tuned.error(held_out)
        if error < best:
            best = error
            tuned.keep()
    tuned.write()
    return Reconstruction(before, best)


def _split(batches: int) -> tuple[list[int], list[int]]:
    """Return the batches of this process that train, and those that choose the epoch."""
    total = sum(ranks.all_gather(batches))
    chosen = {*range(HELD_OUT - 1, total, HELD_OUT)} or {total - 1}
    held_out = [number in chosen for number in ranks.shard().batches(total)]
    numbers = range(batches)
    return [n for n in numbers if not held_out[n]], [n for n in numbers if held_out[n]]


class _TunedBlock:
    """A block with float32 copies of the weights that are tuned, and Adam's state for them."""

    def __init__(
        self, walk: BlockWalk, targets: Sequence[torch.Tensor], layers: Sequence[LinearLayer]
    ) -> None:
        block = walk.blocks[walk.block]
        self._walk, self._targets = walk, targets
        self._stored = {
            f"{layer.role}.weight": block.get_submodule(layer.role).get_parameter("weight")
            for layer in layers
        }
        with torch.inference_mode(False):
            self._weights = {
                name: stored.detach().to(torch.float32, copy=True).requires_grad_()
                for name, stored in self._stored.items()
            }
            self._pruned = {name: weight == 0 for name, weight in self._weights.items()}
        self._rates = {name: RATE * _kept_size(weight) for name, weight in self._weights.items()}
        groups = [{"params": [w], "name": name} for name, w in self._weights.items()]
        self._adam = torch.optim.Adam(groups, fused=True)
        self._best: dict[str, torch.Tensor] = {}

    def step(self, number: int | None, rate: float) -> None:
        """Take a step of Adam on a batch, or on none, and on those of the other processes."""
        with torch.inference_mode(False), torch.enable_grad():
            if number is not None:
                self._errors(number).sum().backward()
            for name, weight in self._weights.items():
                if weight.grad is None:  # no batch, or no token came here
                    weight.grad = torch.zeros_like(weight)
                ranks.all_reduce_sum_(weight.grad)
                weight.grad.masked_fill_(self._pruned[name], 0)
            for group in self._adam.param_groups:
                group["lr"] = rate * self._rates[group["name"]]
            self._adam.step()
            self._adam.zero_grad()

    def error(self, numbers: Sequence[int]) -> float:
        """Return the mean error of the counted tokens of some batches, of all processes."""
        total, tokens = 0.0, 0
        with torch.inference_mode(False), torch.no_grad():
            for number in numbers:
                errors = self._errors(number)
                total, tokens = total + float(errors.double().sum()), tokens + len(errors)
        every = ranks.all_gather((total, tokens))
        return sum(error for error, _ in every) / sum(count for _, count in every)

    def keep(self) -> None:
        """Keep the present weights, to be written at the end."""
        with torch.inference_mode(False):
            self._best = {name: w.detach().clone() for name, w in self._weights.items()}

    def write(self) -> None:
        """Write the weights that were kept last into the model."""
        for name, weight in self._best.items():
            ranks.broadcast_(weight, 0)
            stored = self._stored[name]
            stored.data.copy_(_without_new_zeros(weight, self._pruned[name], stored.dtype))

    def _errors(self, number: int) -> torch.Tensor:
        """Return each counted token's relative squared error (tokens,) in one batch."""
        used = {name: w.to(self._stored[name].dtype) for name, w in self._weights.items()}
        outputs = self._walk.run_with(number, used)
        rows = outputs.reshape(-1, outputs.shape[-1]).float()
        # Copies, since autograd cannot use tensors of inference mode.
        target = self._targets[number].to(rows.device, copy=True).reshape(rows.shape).float()
        counted = self._walk.counted[number].places.to(rows.device, copy=True)
        energy = target.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((rows - target).square().sum(dim=-1) / energy)[counted]


def _kept_size(weight: torch.Tensor) -> float:
    """Return the root mean square of the weights that are not zero; 0 if all are."""
    kept = max(int((weight != 0).sum()), 1)
    return math.sqrt(float(weight.detach().double().square().sum()) / kept)


def _without_new_zeros(
    weight: torch.Tensor, pruned: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight in a dtype; a kept weight that rounds to 0 becomes the least number there."""
    rounded = weight.to(dtype)
    return rounded.masked_fill_((rounded == 0) & ~pruned, torch.finfo(dtype).smallest_normal)

"""Choosing which inputs of a block's layers are zero, after its weights are pruned.

The thresholds are chosen with the block's own inputs dense: the block is pruned, and the blocks
before it are pruned and have sparse inputs. Zeros in a layer's inputs change those of the layers
behind it in the block a little, so their realised share may differ from what was asked. TEAL as
published takes thresholds from the dense model; then pruned layers, whose inputs have other sizes,
have other shares of zeros than asked.

The greedy steps are those of TEAL's code, which raises a layer's share by 0.05 / weight, where weight
is the layer's size over that of a query projection (width x width): a step is 5% of width x width
weights, where width is that of the block's hidden states. The error is its code's: the norm over
the tokens of a window, mean over windows and channels. These are different:

* the error is on all tokens (published: the last quarter of a window) of `TOKENS` tokens of the
  calibration, and the first of each window have dense inputs;
* the steps are shortened to add up to the share, and the share of a layer is at most 1 (published:
  either may be exceeded by a step);
* a layer's size is counted (published: a table by model), and in pruned layers only non-zero weights
  count, so a step is 5% of width x width weights of the layers' mean density.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, find_layers, naming, weight_of
from entangle.model.sparse_inputs import SparseInputs, counting_nonzero, sparsify_inputs
from entangle.numerics.input_rules import (
    Magnitudes,
    Rule,
    Threshold,
    column_norms,
    greedy_shares,
    top_inputs,
)
from entangle.pruning.costs import costs_of, multiply_adds_of_inputs
from entangle.pruning.options import Pruning

STEP = 0.05  # of the weights of a layer as wide as the block, as published
TOKENS = 2_048  # of the calibration, on which the errors of greedy steps are measured
NO_ROW: dict[str, Any] = {
    "input_share": 0.0,
    "input_threshold": math.nan,
    "realised_inputs": math.nan,
}


def choose_inputs(
    walk: BlockWalk, layers: Sequence[LinearLayer], pruning: Pruning
) -> dict[str, dict[str, Any]]:
    """Give layers of the walk's block sparse inputs, and move the walk past the block.

    Return, by the layer's name, what changes in its row of `Sparsified.layers`: the share that was
    asked of it, the realised share of zero inputs on the calibration tokens, and its costs.

    Raises:
        ValueError: the inputs are not finite.
    """
    walk.fetch()
    names = [layer.name for layer in layers]
    here = [layer for layer in find_layers(walk.model, names) if layer.block == walk.block]
    chosen = _Chooser(walk, here, pruning)
    shares = [pruning.input_sparsity] * len(here)
    if pruning.input_shares == "greedy" and len(here) > 1:
        chosen.begin()
        costs = list(map(costs_of, here))
        sizes = [cost["multiply_adds"] for cost in costs]
        density = sum(sizes) / sum(cost["dense_multiply_adds"] for cost in costs)
        step = STEP * density * walk.hidden[0].shape[-1] ** 2
        shares = greedy_shares(sizes, pruning.input_sparsity, chosen.error, step=step)
    rules = {one.name: chosen.rule(one, share) for one, share in zip(here, shares, strict=True)}
    hooks = sparsify_inputs(walk.model, rules)
    with counting_nonzero(walk.blocks[walk.block]):
        walk.advance()
        return {
            layer.name: {
                "input_share": share,
                "input_threshold": _threshold(rules[layer.name]),
                **_realised(layer, hooks[layer.name]),
            }
            for layer, share in zip(here, shares, strict=True)
        }


def _threshold(rule: Rule) -> float:
    return rule.value if isinstance(rule, Threshold) else math.nan


def _realised(layer: LinearLayer, hook: SparseInputs) -> dict[str, float]:
    """Return a layer's share of zero inputs and its multiply-adds, mean over the counted tokens."""
    nonzero = hook.nonzero + torch.zeros(layer.inputs, dtype=torch.int64)  # this rank may have none
    ranks.all_reduce_sum_(nonzero)
    kept = nonzero.double() / sum(ranks.all_gather(hook.tokens))
    return {
        "realised_inputs": 1 - float(kept.mean()),
        "multiply_adds": multiply_adds_of_inputs(layer, kept),
    }


def zero_inputs(layers: Sequence[LinearLayer], counted: Mapping[str, SparseInputs]) -> float:
    """Return the share of zero inputs that was counted (see `counting_nonzero`) in these layers.

    Layers are weighted by their numbers of weights. NaN if none has sparse inputs.
    """
    shares, sizes = [], []
    for layer in layers:
        if layer.name in counted:
            shares.append(_realised(layer, counted[layer.name])["realised_inputs"])
            sizes.append(layer.neurons * layer.inputs)
    pairs = zip(shares, sizes, strict=True)
    return sum(share * size for share, size in pairs) / sum(sizes) if sizes else math.nan


class _Chooser:
    """The rules of a block's layers for shares of zero inputs, and the block's error with them."""

    def __init__(self, walk: BlockWalk, layers: Sequence[LinearLayer], pruning: Pruning) -> None:
        self._walk, self._layers = walk, layers
        self._magnitudes: Mapping[str, Magnitudes] = {}
        self._norms: dict[str, torch.Tensor] = {}
        if pruning.inputs == "teal":
            self._magnitudes = _magnitudes(walk, layers)
        else:
            self._norms = {layer.name: column_norms(weight_of(layer)) for layer in layers}
        self._dense: dict[int, torch.Tensor] = {}
        self._hooks: dict[str, SparseInputs] = {}

    def rule(self, layer: LinearLayer, share: float) -> Rule:
        """Return a layer's rule for a share of zero inputs.

        Raises:
            ValueError: the inputs are not finite.
        """
        with naming(layer):
            if layer.name in self._norms:
                return top_inputs(self._norms[layer.name], share)
            return Threshold(self._magnitudes[layer.name].quantile(share))

    def begin(self) -> None:
        """Run the block with dense inputs, on the tokens that errors are measured on."""
        batches = len(self._walk.hidden)
        per_batch = self._walk.first[0].numel()
        count = min(max(round(TOKENS / per_batch / ranks.count()), 1), batches)
        numbers = [batches * place // count for place in range(count)]
        self._dense = {number: self._walk.run(number) for number in numbers}
        self._hooks = sparsify_inputs(self._walk.model, {one.name: None for one in self._layers})

    def error(self, shares: Sequence[float]) -> float:
        """Return the error of the block's outputs on these tokens, of all processes.

        It is the norm over the tokens of a window, summed over windows and channels. Published is
        the mean, which is this over a constant.
        """
        for layer, share in zip(self._layers, shares, strict=True):
            self._hooks[layer.name].rule = self.rule(layer, share) if share else None
        total = 0.0
        for number, dense in self._dense.items():
            lost = self._walk.run(number).float() - dense.float()  # (windows, length, width)
            total += float(lost.norm(dim=1).double().sum())
        return sum(ranks.all_gather(total))


def _magnitudes(walk: BlockWalk, layers: Sequence[LinearLayer]) -> dict[str, Magnitudes]:
    """Run the block, and return the histogram of each layer's inputs; those of first tokens are not in.

    Layers with the same inputs share theirs.
    """
    found: dict[str, Magnitudes] = {}
    seen: dict[str, int] = {}  # batches, by layer

    def on_inputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        batch = seen.get(layer.name, 0)
        seen[layer.name] = batch + 1
        later = ~walk.first[batch].flatten().cpu()[walk.counted[batch].places]
        found.setdefault(layer.name, Magnitudes()).add(rows[later.to(rows.device)])

    owners = walk.record_inputs(layers, on_inputs)
    for one in found.values():
        ranks.all_reduce_sum_(one.counts)
    return {layer.name: found[owners[layer.name]] for layer in layers}

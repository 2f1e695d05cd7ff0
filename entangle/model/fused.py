"""Trained experts whose matrices are fused: one parameter holds those of all experts of a block.

The matrices are found by structure. A module with a number of experts, ``num_experts``, has
parameters of three dimensions, the first of which is the expert, or of two, in which the experts'
rows follow each other. All of them but the last multiply hidden states, so their inputs are as many
as the model's width; the last one returns hidden states. These sizes tell whether a parameter has
(neurons, inputs) or is transposed, unless the module's attribute ``is_transposed`` says it; a
parameter alone has (neurons, inputs). If this guess is wrong for a model, a trial does not hear the
matrices (`hooks.unheard_layers`), and they are skipped.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_BIAS = "_bias"  # suffix of the parameter with the experts' biases
_EXPERTS = ("num_experts", "moe_num_experts")
# How configurations name the number of experts that a token is sent to.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")


class FusedMatrix(nn.Module):
    """One expert's matrix, a view of a parameter, which stands for a linear layer of the model.

    It is no part of the model. Its hooks run while the experts are heard (`eager.heard`); in that
    call ``tokens`` says which tokens of the batch its rows are.
    """

    owner: nn.Module  # it has the parameter
    scope: nn.Module  # the module around the owner, which sends tokens to experts
    among: "list[FusedMatrix]"  # all matrices in the scope

    def __init__(self, owner: nn.Module, scope: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        # Not as children: the model's modules are not this module's.
        vars(self).update(owner=owner, scope=scope, among=[])
        self.parameter = parameter  # its name in the owner
        self.expert = expert
        self.transposed = False  # whether the parameter has (inputs, neurons)
        self.share = 1.0  # of the tokens that an expert has on average
        self.tokens = torch.zeros(0, dtype=torch.int64)  # (rows,) indices in the batch
        self.batch = 0  # number of tokens of the batch, with those of other experts

    @property
    def stack(self) -> torch.Tensor:
        """The matrices of all experts, a view (experts, neurons, inputs)."""
        whole = self.owner.get_parameter(self.parameter).detach()
        whole = whole if whole.ndim == 3 else whole.unflatten(0, (_experts(self.owner), -1))
        return whole.mT if self.transposed else whole

    @property
    def weight(self) -> torch.Tensor:
        """The expert's matrix, a view (neurons, inputs)."""
        return self.stack[self.expert]

    @property
    def bias(self) -> torch.Tensor | None:
        """The expert's bias, a view (neurons,)."""
        whole = self.owner._parameters.get(self.parameter + _BIAS)
        return None if whole is None else whole.detach()[self.expert]

    def forward(self, inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """Return the outputs (rows, neurons) of inputs, which the model may have computed already."""
        return functional.linear(inputs, self.weight, self.bias) if outputs is None else outputs


def fused_matrices(owner: nn.Module, scope: nn.Module, config: Any) -> Iterator[FusedMatrix]:
    """Yield the matrices in a module's own parameters, expert after expert.

    ``config`` is that of the model's text decoder, which has the width of hidden states.
    """
    names = _stacks(owner)
    if not names:
        return
    transposed = _transposed(owner, names, getattr(config, "hidden_size", 0))
    share = min(_chosen(config) / _experts(owner), 1.0)
    for expert in range(_experts(owner)):
        for name in names:
            matrix = FusedMatrix(owner, scope, name, expert)
            matrix.transposed, matrix.share = transposed[name], share
            yield matrix


def fused_parameters(owner: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters that hold experts' matrices or their biases."""
    held = (owner._parameters.get(n) for name in _stacks(owner) for n in (name, name + _BIAS))
    return [parameter for parameter in held if parameter is not None]


def _experts(owner: nn.Module) -> int:
    """Return how many experts a module says that it has, 0 if it says nothing."""
    return next((n for n in map(vars(owner).get, _EXPERTS) if isinstance(n, int)), 0)


def _chosen(config: Any) -> float:
    """Return to how many experts a token is sent; infinite if the configuration does not say it."""
    for part in (config, getattr(config, "ffn_config", None)):
        for count in (getattr(part, name, None) for name in _CHOSEN):
            if isinstance(count, int):
                return count
    return math.inf


def _stacks(owner: nn.Module) -> list[str]:
    """Return the names of the parameters that hold experts' matrices.

    There are none if another parameter has a row for each expert, such as a bias of another name: what
    it does to the outputs is not known.
    """
    experts = _experts(owner)
    own = {name: one for name, one in owner._parameters.items() if one is not None}
    names = [name for name, one in own.items() if experts and _is_stack(one, experts)]
    others = own.keys() - {*names, *(name + _BIAS for name in names)}
    known = not any(own[name].ndim == 2 and len(own[name]) == experts for name in others)
    return names if known else []


def _is_stack(parameter: torch.Tensor, experts: int) -> bool:
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return False
    if parameter.ndim == 3:
        return len(parameter) == experts
    return parameter.ndim == 2 and len(parameter) > experts and len(parameter) % experts == 0


def _transposed(owner: nn.Module, names: list[str], width: int) -> dict[str, bool]:
    """Return, by a parameter's name, whether each expert has (inputs, neurons) there."""
    declared = getattr(owner, "is_transposed", None)
    if isinstance(declared, bool):
        return dict.fromkeys(names, declared)
    if len(names) == 1:  # nothing says whether it multiplies or returns hidden states
        return dict.fromkeys(names, False)
    told: dict[str, bool | None] = {}
    for name in names:
        *rows, columns = owner.get_parameter(name).shape
        first = rows[1] if len(rows) == 2 else rows[0] // _experts(owner)
        alike = (first == width) == (columns == width)  # a square tells nothing
        told[name] = None if alike else (first == width) != (name == names[-1])
    others = next((one for one in told.values() if one is not None), False)
    return {name: others if one is None else one for name, one in told.items()}

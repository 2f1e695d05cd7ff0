"""Layers whose inputs are sparse: a forward pre-hook sets most of a token's inputs to zero.

A hook and not a module around the layer, so that a layer keeps its name, its weight and its place in
files, whatever kind of layer it is: `layers.replace_layer` hands its hooks on when it is expanded or
packed. Each layer has a rule of its own, also where several receive the same inputs. The router of an
expanded layer reads the dense inputs.

The first token of each window keeps its inputs: it attends to itself alone, and models give it
activations unlike all others. No time is gained: the product is dense, with zeros in its inputs.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entangle.model.experts import Mixture
from entangle.model.hooks import entry_modules, first_tokens
from entangle.numerics.input_rules import Rule

INPUTS = "inputs.safetensors"  # in a model's folder: the rules
VARIANT = "sparse-inputs"  # in the names of the weights' files, so that transformers finds none


class RunningPass:
    """The first tokens of the running forward pass, one object for all layers of a model."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None  # (windows, length) bool
        self.handles: list[RemovableHandle] = []  # of all hooks, to remove them
        self._running: nn.Module | None = None

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a pass with the arguments of the outermost module.

        A pass that an interrupt cut off has ended, although torch calls no hook then.
        """
        if self._running is None or module is self._running or not _runs(self._running):
            self.first, self._running = first_tokens(module, args, kwargs), module

    def end(self, module: nn.Module, *_: Any) -> None:
        """End the pass if ``module`` began it."""
        if module is self._running:
            self.first = self._running = None


def _runs(module: nn.Module) -> bool:
    """Return whether a call of the module is on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


class SparseInputs:
    """The pre-hook of a layer that sets inputs to zero by a rule; without a rule none.

    While ``counting``, ``nonzero`` (inputs,) counts the inputs that are not zero, over ``tokens``.
    """

    def __init__(self, running: RunningPass, rule: Rule | None) -> None:
        self.running, self.rule = running, rule
        self.counting, self.tokens = False, 0
        self.nonzero = torch.zeros((), dtype=torch.int64)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the layer's arguments with sparse inputs.

        Raises:
            RuntimeError: the layer runs outside a forward pass of its model, or does not have one
                row for each token.
        """
        if self.rule is None:
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        first, width = self.running.first, inputs.shape[-1]
        if first is None or first.numel() * width != inputs.numel():
            raise RuntimeError(
                f"a layer with sparse inputs ran on a tensor of shape {tuple(inputs.shape)} "
                + (
                    "outside a forward pass of its model: call only the model"
                    if first is None
                    else f"in a batch of {first.numel()} tokens, so its rows are not tokens"
                )
            )
        spared = first.to(inputs.device).reshape(*inputs.shape[:-1], 1)
        sparse = torch.where(self.rule.keep(inputs) | spared, inputs, 0)
        if self.counting:
            self.nonzero = self.nonzero + (sparse != 0).reshape(-1, width).sum(dim=0).cpu()
            self.tokens += first.numel()
        return (sparse,), {"routed_by": inputs} if isinstance(module, Mixture) else {}


def input_hooks(model: nn.Module) -> dict[str, SparseInputs]:
    """Return the pre-hooks of the layers with sparse inputs, by the layer's name."""
    return {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SparseInputs)
    }


def rule_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the rules of a model's layers as tensors; the name is that of the layer and its own."""
    return {
        f"{name} {key}": value
        for name, hook in input_hooks(model).items()
        if hook.rule is not None
        for key, value in hook.rule.tensors().items()
    }


def sparsify_inputs(
    model: PreTrainedModel, rules: Mapping[str, Rule | None]
) -> dict[str, SparseInputs]:
    """Give layers of these names sparse inputs by these rules, and return their hooks.

    Raises:
        AttributeError: the model has no layer of a name.
    """
    modules = {name: model.get_submodule(name) for name in rules}
    hooks = input_hooks(model)
    running = next((hook.running for hook in hooks.values()), None)
    if running is None and rules:
        running = RunningPass()
        for module in entry_modules(model):
            running.handles += [
                module.register_forward_pre_hook(running.begin, with_kwargs=True),
                module.register_forward_hook(running.end, always_call=True),
            ]
    for name, rule in rules.items():
        if name not in hooks:
            assert running is not None
            hooks[name] = SparseInputs(running, rule)
            handle = modules[name].register_forward_pre_hook(hooks[name], with_kwargs=True)
            running.handles.append(handle)
        hooks[name].rule = rule
    return {name: hooks[name] for name in rules}


def densify_inputs(model: PreTrainedModel) -> None:
    """Give all layers of a model dense inputs again."""
    for running in {hook.running for hook in input_hooks(model).values()}:
        for handle in running.handles:
            handle.remove()


@contextmanager
def first_tokens_are(module: nn.Module, first: torch.Tensor) -> Iterator[None]:
    """Let a part of a model run by itself: ``first`` (windows, length) are its windows' first tokens."""
    passes = {hook.running for hook in input_hooks(module).values()}
    try:
        for running in passes:
            running.first = first
        yield
    finally:
        for running in passes:
            running.first = None


@contextmanager
def counting_nonzero(model: nn.Module) -> Iterator[dict[str, SparseInputs]]:
    """Count the inputs that are not zero in layers with sparse inputs, and yield the hooks by name.

    The hooks keep the counts.
    """
    hooks = input_hooks(model)
    try:
        for hook in hooks.values():
            hook.counting, hook.tokens = True, 0
            hook.nonzero = torch.zeros((), dtype=torch.int64)
        yield hooks
    finally:
        for hook in hooks.values():
            hook.counting = False

"""The linear layers of any causal language model, found by structure and not by name.

Here a weight is always ``(neurons, inputs)``, however the module stores it, and that of an expanded
layer is ``(experts, neurons, inputs)``. Outputs are ``(tokens, neurons)``.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.model.experts import ExpertLinear, PackedLinear
from entangle.model.fused import FusedMatrix, fused_matrices, fused_parameters
from entangle.model.patterns import as_list, chosen, unmatched

if TYPE_CHECKING:  # the import takes seconds, and some commands need no model
    from transformers import PreTrainedModel

_LINEAR = (nn.Linear, Conv1D, ExpertLinear)
# Where torch keeps a module's hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """One linear layer inside a transformer block."""

    name: str  # dotted name in the model: model.layers.5.mlp.up_proj
    block: int
    role: str  # dotted name in the block: mlp.up_proj
    module: nn.Module = dataclasses.field(repr=False, compare=False)
    side: ClassVar[str] = "output"  # where it is recorded, a layer stands for its outputs

    @property
    def neurons(self) -> int:
        """The number of outputs."""
        return self._size[0]

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return self._size[1]

    @property
    def _size(self) -> tuple[int, int]:
        if is_plain(self.module):
            neurons, inputs = weight_of(self).shape[-2:]
            return neurons, inputs
        module: Any = self.module  # quantised: the weight may have any shape
        return module.out_features, module.in_features


def weight_of(layer: LinearLayer) -> torch.Tensor:
    """Return a view of the layer's weight as ``(neurons, inputs)``; GPT-2's Conv1D is transposed.

    The weight of an expanded layer is ``(experts, neurons, inputs)``.
    """
    weight = layer.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if isinstance(layer.module, Conv1D) else weight.detach()


def parameter_of(layer: LinearLayer) -> tuple[nn.Module, str]:
    """Return the module whose parameter holds the layer's weight, and the parameter's name in it.

    The parameter of a trained expert has the weights of the other experts too.
    """
    module = layer.module
    if isinstance(module, FusedMatrix):
        return module.owner, module.parameter
    return module, "weight"


def dequantised(layer: LinearLayer) -> torch.Tensor | None:
    """Return the layer's weight as floats (see `weight_of`), or None if torch cannot decode it."""
    weight = getattr(layer.module, "weight", None)
    if is_plain(layer.module):
        return weight_of(layer)
    # Every tensor has this method, but only classes with a method of their own decode their codes.
    if getattr(type(weight), "dequantize", None) in {None, torch.Tensor.dequantize}:
        return None
    assert isinstance(weight, torch.Tensor)
    numbers: torch.Tensor = weight.dequantize().detach()
    return numbers if numbers.shape == (layer.neurons, layer.inputs) else None


def device_of(layer: LinearLayer) -> torch.device:
    """Return the device of a layer's weight, quantised or not."""
    module = layer.module
    if isinstance(module, FusedMatrix):
        return module.weight.device
    held = (*module.parameters(), *module.buffers())
    return held[0].device if held else torch.device("cpu")


def is_plain(module: nn.Module) -> bool:
    """Return whether a module's weight holds its numbers, and is not quantised."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or type(weight) not in {nn.Parameter, torch.Tensor}:
        return False
    return weight.is_floating_point() and weight.element_size() > 1


def write_weight(layer: LinearLayer, weight: torch.Tensor) -> None:
    """Write a weight ``(neurons, inputs)`` into the layer, in place."""
    weight_of(layer).copy_(weight)


def replace_layer(model: "PreTrainedModel", layer: LinearLayer, module: nn.Module) -> LinearLayer:
    """Replace the layer's module in the model, and return the new layer; it keeps its hooks.

    The module of a trained expert's matrix is no part of the model, and stays.
    """
    if module is layer.module and isinstance(module, FusedMatrix):
        return layer
    parent, _, leaf = layer.name.rpartition(".")
    vars(module).update({name: vars(layer.module)[name] for name in _HOOKS})
    setattr(model.get_submodule(parent), leaf, module)
    return dataclasses.replace(layer, module=module)


def find_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the model's transformer blocks.

    It is the list nearest to the embedding of the text's tokens: a vision encoder may have as many
    blocks.

    Raises:
        ValueError: the model is packed, has an adapter or no configuration (a wrapper such as
            DataParallel), or has no list of as many modules with linear layers as
            ``num_hidden_layers``.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            f"expected a model of transformers, got {type(model).__name__}: pass the transformers "
            "model that it wraps"
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(
            "the model's layers are packed, and a packed model can only run: load it with "
            "packed=False to measure, prune or save it"
        )
    if _has_adapter(model):
        raise ValueError(
            "the model has an adapter beside its weights: merge it into them first (in peft: "
            "model = model.merge_and_unload()), save the model, and use that"
        )
    count = _depth(model)
    inside = decoder_of(model)
    within = {id(module) for module in inside.modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in within and isinstance(module, nn.ModuleList) and _are_blocks(module, count)
    ]
    if not lists:
        raise ValueError(
            f"found no list of {count} transformer blocks (num_hidden_layers) in "
            f"{type(model).__name__}: give a causal language model of transformers"
        )
    return min(lists, key=lambda one: one[0].count("."))


def _has_adapter(model: "PreTrainedModel") -> bool:
    """Return whether peft wraps the model (prompts, prefixes) or its layers (LoRA, IA3)."""
    wrapped = type(model).__module__.partition(".")[0] == "peft"
    return wrapped or any(
        isinstance(getattr(module, "base_layer", None), nn.Module) for module in model.modules()
    )


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """Return the text decoder: the smallest module with both the token embedding and the blocks.

    `get_decoder` of transformers is not asked: some models return their output layer.
    """
    count, embedding = _depth(model), _embedding(model)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    name = names.get(id(embedding), "")
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if any(_are_blocks(module, count) for module in around.modules()):
            return around
    return model


def _depth(model: "PreTrainedModel") -> int | None:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "num_hidden_layers", None)


def _embedding(model: "PreTrainedModel") -> nn.Module | None:
    try:
        found: nn.Module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # some models have none
        return None
    return found


def _are_blocks(module: nn.Module, count: int | None) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) != count:
        return False
    return all(any(map(_is_linear, block.modules())) for block in module)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: of our classes, or of a quantisation's.

    Quantised classes have no base class in common, but "Linear" in their names, and both sizes.
    """
    if isinstance(module, _LINEAR):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    sized = "Linear" in type(module).__name__ and all(isinstance(size, int) for size in sizes)
    return sized and not any(isinstance(inner, nn.Linear) for inner in module.modules())


def find_layers(
    model: "PreTrainedModel",
    patterns: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
) -> list[LinearLayer]:
    """Return the linear layers in the model's blocks that match any pattern, in model order.

    A pattern is a layer's exact name or a shell pattern such as ``*.mlp.up_proj``. Layers that
    match one in ``exclude`` are left out. The output embedding is outside the blocks, so it is not
    a layer.

    Raises:
        LookupError: a pattern matches no layer (the message names near matches), or all layers
            that match are excluded.
    """
    patterns, exclude = as_list(patterns), as_list(exclude)
    layers = list(_walk(model))
    names = [layer.name for layer in layers]
    wrong = unmatched(names, (*patterns, *exclude))
    if wrong is not None:
        raise LookupError(_no_match(wrong, layers))
    return list(itertools.compress(layers, chosen(names, patterns, exclude)))


def linear_layers(model: "PreTrainedModel") -> list[LinearLayer]:
    """Return all linear layers of a model that may be packed, but for the output embedding.

    Their blocks and roles are unknown: `find_layers` tells them of a model that is not packed.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [
        LinearLayer(name, -1, name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head
    ]


def trained_experts(model: "PreTrainedModel") -> list[LinearLayer]:
    """Return the matrices of a model's trained experts; none of a packed model."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        return []
    return [layer for layer in _walk(model) if isinstance(layer.module, FusedMatrix)]


def _walk(model: "PreTrainedModel") -> Iterator[LinearLayer]:
    prefix, blocks = find_blocks(model)
    config = model.config.get_text_config(decoder=True)
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        around: dict[nn.Module, list[FusedMatrix]] = {}
        for role, module in modules.items():
            if _is_linear(module):
                yield LinearLayer(f"{prefix}.{index}.{role}", index, role, module)
            scope = modules[role.rpartition(".")[0]] if "." in role else module
            for matrix in fused_matrices(module, scope, config):
                matrix.among = around.setdefault(scope, [])
                matrix.among.append(matrix)
                name = f"{role}.{matrix.expert}.{matrix.parameter}"
                yield LinearLayer(f"{prefix}.{index}.{name}", index, name, matrix)


def _no_match(pattern: str, layers: Sequence[LinearLayer]) -> str:
    roles = sorted({_role(layer) for layer in layers})
    candidates = [layer.name for layer in layers] + [f"*.{role}" for role in roles]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}; " if near else ""
    return (
        f"no layer matches {pattern!r}; {hint}layers are named like {layers[0].name}, "
        f"with the roles {', '.join(roles)}"
    )


def _role(layer: LinearLayer) -> str:
    """Return a layer's role, of trained experts with ``*`` for the expert, which may be hundreds."""
    module = layer.module
    if not isinstance(module, FusedMatrix):
        return layer.role
    return layer.role.removesuffix(f"{module.expert}.{module.parameter}") + f"*.{module.parameter}"


def skipped_parameters(model: "PreTrainedModel") -> list[str]:
    """Return the names of parameters in the blocks that belong to no layer, such as fused experts.

    Only parameters of two or more dimensions are listed. Commands that measure or prune print them,
    so that nothing is skipped silently.
    """
    prefix, blocks = find_blocks(model)
    linear = {id(p) for layer in _walk(model) for p in layer.module.parameters()}
    linear |= {id(p) for module in blocks.modules() for p in fused_parameters(module)}
    return [
        f"{prefix}.{name}"
        for name, parameter in blocks.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in linear
    ]


@contextmanager
def naming(layer: LinearLayer) -> Iterator[None]:
    """Prefix the message of a ValueError with the layer's name.

    Raises:
        ValueError: the body raised one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error

"""What is recorded of a layer: its outputs, for which the layer itself stands, or its inputs.

The inputs of a layer are named LAYER:input, and an input channel LAYER:input:INDEX. No attribute of
a module can have a colon in its name, so in practice no layer has such a name; if one does,
`find_inputs` raises an error.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, find_layers
from entangle.model.patterns import INPUT, as_list, chosen, unmatched

if TYPE_CHECKING:  # the import takes seconds, and some commands need no model
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The inputs of a linear layer, to be recorded as the outputs of others are."""

    layer: LinearLayer
    side: ClassVar[str] = "input"

    @property
    def name(self) -> str:
        """The layer's name with the suffix: model.layers.5.mlp.down_proj:input."""
        return self.layer.name + INPUT

    @property
    def block(self) -> int:
        """The index of the layer's block."""
        return self.layer.block

    @property
    def role(self) -> str:
        """The layer's role with the suffix: mlp.down_proj:input."""
        return self.layer.role + INPUT

    @property
    def neurons(self) -> int:
        """The number of input channels; each has a histogram, as a neuron has."""
        return self.layer.inputs


Recordable = LinearLayer | LayerInputs
_Recordable = TypeVar("_Recordable", LinearLayer, LayerInputs, Recordable)


def layer_of(one: Recordable) -> LinearLayer:
    """Return the layer whose outputs or inputs are recorded."""
    return one.layer if isinstance(one, LayerInputs) else one


def stack_of(one: Recordable) -> object:
    """Return the same object for all experts of a parameter: with it, one side of their matrices.

    It is None for layers that are not of trained experts.
    """
    module = layer_of(one).module
    return (module.owner, module.parameter, one.side) if isinstance(module, FusedMatrix) else None


def find_inputs(
    model: "PreTrainedModel", patterns: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> list[LayerInputs]:
    """Return the inputs of the layers that match any pattern, in model order.

    ``exclude`` is compared with the names of the inputs: ``*.5.*`` matches those of block 5, and
    ``*.down_proj`` none, since they end in ``:input``.

    Raises:
        LookupError: a pattern matches no layer, or all inputs are excluded.
        ValueError: the model has a layer with the name of another layer's inputs.
    """
    found = [LayerInputs(layer) for layer in find_layers(model, patterns)]
    taken = {layer.name for layer in find_layers(model)} & {one.name for one in found}
    if taken:
        raise ValueError(
            f"the model has a layer {min(taken)}, which is the name of another layer's inputs: leave "
            f"{min(taken).removesuffix(INPUT)} out of the input layers"
        )
    kept = chosen([one.name for one in found], ["*"], as_list(exclude)) if found else []
    return [one for one, keep in zip(found, kept, strict=True) if keep]


def find_channel(layers: Sequence[LinearLayer], name: str) -> tuple[Recordable, int]:
    """Return the layer of a neuron LAYER:INDEX, or the inputs of LAYER:input:INDEX, and the index.

    Raises:
        LookupError: there is no such neuron or input channel.
    """
    place, _, index = name.rpartition(":")
    layer = next((one for one in layers if one.name == place.removesuffix(INPUT)), None)
    if layer is None:
        names = [one.name for one in layers]
        near = difflib.get_close_matches(place.removesuffix(INPUT) or name, names, 1, 0.3)
        side, number = INPUT * place.endswith(INPUT), index if index.isdigit() else "0"
        close = f"{[*near, *names, 'LAYER'][0]}{side}:{number}"
        raise LookupError(f"no neuron {name!r}: expected LAYER:INDEX, such as {close}")
    found: Recordable = LayerInputs(layer) if place.endswith(INPUT) else layer
    if not (index.isascii() and index.isdigit() and int(index) < found.neurons):
        raise LookupError(
            f"no neuron {name!r}: {place} has {found.neurons:,} {found.side}s, 0 to "
            f"{found.neurons - 1}"
        )
    return found, int(index)


def find_both(
    model: "PreTrainedModel",
    layers: str | Sequence[str],
    input_layers: str | Sequence[str],
    exclude: str | Sequence[str] = (),
) -> tuple[list[LinearLayer], list[LayerInputs]]:
    """Return the layers that match ``layers``, and the inputs of those that match ``input_layers``.

    A pattern in ``exclude`` may match layers, the names of inputs, or both.

    Raises:
        LookupError: as `find_layers`, and as `find_inputs`.
        ValueError: as `find_inputs`.
    """
    inputs = [one.name for one in find_inputs(model, input_layers)]
    names = [layer.name for layer in find_layers(model)]
    of_layers = [  # all but those of inputs alone
        pattern
        for pattern in as_list(exclude)
        if unmatched(names, [pattern]) is None or unmatched(inputs, [pattern])
    ]
    return find_layers(model, layers, of_layers), find_inputs(model, input_layers, exclude)


def without_skipped(
    found: Sequence[_Recordable], skipped: Mapping[str, str], names: Sequence[str]
) -> list[_Recordable]:
    """Return those that are not skipped; ``skipped`` has the reasons by name.

    Raises:
        ValueError: all are skipped, or ``names`` has one that is.
    """
    left = [one for one in found if one.name not in skipped]
    for one in found:
        if one.name in skipped and one.name in names:
            raise ValueError(
                f"{one.name} cannot be used: {skipped[one.name]}. Leave it out with exclude, or name "
                "other layers"
            )
    if found and not left:
        name = found[0].name
        raise ValueError(
            f"none of the {len(found)} layers that match can be used, for example {name}: "
            f"{skipped[name]}"
        )
    return left


def in_order(layers: Iterable[LinearLayer], inputs: Iterable[LayerInputs]) -> list[Recordable]:
    """Return what is recorded block by block, the outputs of a block before its inputs."""
    found: list[Recordable] = [*layers, *inputs]
    return sorted(found, key=lambda one: one.block)


def by_block(found: Iterable[_Recordable]) -> dict[int, list[_Recordable]]:
    """Return layers, or what is recorded of them, by block; blocks without any are left out."""
    blocks: dict[int, list[_Recordable]] = {}
    for one in found:
        blocks.setdefault(one.block, []).append(one)
    return blocks


def inputs_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the inputs among the arguments of a layer's call, whatever their name is."""
    return args[0] if args else next(iter(kwargs.values()))


def listen(one: Recordable, hear: Callable[[Any], None]) -> RemovableHandle:
    """Call ``hear`` with the layer's outputs, or its inputs, whenever it runs; return the hook."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hear(inputs_among(args, kwargs))

    def after(_: nn.Module, __: Any, outputs: torch.Tensor) -> None:
        hear(outputs)

    if isinstance(one, LayerInputs):
        return one.layer.module.register_forward_pre_hook(before, with_kwargs=True)
    return one.module.register_forward_hook(after)

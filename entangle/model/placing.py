"""Offloading for models that are larger than their device: weights in files, read by block.

accelerate's hooks read a module's weights each time that it runs, so once per batch. Here a
block's weights are read once, stay on the device for all batches, and are released.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.layers import LinearLayer, find_blocks, parameter_of


def is_offloaded(model: nn.Module) -> bool:
    """Return whether some weights of a model are offloaded to files."""
    return any(True for _ in _offloading(model))


def is_whole(model: nn.Module) -> bool:
    """Return whether each weight of a model is on a device or in a file."""
    known = {id(p) for module, _ in _offloading(model) for p in module.parameters(recurse=False)}
    return all(not p.is_meta or id(p) in known for p in model.parameters())


def check_in_memory(model: nn.Module, action: str) -> None:
    """Check that no weights of a model are in files.

    ``action`` begins the error message.

    Raises:
        ValueError: some are.
    """
    if is_offloaded(model):
        raise ValueError(f"{action} needs the whole model in memory: load it without offload")


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model's tokens must be on.

    It is that of the first parameter on a device, or, if all are in files, that of the first hook.
    """
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device(next(hook.execution_device for _, hook in _offloading(model)))


def blocks_in_files(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Return a device map for accelerate: the blocks on disk, all other modules on ``device``.

    The model may be empty, with all weights on the meta device.
    """
    prefix, blocks = find_blocks(model)
    places: dict[str, Any] = {f"{prefix}.{index}": "disk" for index in range(len(blocks))}
    module: nn.Module = model
    path = ""
    for step in prefix.split("."):
        for name, _ in module.named_children():
            if name != step:
                places[path + name] = str(device)
        module, path = module.get_submodule(step), f"{path}{step}."
    return places


def load_block(block: nn.Module) -> None:
    """Read a block's offloaded weights onto its device, until `release_block` releases them."""
    for module, hook in _offloading(block):
        if hook.offload:
            hook.pre_forward(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "cpu":  # a memory map of the file: copy it
                    module.get_parameter(name).data = parameter.data.clone()
            hook.offload = False  # otherwise the hook reads them again for each batch
            hook.fetched = True


def release_block(block: nn.Module) -> None:
    """Release the weights that `load_block` read; changes are lost unless `read_weight_from` names their file."""
    fetched = [(module, hook) for module, hook in _offloading(block) if not hook.offload]
    for module, hook in fetched:
        hook.offload = True
        hook.post_forward(module, None)
    if fetched:
        # The C library does not return freed memory that lies between live allocations: without
        # this call the process grew by half a block each time.
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # only glibc has it


def bytes_of_block(model: PreTrainedModel) -> int:
    """Return the size of the largest block in bytes: the weights that are in memory at once."""
    _, blocks = find_blocks(model)
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)


def read_weight_from(layer: LinearLayer, file: Path, name: str) -> None:
    """Read a layer's weight from the tensor ``name`` of a safetensors file from now on.

    For a trained expert it is the whole parameter, with the weights of the other experts. A layer that
    is not offloaded is left as it is.

    Raises:
        ValueError: the layer is offloaded, but not by `load_model`.
    """
    holder, parameter = parameter_of(layer)
    for module, hook in _offloading(holder):
        if parameter not in module._parameters:
            continue
        loader, key = hook.weights_map, parameter
        while hasattr(loader, "prefix"):  # accelerate's view of one module's weights
            loader, key = loader.dataset, loader.prefix + key
        if not hasattr(loader, "index"):
            raise ValueError(
                f"{layer.name} was not offloaded by load_model: load the model with load_model"
            )
        dtype = str(module.get_parameter(parameter).dtype).removeprefix("torch.")
        loader.index[key] = {"safetensors_file": str(file), "weight_name": name, "dtype": dtype}
        loader.state_dict.pop(key, None)  # the weight on the host, which would be read first


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters sorted by name, tied ones once; those in files are read one at a time."""
    where = {id(p): (m, h) for m, h in _offloading(model) for p in m.parameters(recurse=False)}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta and id(parameter) in where:
            _, hook = where[id(parameter)]
            yield name, hook.weights_map[name.rpartition(".")[2]]
        else:
            yield name, parameter.detach()


def stored_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors besides parameters that a model's files hold, sorted by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in sorted(model.state_dict().items()):
        if name not in parameters and isinstance(value, torch.Tensor):
            yield name, value


def _offloading(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the modules whose weights are in files, with the hooks that read them."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) or getattr(one, "fetched", False):
                yield module, one

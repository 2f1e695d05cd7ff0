"""Where the weights of a model are that is larger than its device: in files, block after block.

accelerate's hooks read a module's weights each time that it runs. For many batches that is many
times; here a block's are fetched once, stay while all batches run, and are given back.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.layers import LinearLayer, find_blocks


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether some weights of a model are in files, to be read when they are needed."""
    return any(True for _ in _offloading(model))


def is_whole(model: nn.Module) -> bool:
    """Tell whether all weights of a model are somewhere: on a device or in files."""
    known = {id(p) for module, _ in _offloading(model) for p in module.parameters(recurse=False)}
    return all(not p.is_meta or id(p) in known for p in model.parameters())


def check_in_memory(model: nn.Module, deed: str) -> None:
    """See that a model's weights are not in files.

    Raises:
        ValueError: they are.
    """
    if is_offloaded(model):
        raise ValueError(f"{deed} needs the whole model in memory: load it without offload")


def home_of(model: nn.Module) -> torch.device:
    """Return the device of the first weights that are on one: where a model takes its tokens."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device(next(hook.execution_device for _, hook in _offloading(model)))


def blocks_in_files(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Return a device map for accelerate: the blocks of an empty model in files, all else there."""
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


def fetch(block: nn.Module) -> None:
    """Have the weights of a block on its device until `give_back`; elsewhere they stay as they are."""
    for module, hook in _offloading(block):
        if hook.offload:
            hook.pre_forward(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "cpu":  # a part of a file until it is copied
                    module.get_parameter(name).data = parameter.data.clone()
            hook.offload = False  # else it would read them again for each batch
            hook.fetched = True


def give_back(block: nn.Module) -> None:
    """Let go of the weights that `fetch` fetched: of those that were changed, see `keep`."""
    fetched = [(module, hook) for module, hook in _offloading(block) if not hook.offload]
    for module, hook in fetched:
        hook.offload = True
        hook.post_forward(module, None)
    if fetched:
        # The C library keeps what is freed between other things: it grew by half a block each time.
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # of glibc, and no other


def bytes_of_block(model: PreTrainedModel) -> int:
    """Return how much the largest of a model's blocks weighs: what has to be in memory at once."""
    _, blocks = find_blocks(model)
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)


def keep(layer: LinearLayer, file: Path, name: str) -> None:
    """Have a layer's weight read from a tensor of a safetensors file from now on.

    Raises:
        ValueError: it is offloaded, but not as `load_model` does it.
    """
    for module, hook in _offloading(layer.module):
        loader, key = hook.weights_map, "weight"
        while hasattr(loader, "prefix"):  # accelerate's view of one module's part
            loader, key = loader.dataset, loader.prefix + key
        if not hasattr(loader, "index"):
            raise ValueError(f"{layer.name} is offloaded by hand: load the model with load_model")
        dtype = str(module.get_parameter("weight").dtype).removeprefix("torch.")
        loader.index[key] = {"safetensors_file": str(file), "weight_name": name, "dtype": dtype}
        loader.state_dict.pop(key, None)  # of a model on the host, which would come first


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return all parameters in the order of their names, tied ones once, each read in its turn."""
    where = {id(p): (m, h) for m, h in _offloading(model) for p in m.parameters(recurse=False)}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta and id(parameter) in where:
            _, hook = where[id(parameter)]
            yield name, hook.weights_map[name.rpartition(".")[2]]
        else:
            yield name, parameter.detach()


def _offloading(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Return the modules whose weights are in files, with the hooks that read them."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) or getattr(one, "fetched", False):
                yield module, one

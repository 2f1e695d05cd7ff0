"""Expanded models on disk, as self-contained folders with packed experts, and packing in memory.

Beside config and tokenizer the folder holds ``dense.safetensors`` (the weights outside the expanded
layers), ``experts/BLOCK.safetensors`` (the packed experts of a block) and ``expansion.json`` (the
expanded layers, and the SHA-256 sums of these files). transformers does not use these names, so it
fails to load the folder instead of initialising missing weights at random.
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from entangle.model import folders
from entangle.model.classes import class_of
from entangle.model.experts import ExpertLinear, Packed, PackedLinear, pack, unpack
from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, find_layers, is_plain, replace_layer, weight_of
from entangle.model.placing import stored_buffers, stored_parameters
from entangle.model.prunable import multiplies
from entangle.model.sparse_inputs import INPUTS
from entangle.numerics.device_weights import LEAST_ZEROS
from entangle.numerics.processors import kernels_of
from entangle.numerics.routing import Router, router_of
from entangle.numerics.sparse import PACKABLE

DENSE, EXPANSION = "dense.safetensors", "expansion.json"
GENERATION = "generation_config.json"
_FORMAT = 1
_SPARSE_INPUTS = _FORMAT + 1  # with a file of rules, which older versions would not read

Tensors = dict[str, torch.Tensor]


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file with their SHA-256 sum, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with folders.new_file(file) as partial:
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, partial, metadata={"sha256": _sum(contiguous)})
        except SafetensorError as error:  # for example a full disk
            raise OSError(f"cannot write {file}: {error}") from error


def load_tensors(file: Path, device: torch.device | str = "cpu") -> Tensors:
    """Read a file of `save_tensors`, and check its sum.

    Raises:
        OSError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
        tensors: Tensors = load_file(file, device=str(device))
    except SafetensorError as error:
        raise OSError(
            f"{file} is damaged ({error}): delete it and run the same command again"
        ) from error
    if expected != _sum(tensors):
        raise OSError(
            f"{file} is damaged (it does not match its SHA-256 sum): delete it and run the same "
            "command again"
        )
    return tensors


def _sum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def router_tensors(owner: str, router: Router) -> Tensors:
    """Return a router's tensors, named after the layer that owns it."""
    return {f"{owner} router {name}": value.detach() for name, value in router.named_parameters()}


def router_from(owner: str, tensors: Mapping[str, torch.Tensor]) -> Router:
    """Return the router of a layer from tensors that `router_tensors` named.

    The tensors are cloned: the last bit of a product depends on the alignment of its factors in
    memory, and tensors from a file are not aligned.

    Raises:
        ValueError: there are no tensors of this owner.
    """
    prefix = f"{owner} router "
    found = {name: value.clone() for name, value in tensors.items() if name.startswith(prefix)}
    return router_of({name.removeprefix(prefix): value for name, value in found.items()})


def expanded_layers(model: PreTrainedModel) -> list[LinearLayer]:
    """Return the expanded layers of a model."""
    return [layer for layer in find_layers(model) if isinstance(layer.module, ExpertLinear)]


def is_expanded(folder: Path) -> bool:
    """Return whether a folder holds an expanded model."""
    return (folder / EXPANSION).is_file()


def save_expanded(
    model: PreTrainedModel, folder: Path, described: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Write an expanded model into a folder, without a tokenizer.

    ``described`` is what `save_experts` returned for all blocks, if they are already written there.

    Raises:
        OSError: a file cannot be written.
    """
    if model.is_remote_code():  # as in save_pretrained: also the modules that it imports
        custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    layers = expanded_layers(model)
    save_tensors(folder / DENSE, _dense_tensors(model, layers))
    blocks = sorted({layer.block for layer in layers})
    if described is None:
        described = {}
        for block in blocks:
            described |= save_experts(folder, [layer for layer in layers if layer.block == block])
    named = ("config.json", GENERATION, DENSE, INPUTS)
    files = [name for name in named if (folder / name).is_file()]
    version = _SPARSE_INPUTS if INPUTS in files else _FORMAT
    files += map(_file_of, blocks)
    about = {"format": version, "layers": described, "sha256": folders.sums(folder, files)}
    with folders.new_file(folder / EXPANSION) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def save_experts(folder: Path, layers: Sequence[LinearLayer]) -> dict[str, dict[str, Any]]:
    """Write the expanded layers of one block; return the entry of `expansion.json` for each.

    Raises:
        OSError: the file cannot be written.
    """
    owners: dict[int, str] = {}
    for layer in sorted(layers, key=lambda layer: not layer.module.owns_router):
        owners.setdefault(id(layer.module.router), layer.name)
    tensors: Tensors = {}
    described = {layer.name: _pack_layer(layer, owners, tensors) for layer in layers}
    save_tensors(folder / _file_of(layers[0].block), tensors)
    return described


def load_experts(
    model: PreTrainedModel,
    folder: Path,
    layers: Sequence[LinearLayer],
    described: Mapping[str, dict[str, Any]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> None:
    """Replace layers of one block by the expanded ones that `save_experts` wrote.

    With a ``dtype`` the experts are converted to it. With ``packed``, layers are packed for the
    device (see `pack_layer`); those that are not packed stay on the CPU.

    Raises:
        LookupError: a layer has no tensors in the file.
        OSError: the file cannot be read.
    """
    tensors = load_tensors(folder / _file_of(layers[0].block))
    routers: dict[str, Router] = {}
    for layer in layers:
        mixture = _unpack_layer(layer.name, described[layer.name], tensors, routers)
        mixture = mixture if dtype is None else mixture.to(dtype)
        expanded = replace_layer(model, layer, mixture if packed else mixture.to(device))
        if packed:
            pack_layer(model, expanded, device)
        del mixture, expanded  # frees this layer before the next is unpacked


def _file_of(block: int) -> str:
    return f"experts/{block}.safetensors"


def _dense_tensors(model: PreTrainedModel, layers: list[LinearLayer]) -> Tensors:
    """Return the tensors outside the expanded layers; of tied weights only the first."""
    expanded = tuple(f"{layer.name}." for layer in layers)
    tensors = dict(stored_parameters(model)) | dict(stored_buffers(model))
    return {name: value for name, value in tensors.items() if not name.startswith(expanded)}


def _pack_layer(layer: LinearLayer, owners: dict[int, str], tensors: Tensors) -> dict[str, object]:
    """Add a layer's tensors to ``tensors``, a shared router only once; return the layer's entry.

    ``owners`` maps the id of a router to the name of the layer that owns it.
    """
    module = layer.module
    assert isinstance(module, ExpertLinear)
    owner = owners[id(module.router)]
    if owner == layer.name:
        tensors.update(router_tensors(owner, module.router))
    packed = pack(module.weight)
    tensors[f"{layer.name} mask"] = packed.mask
    tensors[f"{layer.name} values"] = packed.values
    if module.bias is not None:
        tensors[f"{layer.name} bias"] = module.bias.detach()
    return {
        "block": layer.block,
        "experts": module.router.experts,
        "neurons": module.out_features,
        "inputs": module.in_features,
        "router": owner,
        "tokens": module.counts,
    }


def pack_layer(
    model: PreTrainedModel, layer: LinearLayer, device: torch.device | str | None = None
) -> None:
    """Pack a layer for a device, by default its own, if it has so many zeros that this gains time.

    The share of zeros is `LEAST_ZEROS`. Layers whose weights are quantised, float64 or on the meta
    device are left as they are, and so are those that do more than multiply by their weight, and the
    matrices of trained experts.
    """
    if not is_plain(layer.module) or not multiplies(layer.module):
        return
    if isinstance(layer.module, FusedMatrix):
        return
    weight = weight_of(layer)
    weight = weight if weight.ndim == 3 else weight[None]
    device = torch.device(device or weight.device)
    least = LEAST_ZEROS.get(kernels_of(device))
    packable = weight.dtype in PACKABLE and not weight.is_meta
    if not packable or least is None or int((weight == 0).sum()) < least * weight.numel():
        return
    module = layer.module
    router, owns = None, True
    if isinstance(module, ExpertLinear):
        router, owns = module.router, module.owns_router
    assert module.bias is None or isinstance(module.bias, torch.Tensor)
    packed = PackedLinear(weight, module.bias, router, owns_router=owns)
    replace_layer(model, layer, packed.train(module.training).to(device))


def pack_layers(
    model: PreTrainedModel, layers: list[LinearLayer], device: torch.device | str | None = None
) -> None:
    """Pack layers and empty the list, so that each dense weight is freed once it is packed."""
    while layers:
        pack_layer(model, layers.pop(), device)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the size of a model's weights in memory in bytes, packed or not; tied ones once."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    packed = [m.sliced.nbytes for m in model.modules() if isinstance(m, PackedLinear)]
    return sum(tensor.nbytes for tensor in tensors) + sum(packed)


def load_expanded(
    folder: Path,
    trust_remote_code: bool = False,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """Read an expanded model onto a device, bit for bit as it was written.

    With a ``dtype`` the experts are converted to it, but not the routers. With ``packed``, layers
    are packed for the device, one at a time (see `pack_layer`). On a GPU the host never holds more
    than one block's experts.

    Raises:
        OutOfMemoryError: the device has too little memory.
        OSError: a file cannot be read.
        ValueError: files are missing or were changed, or do not belong together.
    """
    try:
        about = json.loads((folder / EXPANSION).read_text(encoding="utf-8"))
        version, described, expected = about["format"], about["layers"], dict(about["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder} is damaged: {EXPANSION} cannot be read ({error!r}). Make or copy the folder "
            "again"
        ) from error
    if version not in (_FORMAT, _SPARSE_INPUTS):  # a tuple: it may be a list
        raise ValueError(
            f"{folder} has format {version}, but this version of entangle reads the formats {_FORMAT} "
            f"and {_SPARSE_INPUTS}: expand the model again, or use the version that wrote the folder"
        )
    if version == _SPARSE_INPUTS and INPUTS not in expected:
        raise ValueError(f"{folder} is damaged: {EXPANSION} has no SHA-256 sum of {INPUTS}")
    folders.check_sums(folder, expected, "Make or copy the folder again")
    model = _empty_model(folder, trust_remote_code)
    try:
        blocks = {_file_of(layer["block"]) for layer in described.values()}
        unknown = {"config.json", DENSE, *blocks} - {*expected}
        if unknown:
            raise ValueError(f"it has no SHA-256 sum of {min(unknown)}")
        _fill(model, folder, described, device, dtype, packed)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch's has many lines
        raise ValueError(
            f"{folder} is damaged: {EXPANSION} and the other files do not belong together "
            f"({reason}). Make or copy the folder again"
        ) from error
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and torch.device(device).type != "meta":
        raise ValueError(
            f"{folder} is damaged: it has no weights for {empty[0]}. Make or copy the folder again"
        )
    model.to(device)  # type: ignore[arg-type]  # the buffers too
    return model


def _empty_model(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    options = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    # Buffers are computed here, since no file holds them.
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = class_of(config, folder).from_config(config, **options)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fill(
    model: PreTrainedModel,
    folder: Path,
    described: dict[str, dict[str, Any]],
    device: torch.device | str,
    dtype: torch.dtype | None,
    packed: bool,
) -> None:
    """Load the experts and the dense weights into an empty model.

    Raises:
        LookupError: a layer or a tensor is not in the model, or a layer has no tensors.
        ValueError: a layer has another shape in the model.
    """
    layers = {layer.name: layer for layer in find_layers(model)}
    for name, about in described.items():
        size = layers[name].neurons, layers[name].inputs
        described_size = about["neurons"], about["inputs"]
        if described_size != size:
            raise ValueError(
                f"{name} is {' x '.join(map(str, size))} in the model, but "
                f"{' x '.join(map(str, described_size))} in {EXPANSION}"
            )
    for block in dict.fromkeys(about["block"] for about in described.values()):
        in_block = [layers[name] for name, about in described.items() if about["block"] == block]
        load_experts(model, folder, in_block, described, device=device, dtype=dtype, packed=packed)
    # Copied for the reason in `router_from`. assign=True keeps the dtypes of the file.
    read = load_tensors(folder / DENSE)
    dense = {name: tensor.to(device, copy=True) for name, tensor in read.items()}
    result = model.load_state_dict(dense, strict=False, assign=True)
    if result.unexpected_keys:
        raise LookupError(f"the model has no {result.unexpected_keys[0]}")
    # As in transformers: weights that are separate in the file stay so, even if the config ties them.
    model.tie_weights(missing_keys={*result.missing_keys}, recompute_mapping=False)
    del dense
    if packed:
        others = [layers.pop(name) for name in {*layers} - {*described}]  # they may be pruned
        for layer in others:
            layer.module.to(dtype)
        pack_layers(model, others, device)


def _unpack_layer(
    name: str, about: dict[str, Any], tensors: Tensors, routers: dict[str, Router]
) -> nn.Module:
    owner = about["router"]
    if owner not in routers:
        routers[owner] = router_from(owner, tensors)
    packed = Packed(tensors[f"{name} mask"], tensors[f"{name} values"])
    weight = unpack(packed, (about["experts"], about["neurons"], about["inputs"]))
    bias = tensors.get(f"{name} bias")
    bias = None if bias is None else bias.clone()
    owns = owner == name
    return ExpertLinear(weight, bias, routers[owner], about["tokens"], owns_router=owns)

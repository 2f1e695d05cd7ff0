"""A model and its tokenizer from a hub id, a folder or a GGUF file, and back to a folder."""

import hashlib
import shutil
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entangle.model import ranks
from entangle.model.layers import find_layers
from entangle.model.packing import (
    EXPANSION,
    expanded_layers,
    is_expanded,
    load_expanded,
    pack_layers,
    save_expanded,
)
from entangle.model.placing import blocks_in_files, bytes_of_block, is_offloaded, stored_parameters
from entangle.numerics.routing import Router

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    offload: str | Path | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode from a hub id, a folder or a ``.gguf`` file.

    The folder may be that of an expanded model, which only entangle can load. ``dtype`` is
    ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``; ``device`` is ``auto`` (CUDA if
    there is one) or as in torch. Nothing loaded runs code of its own unless ``trust_remote_code``.

    A model that is larger than the device is spread with ``device_map="auto"``, by accelerate, over
    the devices that are there and the host. With ``offload`` its blocks stay in files, and come to the
    device one at a time; that folder holds those that transformers has to write anew.

    ``packed`` is for running a pruned or expanded model, not for measuring or pruning it: on the
    CPU layers that are zero by half or more hold no zeros, and a few tokens are multiplied without
    them; there are no gradients. Elsewhere it changes nothing.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without a model.
        NotADirectoryError: ``offload`` is a file.
        ValueError: an unknown dtype or device, weights that are missing, a model that cannot be
            loaded, with what transformers says of it, an expanded one or a GGUF file to spread, or
            a device map under torchrun.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = _device(device)
    source, options = source_of(name, revision, trust_remote_code)
    spread = device_map is not None or offload is not None
    expanded = "gguf_file" not in options and is_expanded(Path(source))
    if spread and (expanded or "gguf_file" in options):
        what = "an expanded model" if expanded else "a GGUF file"
        raise ValueError(
            f"{name} is {what}, which is loaded whole: leave device_map and offload out"
        )
    if offload is not None and Path(offload).exists() and not Path(offload).is_dir():
        raise NotADirectoryError(f"offload needs a folder, and {offload} is a file")
    if device_map is not None and ranks.count() > 1:
        raise ValueError(
            "a device_map spreads one process over all devices, and under torchrun there are "
            f"{ranks.count()}: leave it out, or run one process"
        )
    if expanded:
        return _load_expanded(Path(source), dtype, target, packed, trust_remote_code)
    with _explained(name):
        if spread:
            options |= _places(source, options, device_map, offload, target)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, report = loaded
    wrong = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if wrong:  # transformers makes them up at random
        raise ValueError(
            f"cannot load {name}: {len(wrong)} of the weights that its configuration asks for "
            f"are not in its files, or have another shape there, first {min(wrong)}"
        )
    if "gguf_file" in options:  # plain floats by now; these marks would have it saved as quantised
        vars(model).update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    on_device: PreTrainedModel = (model if spread else model.to(target)).eval()
    if packed and not spread and target.type == "cpu":
        pack_layers(on_device, find_layers(on_device))
        on_device.requires_grad_(False)
    return on_device


def _places(
    source: str,
    options: dict[str, Any],
    device_map: str | None,
    offload: str | Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return what says to ``from_pretrained`` where the weights are to be."""
    folder = {}
    if offload is not None:  # where each process writes what it must
        own = Path(offload) / f"rank-{ranks.rank()}" if ranks.count() > 1 else offload
        folder = {"offload_folder": str(own)}
    if device_map is not None:
        return {"device_map": device_map} | folder
    config = AutoConfig.from_pretrained(source, **options)
    with init_empty_weights():
        empty: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=options["trust_remote_code"]
        )
    return {"device_map": blocks_in_files(empty, device)} | folder


def _load_expanded(
    folder: Path, dtype: str, device: torch.device, packed: bool, trust_remote_code: bool
) -> PreTrainedModel:
    wanted = DTYPES[dtype]
    wanted = wanted if isinstance(wanted, torch.dtype) else None
    packed = packed and device.type == "cpu"
    model = load_expanded(folder, trust_remote_code, dtype=wanted, packed=packed)
    if wanted is not None:
        routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
        for parameter in model.parameters():  # and not the buffers, as transformers does
            if id(parameter) not in routers:
                parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    if packed:
        model.requires_grad_(False)
    on_device: PreTrainedModel = model.to(device).eval()  # type: ignore[arg-type]  # as above
    return on_device


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    described: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write a model, and its tokenizer, into a folder: an ordinary Hugging Face one.

    What it holds of another model is removed first: it must not be where the weights are read from.
    That of an expanded model only entangle can load (see `packing.save_expanded`).

    Raises:
        OSError: the folder cannot be written.
        ValueError: transformers refuses to save the model, with what it says.
    """
    folder.mkdir(parents=True, exist_ok=True)  # transformers says nothing if it is a file
    try:
        if expanded_layers(model):
            save_expanded(model, folder, described)
        else:
            (folder / EXPANSION).unlink(missing_ok=True)  # of a model that was here before
            for file in folder.glob("model*.safetensors*"):  # or a whole one hides those in parts
                file.unlink()
            # One file after another is in memory, when its weights are read and written.
            size: dict[str, Any] = (
                {"max_shard_size": bytes_of_block(model)} if is_offloaded(model) else {}
            )
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Attempting to save a model with offloaded"
                )
                model.save_pretrained(folder, **size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # A full disk is an error of its own kind to safetensors, and of no kind to tokenizers.
        disk = isinstance(error, SafetensorError) or type(error) is Exception
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        kind = OSError if disk else ValueError
        raise kind(f"cannot save the model to {folder}: {reason}") from error
    for file in folder.rglob("*.safetensors"):  # which safetensors lets only its owner read
        shutil.copymode(folder / "config.json", file)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, from the same name.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without a model.
        ValueError: a tokenizer that cannot be loaded, with what transformers says of it.
    """
    source, options = source_of(name, revision, trust_remote_code)
    with _explained(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    if "gguf_file" in options:
        _complete(tokenizer, Path(name))
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer what transformers does not read from a GGUF file: its length, its rule."""
    fields = GGUFReader(file).fields
    architecture = bytes(fields["general.architecture"].parts[-1]).decode()
    length, rule = fields.get(f"{architecture}.context_length"), fields.get("tokenizer.ggml.pre")
    if length is not None:
        tokenizer.model_max_length = int(length.parts[-1][0])
    if rule is not None and bytes(rule.parts[-1]) == b"smollm":  # every digit is a word of its own
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _device(name: str) -> torch.device:
    """Return a device that can be used here.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = "auto, cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ValueError(f"no device {name!r} here, expected one of {known}") from error
    return device


def source_of(
    name: str | Path, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Return what to give to ``from_pretrained``: the name or folder, and options.

    Raises:
        FileNotFoundError: what can only be a path, and no model is there.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {path}")
        return str(path.parent), options | {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"the folder {path} holds no model: it has no config.json")
        return str(path), options
    # A hub id is NAME or OWNER/NAME; anything else can only be meant as a path.
    if len(path.parts) > 2 or path.exists() or str(name).startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no model at {path}: expected a folder or a .gguf file")
    return str(name), options | ({"revision": revision} if revision else {})


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Say in one message why transformers could not load a model.

    Raises:
        ValueError: with the beginning of what it said.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises no less
        where = "" if Path(name).exists() else "it is no folder here, and "
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise ValueError(f"cannot load {name}: {where}transformers says: {reason}") from error


def weights_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 of all parameters' names, dtypes, shapes and bytes; tied ones once."""
    digest = hashlib.sha256()
    for name, parameter in stored_parameters(model):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

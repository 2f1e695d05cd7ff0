"""Loading a model and its tokenizer from a hub id, a folder or a GGUF file, and saving them."""

import re
import shutil
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entangle.model import ranks
from entangle.model.classes import class_of
from entangle.model.integrity import check_files, check_weights, has_sums
from entangle.model.layers import find_layers
from entangle.model.packing import (
    EXPANSION,
    expanded_layers,
    is_expanded,
    load_expanded,
    load_tensors,
    pack_layers,
    save_expanded,
    save_tensors,
)
from entangle.model.placing import blocks_in_files, bytes_of_block, is_offloaded
from entangle.model.quantised import dequantised, forget_quantisation, unused_scales
from entangle.model.sparse_inputs import INPUTS, VARIANT, rule_tensors, sparsify_inputs
from entangle.numerics.input_rules import rule_of
from entangle.numerics.processors import kernels_of
from entangle.numerics.routing import Router
from entangle.numerics.torch_settings import with_torch_defaults

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

VOCABULARY = re.compile(  # the names of files that hold a tokenizer's vocabulary, or its code
    r"vocab|merges|tekken|tiktoken|\.model|\.codes$|tokenizer(?!_config).*\.json$|\.py$"
)


@with_torch_defaults
def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    offload: str | Path | None = None,
    packed: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode from a hub id, a folder or a ``.gguf`` file.

    The folder may hold an expanded model or one with sparse inputs, which only entangle can load. ``dtype`` is ``auto`` (as
    stored), ``float32``, ``bfloat16`` or ``float16``; ``device`` is ``auto`` (CUDA if available) or
    a device of torch. Code that comes with a model runs only with ``trust_remote_code``.

    There are two ways to load a model that is larger than the device. With ``device_map="auto"``
    accelerate spreads it over all devices and the host. With ``offload``, a folder, its blocks stay
    in files and come to the device one at a time; transformers writes to the folder only the blocks
    that it cannot read from the model's own files.

    ``packed`` is for running a pruned or expanded model, not for measuring or pruning it. Layers
    with at least half of their weights zero (on a GPU 60%) are stored without zeros, which makes a
    few tokens faster (measured on the CPU only); they have no gradients. On a GPU without Triton it
    changes nothing.

    On a GPU each tensor goes there when it is read. So the host holds a few tensors and never the
    model, however many processes load one. Only a GGUF file is read on the host as a whole, by one
    process of a machine after the other.

    In a folder, the sizes and headers of the weights' files are always checked. ``verify`` also
    checks the SHA-256 sum of every file of a pruned or expanded model.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no model.
        NotADirectoryError: ``offload`` or a folder above it is a file.
        ValueError: the dtype or device is unknown; weights are missing or damaged; ``verify`` is
            given for a model without sums; transformers cannot load
            the model (the message quotes it); ``device_map`` or ``offload`` is given for an
            expanded model or a GGUF file; or ``device_map`` is given under torchrun.
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
            f"{name} is {what}, which can only be loaded whole: leave out device_map and offload"
        )
    if device_map is not None and device != "auto":
        raise ValueError(
            f"device_map {device_map} spreads the model over all devices, but device is {device}: "
            "leave out one of them"
        )
    if offload is not None and (Path(offload) / "config.json").exists():
        raise ValueError(
            f"the folder of offload {offload} holds a model: give a new folder, which can be deleted "
            "afterwards"
        )
    for path in () if offload is None else (Path(offload), *Path(offload).parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"offload needs a folder, but {path} is a file")
    if device_map is not None and ranks.count() > 1:
        raise ValueError(
            "device_map spreads a model over all devices, but torchrun started "
            f"{ranks.count()} processes: leave out device_map, or run one process"
        )
    if verify and not (expanded and not has_sums(Path(source))):  # expansion.json has sums too
        check_files(Path(source) if Path(name).is_dir() else Path(name))
    if Path(name).is_dir():
        check_weights(Path(source))
    if expanded:
        mixture = _load_expanded(Path(source), dtype, target, packed, trust_remote_code)
        load_rules(mixture, Path(source) / INPUTS)
        return mixture
    kind, plain = AutoModelForCausalLM, {"quantization_config": GgufConfig(dequantize=True)}
    if "gguf_file" not in options:
        with explained(name):
            config = AutoConfig.from_pretrained(source, **options)
            plain = dequantised(config)
        kind = class_of(config, name)
    if spread:
        with explained(name):
            options |= _placement(kind, source, options, device_map, offload, target)
    elif target.type != "cpu" and "gguf_file" not in options:
        options["device_map"] = {"": target}
    on_host = target.type != "cpu" and "device_map" not in options
    with ranks.in_turn() if on_host else nullcontext():
        sparse = "gguf_file" not in options and has_rules(Path(source))
        variant = {"variant": VARIANT} if sparse else {}
        on_device = _from_pretrained(kind, name, source, DTYPES[dtype], options | variant, plain)
        if "device_map" not in options:
            on_device.to(target)  # type: ignore[arg-type]  # transformers' own annotation
    if sparse:
        load_rules(on_device, Path(source) / INPUTS)
    if packed and not spread and kernels_of(target) != "torch":
        pack_layers(on_device, find_layers(on_device), target)
        on_device.requires_grad_(False)
    return on_device


def _from_pretrained(
    kind: Any,
    name: str | Path,
    source: str,
    dtype: Any,
    options: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> PreTrainedModel:
    """Load a model by transformers, and check what it reports.

    ``plain`` are the options that turn quantised weights into plain floats.

    Raises:
        ValueError: as `load_model`.
    """
    with explained(name):
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **plain,
        )
    _check_report(name, report)
    _check_blocks(name, model, report["unexpected_keys"])
    if plain:
        forget_quantisation(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_report(name: str | Path, report: Mapping[str, Any]) -> None:
    """Check what transformers reports about a model that it loaded.

    Raises:
        ValueError: weights are missing or have another shape, or their scales were not used.
    """
    wrong = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if wrong:  # transformers initialises them at random
        raise ValueError(
            f"cannot load {name}: {len(wrong)} of the weights of its configuration are missing in "
            f"its files or have another shape, for example {min(wrong)}"
        )
    unused = unused_scales(report["unexpected_keys"])
    if unused:
        raise ValueError(
            f"cannot load {name}: its weights are codes of a quantised format, and transformers does "
            f"not use {len(unused)} of their scales, for example {unused[0]}: give a folder whose "
            "config.json has the quantization_config of the format, or a model that is not quantised"
        )


def _check_blocks(name: str | Path, model: PreTrainedModel, unexpected: Collection[str]) -> None:
    """Check that the files have no more blocks than the configuration says.

    Blocks that predict further tokens (``num_nextn_predict_layers``) are left out by transformers.

    Raises:
        ValueError: the files have weights of a further block.
    """
    blocks = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    nextn = getattr(model.config.get_text_config(decoder=True), "num_nextn_predict_layers", 0)
    if blocks is None or nextn:
        return
    known = {re.sub(r"\b\d+\b", "0", key) for key in model.state_dict()}
    for key in sorted(unexpected):
        numbers = [int(number) for number in re.findall(r"\b\d+\b", key)]
        same = re.sub(r"\b\d+\b", "0", key)
        if numbers and numbers[0] >= blocks and any(other.endswith(same) for other in known):
            raise ValueError(
                f"cannot load {name}: its files have {key}, but its config.json says that it has "
                f"{blocks} blocks (num_hidden_layers): correct config.json"
            )


def _placement(
    kind: Any,
    source: str,
    options: dict[str, Any],
    device_map: str | None,
    offload: str | Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that place the weights on devices and in files."""
    folder = {}
    if offload is not None:  # each process writes to its own folder
        own = Path(offload) / f"rank-{ranks.rank()}" if ranks.count() > 1 else offload
        folder = {"offload_folder": str(own)}
    if device_map is not None:
        return {"device_map": device_map} | folder
    config = AutoConfig.from_pretrained(source, **options)
    with init_empty_weights():
        empty = kind.from_config(config, trust_remote_code=options["trust_remote_code"])
    return {"device_map": blocks_in_files(empty, device)} | folder


def _load_expanded(
    folder: Path, dtype: str, device: torch.device, packed: bool, trust_remote_code: bool
) -> PreTrainedModel:
    wanted = DTYPES[dtype]
    wanted = wanted if isinstance(wanted, torch.dtype) else None
    packed = packed and kernels_of(device) != "torch"
    model = load_expanded(folder, trust_remote_code, device=device, dtype=wanted, packed=packed)
    if wanted is not None:
        routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
        for parameter in model.parameters():  # not the buffers, as in transformers
            if id(parameter) not in routers:
                parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    if packed:
        model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
    return loaded


def has_rules(folder: Path) -> bool:
    """Return whether a folder holds a model with sparse inputs."""
    return (folder / INPUTS).is_file()


def load_rules(model: PreTrainedModel, file: Path) -> None:
    """Give layers of a model sparse inputs by the rules in a file, if it exists.

    Raises:
        ValueError: the file is damaged, or belongs to another model.
    """
    if not file.is_file():
        return
    try:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in load_tensors(file).items():
            layer, _, key = name.rpartition(" ")
            found.setdefault(layer, {})[key] = value
        sparsify_inputs(model, {layer: rule_of(tensors) for layer, tensors in found.items()})
    except (OSError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file.parent} is damaged: {file.name} does not have the rules of this model's sparse "
            f"inputs ({error}). Make or copy the folder again"
        ) from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    described: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write a model and its tokenizer into an ordinary Hugging Face folder.

    Only entangle can load the folder of an expanded model (see `packing.save_expanded`), or of one
    with sparse inputs, whose weights' files have names that transformers does not look for. Weights of
    another model in the folder are removed first, so the model's own weights must not be in it.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: transformers refuses to save the model; the message quotes it. After a
            ValueError the pruned blocks would be removed (see `folders`).
    """
    folder.mkdir(parents=True, exist_ok=True)  # transformers does not raise if it is a file
    try:
        rules = rule_tensors(model)
        if rules:
            save_tensors(folder / INPUTS, rules)
        else:
            (folder / INPUTS).unlink(missing_ok=True)  # from an earlier model
        if expanded_layers(model):
            save_expanded(model, folder, described)
        else:
            (folder / EXPANSION).unlink(missing_ok=True)  # from an earlier model
            for file in folder.glob("model*.safetensors*"):  # a single file would hide shards
                file.unlink()
            # Each file is in memory as a whole while it is written, so it may not exceed a block.
            size: dict[str, Any] = (
                {"max_shard_size": bytes_of_block(model)} if is_offloaded(model) else {}
            )
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Attempting to save a model with offloaded"
                )
                size |= {"variant": VARIANT} if rules else {}
                model.save_pretrained(folder, **size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # On a full disk safetensors raises SafetensorError, and tokenizers a bare Exception.
        disk = isinstance(error, SafetensorError) or type(error) is Exception
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        kind = OSError if disk else RuntimeError
        raise kind(f"cannot save the model to {folder}: {reason}") from error
    # safetensors makes its files readable by their owner only.
    for file in folder.rglob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from the name that `load_model` takes.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no model or no tokenizer.
        ValueError: transformers cannot load the tokenizer; the message quotes it.
    """
    source, options = source_of(name, revision, trust_remote_code)
    words: set[str] | None = None
    try:
        with explained(name, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
            added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
            words = {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens} - {*added}
            tokenizer("a", verbose=False)  # some wrong settings fail only here
    except ValueError:
        folder = Path(name)
        if not folder.is_dir() or any(VOCABULARY.search(file.name) for file in folder.iterdir()):
            raise
    # Without a vocabulary transformers makes up a tokenizer of special tokens and at most one word.
    if words is None or len(words) < 2:
        what = "folder" if Path(name).is_dir() else "file" if Path(name).is_file() else "model"
        raise FileNotFoundError(
            f"the {what} {name} holds no tokenizer: add the tokenizer's files, such as "
            "tokenizer.json and tokenizer_config.json, of the model that it was made from"
        )
    if "gguf_file" in options:
        _complete(tokenizer, Path(name))
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Set what transformers does not read from a GGUF file: context length and pre-tokenizer."""
    fields = GGUFReader(file).fields
    architecture = bytes(fields["general.architecture"].parts[-1]).decode()
    length, rule = fields.get(f"{architecture}.context_length"), fields.get("tokenizer.ggml.pre")
    if length is not None:
        tokenizer.model_max_length = int(length.parts[-1][0])
    if rule is not None and bytes(rule.parts[-1]) == b"smollm":  # splits numbers into digits
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA if available, and otherwise the CPU.

    Raises:
        ValueError: the device is not available, or is neither a CPU nor a CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # It has the index of the GPU: transformers loads in threads, whose current GPU is the first.
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        known = "auto, cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ValueError(f"cannot use the device {name!r}: expected one of {known}") from error
    if device.type not in {"cpu", "cuda"}:  # such as mps, which lacks float64
        raise ValueError(
            f"cannot use the device {name!r}: entangle needs float64, and is tested on cpu and cuda "
            "only: use cpu"
        )
    return device


def source_of(
    name: str | Path, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Return the arguments of ``from_pretrained``: the name or folder, and the options.

    Raises:
        FileNotFoundError: the name can only be a path, and there is no model.
        ValueError: the folder holds an adapter, or a revision is given for a model on disk.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(name)
    if revision and (path.suffix == ".gguf" or path.is_dir()):
        raise ValueError(
            f"revision {revision} is of a model on the hub, but {path} is on disk: leave out revision"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {path}: check the path")
        return str(path.parent), options | {"gguf_file": path.name}
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # transformers ignores it without peft
            raise ValueError(
                f"the folder {path} holds an adapter (adapter_config.json): merge it into its model "
                "first (in peft: model = model.merge_and_unload()), and save that to a folder"
            )
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"the folder {path} holds no model: it has no config.json")
        return str(path), options
    # A hub id is NAME or OWNER/NAME; anything else must be a path.
    if len(path.parts) > 2 or path.exists() or str(name).startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no model at {path}: expected a folder or a .gguf file")
    return str(name), options | ({"revision": revision} if revision else {})


@contextmanager
def explained(name: str | Path, part: str = "") -> Iterator[None]:
    """Turn any error of transformers into one message; ``part`` is what is loaded of the model.

    Raises:
        OutOfMemoryError: the device has too little memory.
        ValueError: loading failed; the message quotes the first 300 characters of the error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        problem = (
            "transformers failed"
            if Path(name).exists()
            else "there is no such folder, and transformers cannot load it from the hub"
        )
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        what = f"the {part} of {name}" if part else name
        raise ValueError(f"cannot load {what}: {problem}: {reason}") from error

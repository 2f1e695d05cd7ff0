"""Whether a folder that was just written gives back the model in memory.

A model is saved in another form than it has in memory: transformers renames and splits tensors,
leaves out tied ones, and writes a configuration. So the folder is loaded again.
"""

import math
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from entangle.model.loading import has_rules, load_rules
from entangle.model.packing import expanded_layers, load_expanded, load_tensors
from entangle.model.placing import (
    blocks_in_files,
    is_offloaded,
    stored_buffers,
    stored_parameters,
)
from entangle.model.sparse_inputs import INPUTS, VARIANT, rule_tensors


def check_saved(model: PreTrainedModel, folder: Path, tokens: torch.Tensor, scratch: Path) -> None:
    """Check that the folder that `save_model` wrote holds the tensors of the model, bit for bit.

    If a second model fits into memory, its outputs for ``tokens`` (windows, length) must agree too,
    to rounding. Otherwise the folder's tensors are read one at a time; ``scratch`` is an
    existing folder for those that transformers has to convert.

    Raises:
        OSError: the folder cannot be loaded or differs from the model; the message names the tensor.
    """
    try:
        _check(model, folder, tokens, scratch, whole=_fits(model))
    except (MemoryError, torch.OutOfMemoryError):
        _check(model, folder, tokens, scratch, whole=False)


def _check(
    model: PreTrainedModel, folder: Path, tokens: torch.Tensor, scratch: Path, *, whole: bool
) -> None:
    """Check the folder, with a second model in memory if ``whole``.

    Raises:
        MemoryError: there is not enough memory; of a GPU it is an OutOfMemoryError.
        OSError: the folder cannot be loaded or differs from the model.
        OutOfMemoryError: as MemoryError.
    """
    try:
        if expanded_layers(model) and not whole:
            for file in folder.rglob("*.safetensors"):
                load_tensors(file)  # compares with the sum of the tensors that were in memory
            return
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            again = _loaded(model, folder, whole, Path(temporary))
            _compare_tensors(model, again)
            _compare_rules(model, again)
            if whole:
                _compare_outputs(model, again, tokens)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever it is, what was pruned is kept
        raise OSError(
            f"the model was not saved: {folder} differs from the model in memory ({error})"
        ) from error


def _fits(model: PreTrainedModel) -> bool:
    """Return whether a second model fits beside this one, on its one device and on the host."""
    if is_offloaded(model) or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return False
    tensors = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
    free = free_memory()
    if model.device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(model.device)[0])
    return 1.2 * sum(tensors.values()) < free  # a fifth for what the forward passes need


def free_memory() -> float:
    """Return the bytes of memory that this process may still use."""
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    """Return the bytes that the control group of a container leaves free; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or no limit
        return math.inf
    return limit - used


def _loaded(model: PreTrainedModel, folder: Path, whole: bool, temporary: Path) -> PreTrainedModel:
    """Load the folder: onto the model's device if ``whole``, else with its blocks left in files.

    Raises:
        ValueError: the files lack a key of the model, or the model lacks a key of the files.
    """
    if expanded_layers(model):
        expanded: Any = load_expanded(folder, model.is_remote_code(), device=model.device)
        found: PreTrainedModel = expanded.eval()
        load_rules(found, folder / INPUTS)
        return found
    place: dict[str, Any] = {"device_map": {"": model.device}}
    if not whole:
        device = torch.device("cpu")
        place = {"device_map": blocks_in_files(model, device), "offload_folder": str(temporary)}
    # Of the model's own class, since that may be code that only this process knows.
    kind_of_model: Any = type(model)
    again, report = kind_of_model.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        **place,
        **({"variant": VARIANT} if has_rules(folder) else {}),
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{kind.replace('_', ' ')}: {min(map(str, report[kind]))}")
    loaded: PreTrainedModel = again.eval()
    load_rules(loaded, folder / INPUTS)
    return loaded


def _compare_tensors(model: PreTrainedModel, again: PreTrainedModel) -> None:
    """Compare all parameters and saved buffers of two models, one at a time.

    Raises:
        ValueError: one differs.
    """
    none = ("nothing", torch.empty(0))
    pairs = zip_longest(stored_parameters(model), stored_parameters(again), fillvalue=none)
    for (name, ours), (other, theirs) in pairs:
        if name != other:
            only = min({name, other} - {none[0]})
            raise ValueError(f"{only} is in only one of the two models")
        _compare(name, ours, theirs)
    theirs_by_name = dict(stored_buffers(again))
    for name, buffer in stored_buffers(model):
        _compare(name, buffer, theirs_by_name[name])


def _compare_rules(model: PreTrainedModel, again: PreTrainedModel) -> None:
    """Compare the rules of two models' sparse inputs.

    Raises:
        ValueError: they differ.
    """
    ours, theirs = rule_tensors(model), rule_tensors(again)
    if {*ours} != {*theirs}:
        raise ValueError(f"{min({*ours} ^ {*theirs})} is in only one of the two models")
    for name, tensor in ours.items():
        _compare(name, tensor, theirs[name])


def _compare(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare two tensors bit for bit, so that NaN equals itself.

    Raises:
        ValueError: they differ.
    """
    bits = [x.detach().to(theirs.dtype).cpu().contiguous().reshape(-1) for x in (ours, theirs)]
    equal = ours.shape == theirs.shape
    if not equal or not torch.equal(bits[0].view(torch.uint8), bits[1].view(torch.uint8)):
        raise ValueError(f"tensor {name} differs")


def _compare_outputs(model: PreTrainedModel, again: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Compare the logits of two models; the norm of the difference must be that of rounding.

    The weights are equal, but they are at other places in memory, and the order of sums depends on
    the place. A wrong configuration changes the logits by far more.

    Raises:
        ValueError: the logits differ.
    """
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=tokens.to(model.device)).logits.flatten(0, 1) for one in (model, again)
        )
    difference = size = 0.0
    for a, b in zip(ours, theirs, strict=True):  # a token at a time: the vocabulary may be large
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            raise ValueError("NaN and infinity are at other places of the outputs")
        difference += float((a[finite].double() - b[finite].double()).square().sum())
        size += float(a[finite].double().square().sum())
    allowed = max(1e-4, 8 * torch.finfo(ours.dtype).eps)
    if difference > allowed**2 * size:
        raise ValueError(
            f"equal tensors give other outputs, by {(difference / size) ** 0.5:.2g} of their norm"
            if size
            else "equal tensors give other outputs"
        )

"""Estimates of the memory, disk space and time that commands will need.

The model's weights are not read. Models of one and of two blocks with random weights are made from
its configuration. The same commands run on them in separate processes, and their costs are
extrapolated to all blocks and all windows.
"""

import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from entangle.model.classes import class_of
from entangle.model.layers import LinearLayer, find_blocks, find_layers
from entangle.model.loading import (
    DTYPES,
    explained,
    has_rules,
    load_tokenizer,
    save_model,
    source_of,
)
from entangle.model.mixing import mixed_windows, share_windows
from entangle.model.packing import is_expanded
from entangle.model.quantised import forget_format
from entangle.model.sides import Recordable, find_both, in_order, layer_of
from entangle.model.text import OWN, check_windows
from entangle.numerics.histograms import Histograms
from entangle.pruning.options import Pruning, Reconstruct, SolveOption
from entangle.pruning.reconstruction import step_size

BATCHES = (2, 16)  # numbers of batches that the small models run
# Names in configurations of indices of blocks: which are the first with experts, and which have none
# or have them.
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
AMONG = ("mlp_only_layers", "moe_layers")
CONTEXT = 5e8  # bytes: an allowance for CUDA's context; 0.2 to 0.7 GB are reported with torch
FRAGMENTATION = 1.1  # an allowance: what torch's allocator reserves on a GPU, over what is in use
RUN_BYTES = 3_000  # of a neuron, besides its counts, when histograms are turned into a run


@dataclasses.dataclass(frozen=True)
class Stage:
    """The expected cost of a command."""

    command: str
    memory_bytes: float  # peak of the process
    device_bytes: float  # peak on a GPU with CUDA's context; 0 if none is planned
    disk_bytes: float  # of the files it writes
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a model and a text, and the expected costs of commands on them."""

    model: str
    text: str
    blocks: int  # up to the last with a chosen layer
    layers: int
    neurons: int
    inputs: int  # whose distributions `measure` records
    weights: int  # of the chosen layers
    model_bytes: int  # of all weights
    block_bytes: int  # of the block that was run; all are assumed to be like it
    largest_block_bytes: int
    windows: int
    tokens: int
    without_gpu: bool  # a GPU is planned on a machine without one: the times are those of its CPU
    stages: list[Stage]


@dataclasses.dataclass(frozen=True)
class _Cost:
    """The measured cost of a command on a small model."""

    blocks: int
    batches: int
    seconds: float  # from the start of the process
    memory: float  # bytes, as are those below
    device: float
    disk: float


def plan(
    model: str | Path,
    text: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    trust_remote_code: bool = False,
    layers: str | Sequence[str] = ("*",),
    input_layers: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    windows: int = 128,
    length: int = 512,
    batch_size: int = 4,
    bins: int = 1024,
    sparsity: str = "0.5",
    experts: int = 1,
    solve: SolveOption = "auto",
    reconstruct: Reconstruct = "none",
) -> Plan:
    """Estimate the memory, disk space and time that `measure` and `sparsify` need in one process.

    The model is not loaded and need not fit into memory. All blocks are assumed to be like the
    largest with a chosen layer. ``text`` is a source or several, which are mixed by equal shares. A
    GPU can be planned on a machine without one: its memory is estimated from that of the commands
    on the CPU, and the times are the CPU's.

    Raises:
        FileNotFoundError: the model or the text does not exist.
        LookupError: a pattern matches no layer, or all layers are excluded.
        RuntimeError: a command fails on the small model; the message has its error.
        ValueError: a number or word is out of range, the windows do not fit the model, or the
            model is expanded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    texts = [str(text)] if isinstance(text, str | Path) else list(map(str, text))
    if OWN in texts:
        raise ValueError(
            f"plan loads no weights, so no model can write a text of its own ({OWN}): give another "
            "text. Windows of equal number and length cost the same, once they are written"
        )
    # These two lines raise before the slow part.
    Pruning.of(sparsity=sparsity, experts=experts, solve=solve, reconstruct=reconstruct)
    Histograms.zeros(1, bins=bins)
    source, options = source_of(model, revision, trust_remote_code)
    if is_expanded(Path(source)):
        raise ValueError(
            f"{model} is an expanded model: plan the dense model that it was made from"
        )
    if has_rules(Path(source)):
        raise ValueError(
            f"{model} has sparse inputs: plan the model that it was made from, which costs the same"
        )
    with explained(model):
        config = AutoConfig.from_pretrained(source, **options)
    class_of(config, model)  # raises if there is none
    forget_format(config)
    stored = getattr(config, "dtype", None) or torch.float32
    kind: torch.dtype = stored if dtype == "auto" else getattr(torch, dtype)
    with explained(model):
        whole = _empty(config, kind, trust_remote_code)
    chosen, inputs = find_both(whole, layers, input_layers, exclude)
    if not chosen:
        raise ValueError("sparsify, whose costs are planned too, needs layers: give some as layers")
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    parts = share_windows(texts, tokenizer, windows=windows, length=length)
    drawn = mixed_windows([part for part in parts if part is not None])
    check_windows(whole.eval(), drawn)
    batches = len(drawn.batches(batch_size))
    if reconstruct != "none":
        step_size(drawn)
    recorded = in_order(chosen, inputs)
    blocks = 1 + recorded[-1].block
    sizes = list(map(_bytes, find_blocks(whole)[1]))
    start = max((layer.block for layer in chosen), key=sizes.__getitem__)
    with explained(model):
        typical = _empty(_cut(config, 1, start), kind, trust_remote_code)
    chosen_there, inputs_there = (_like(found, find_layers(typical)) for found in (chosen, inputs))
    few, more = (min(count, batches) for count in BATCHES)
    common = ["--length", str(length), "--batch-size", str(batch_size)]
    without_gpu = device.partition(":")[0] == "cuda" and not torch.cuda.is_available()
    common += [
        "--device",
        "cpu" if without_gpu else device,
        *_flag("--layers", chosen_there or chosen),
    ]
    commands = {
        "measure": [*("--bins", str(bins)), *_flag("--input-layers", inputs_there)],
        "sparsify": [
            *("--sparsity", sparsity, "--experts", str(experts), "--solve", solve),
            *("--reconstruct", reconstruct),
        ],
    }
    found: dict[str, list[_Cost]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for count in (1, 2):
            small = class_of(config, model).from_config(
                _cut(config, count, start), dtype=kind, trust_remote_code=trust_remote_code
            )
            save_model(small, tokenizer, folder / str(count))
            del small
        place = ["--offload", str(folder / "offloaded")] if offload else []
        for name, arguments in commands.items():
            # The first run is dropped: it compiles kernels that this machine has not compiled yet.
            for count, size in ((1, few), (1, few), (1, more), (2, few), (2, more)):
                count_of = size * batch_size  # each text needs a window
                drawn_windows = ["--windows", str(count_of), "--text", *texts[:count_of]]
                line = [name, str(folder / str(count)), *common, *drawn_windows, *place, *arguments]
                found[name].append(_run(line, folder / "out", count, size))
    hidden = batch_size * length * config.get_text_config(decoder=True).hidden_size * kind.itemsize
    block = _bytes(find_blocks(typical)[1][0])
    rows = sum(one.neurons for one in chosen_there) + sum(one.inputs for one in inputs_there)
    histograms = rows * (4 * bins + RUN_BYTES)
    linear = sum(layer.neurons * layer.inputs for layer in chosen_there) * kind.itemsize
    held = {
        "measure": (block + histograms, hidden if offload else 0),
        # Twice: what was written is loaded again and compared with the model in memory.
        # Reconstruction holds the dense model's hidden states beside the pruned one's.
        "sparsify": (
            2 * (block + (experts > 1) * experts * linear),
            hidden * (1 if reconstruct == "none" else 2),
        ),
    }
    stages = []
    for name, costs in found.items():
        each, batch = (0 if offload else held[name][0]), held[name][1]
        used = [_as_on_gpu(cost, batch * offload) for cost in costs] if without_gpu else costs
        stages.append(_stage(name, used[1:], blocks, batches, each, batch))
    return Plan(
        str(model),
        drawn.text,
        blocks,
        len(chosen),
        sum(layer.neurons for layer in chosen),
        sum(one.neurons for one in inputs),
        sum(layer.neurons * layer.inputs for layer in chosen),
        sum(parameter.nbytes for parameter in whole.parameters()),
        block,
        max(sizes),
        len(drawn),
        drawn.tokens.numel(),
        without_gpu,
        stages,
    )


def _bytes(block: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())


def _like(found: Sequence[Recordable], layers: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Return those of the layers that have the role of one that was found."""
    roles = {layer_of(one).role for one in found}
    return [layer for layer in layers if layer.role in roles]


def _flag(name: str, found: Sequence[Recordable]) -> list[str]:
    """Return a flag with patterns of these layers' roles, or nothing if there are none."""
    patterns = sorted({f"*.{layer_of(one).role}" for one in found})
    return [name, *patterns] if patterns else []


def _empty(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    with init_empty_weights():
        model = class_of(config, "the model").from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def _cut(config: Any, blocks: int, start: int = 0) -> Any:
    """Return a configuration with so many blocks; lists with an entry per block are cut too.

    They are those from ``start`` on, as far as the configuration has such lists or names the blocks
    with experts; behind the last they repeat it.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if name in FIRST and isinstance(value, int):
            setattr(text, name, max(value - start, 0))
        elif name in AMONG and isinstance(value, list):
            setattr(text, name, [index - start for index in value if index >= start])
        elif isinstance(value, list) and len(value) == before:
            setattr(text, name, [*value, *value[-1:] * blocks][start : start + blocks])
    text.num_hidden_layers = blocks
    return small


def _run(arguments: Sequence[str], out: Path, blocks: int, batches: int) -> _Cost:
    """Run a command and return its cost.

    Raises:
        RuntimeError: the command fails.
        ValueError: the command refuses its input.
    """
    begin = time.perf_counter()
    line = [sys.executable, "-m", "entangle", *arguments, "--out", str(out), "--overwrite"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        problem = done.stderr.strip().removeprefix("entangle: ") or f"exit code {done.returncode}"
        kind = ValueError if done.returncode == 2 else RuntimeError  # 2: bad input, also of plan
        raise kind(
            f"{arguments[0]} failed on {blocks} of the model's blocks with random weights: {problem}"
        )
    log = json.loads((out / "log.json").read_text(encoding="utf-8"))
    disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    device = log.get("peak_device_bytes", 0)
    return _Cost(blocks, batches, seconds, log["peak_memory_bytes"], device, disk)


def _as_on_gpu(cost: _Cost, hidden_bytes: float) -> _Cost:
    """Return the cost on the CPU as if on a GPU: all but hidden states on the host is on the GPU.

    The libraries of the process, 0.7 GB, would stay on the host. They are counted all the same: a
    GPU's kernels may need more than those of the CPU.
    """
    return dataclasses.replace(cost, device=cost.memory - cost.batches * hidden_bytes)


def _stage(
    command: str,
    costs: Sequence[_Cost],
    blocks: int,
    batches: int,
    block_bytes: float,
    hidden_bytes: float,
) -> Stage:
    """Extrapolate costs of one and two blocks, with few and more batches, to the whole model.

    Time is linear in the batches and in the blocks; the last block costs less, since no block runs
    after it. Memory is a constant, which is measured, plus ``block_bytes`` for each block (weights
    and histograms) plus ``hidden_bytes`` for each batch (hidden states). On a GPU allowances for the
    context and for fragmentation are added.
    """
    one, one_more, two, two_more = costs

    def known(blocks: int, batches: int) -> float:
        return blocks * block_bytes + batches * hidden_bytes

    def rest(name: str) -> float:
        parts = [getattr(cost, name) - known(cost.blocks, cost.batches) for cost in costs]
        return float(max(parts))

    def with_all(few: _Cost, more: _Cost) -> float:
        a_batch = max(more.seconds - few.seconds, 0.0) / max(more.batches - few.batches, 1)
        return more.seconds + (batches - more.batches) * a_batch

    last = with_all(one, one_more)
    seconds = last + (blocks - 1) * max(with_all(two, two_more) - last, 0.0)
    # Where weights and hidden states are held; an offloaded model holds them on the host.
    place = "device" if one.device and block_bytes else "memory"
    memory = {name: max(getattr(cost, name) for cost in costs) for name in ("memory", "device")}
    memory[place] = rest(place) + known(blocks, batches)
    return Stage(
        command,
        memory["memory"],
        CONTEXT + FRAGMENTATION * memory["device"] if one.device else 0.0,
        one.disk + (blocks - 1) * (two.disk - one.disk),
        seconds,
    )

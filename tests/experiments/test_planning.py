"""What a plan counts is what the model has; what it expects follows the law that costs follow."""

import copy
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import entangle
from entangle.__main__ import main
from entangle.experiments import planning
from entangle.experiments.planning import _cut, _run, _stage, plan
from entangle.model.layers import find_blocks, find_layers, weight_of
from tests.forking import forked
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import ARCHITECTURES, VOCABULARY, save_tiny, tiny_model, tiny_vision_model

WORDS = "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly. "
WINDOWS, LENGTH = 20, 32


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a text, for models to be saved beside it."""
    (tmp_path / "text.txt").write_text(WORDS * 60)
    return tmp_path


def planned(place: Path, name: str = "model", **options: Any) -> planning.Plan:
    words: dict[str, Any] = {"windows": WINDOWS, "length": LENGTH} | options
    return plan(place / name, place / "text.txt", **words)


# Costs that follow a law, which is to be found.

STARTED, A_BLOCK, A_BATCH, BEHIND = 5.0, 2.0, 0.25, 0.125  # seconds
HELD, WEIGHTS, HIDDEN = 6e8, 3e7, 4e5  # bytes
FILES, FILE = 700, 1e6


@dataclasses.dataclass(frozen=True)
class Law:
    """What a command costs on so many blocks and batches."""

    a_block: float = A_BLOCK
    a_batch: float = A_BATCH
    behind: float = BEHIND  # for each batch that runs on, behind a block that is not the last
    device: bool = False

    def seconds(self, blocks: int, batches: int) -> float:
        every = blocks * (self.a_block + self.a_batch * batches)
        return STARTED + every + (blocks - 1) * self.behind * batches

    def bytes(self, blocks: int, batches: int) -> float:
        return HELD + blocks * WEIGHTS + batches * HIDDEN

    def cost(self, blocks: int, batches: int) -> planning._Cost:
        used = self.bytes(blocks, batches)
        memory, device = (HELD, used) if self.device else (used, 0.0)
        disk = FILES + blocks * FILE
        return planning._Cost(blocks, batches, self.seconds(blocks, batches), memory, device, disk)


def stage(law: Law, blocks: int, batches: int, few: int = 2, more: int = 8) -> planning.Stage:
    costs = [law.cost(blocks, batches) for blocks in (1, 2) for batches in (few, more)]
    return _stage("measure", costs, blocks, batches, WEIGHTS, HIDDEN)


@pytest.mark.parametrize("batches", [8, 9, 5_000])
@pytest.mark.parametrize("blocks", [1, 2, 3, 80])
@pytest.mark.parametrize(
    "law", [Law(), Law(a_block=0.0), Law(a_batch=0.0, behind=0.0), Law(behind=0.0)]
)
def test_costs_that_are_linear_are_carried_over_exactly(
    law: Law, blocks: int, batches: int
) -> None:
    found = stage(law, blocks, batches)
    assert found.command == "measure"
    assert found.seconds == pytest.approx(law.seconds(blocks, batches), rel=1e-12)
    assert found.memory_bytes == pytest.approx(law.bytes(blocks, batches), rel=1e-12)
    assert found.disk_bytes == FILES + blocks * FILE
    assert found.device_bytes == 0


@pytest.mark.parametrize("batches", [1, 2])
def test_so_few_batches_that_all_are_run_are_not_told_from_blocks(batches: int) -> None:
    found = stage(Law(), 40, batches, batches, batches)
    assert found.seconds == pytest.approx(Law().seconds(40, batches), rel=1e-12)
    assert found.memory_bytes == pytest.approx(Law().bytes(40, batches), rel=1e-12)


def test_what_is_not_explained_by_blocks_and_batches_counts_in_full() -> None:
    """Of what differs between the four the largest is taken, and noise makes no time negative."""
    one, more, two, last = (Law().cost(*size) for size in ((1, 2), (1, 8), (2, 2), (2, 8)))
    more = dataclasses.replace(more, memory=more.memory + 1e8)
    found = _stage("measure", [one, more, two, last], 10, 100, WEIGHTS, HIDDEN)
    assert found.memory_bytes == pytest.approx(Law().bytes(10, 100) + 1e8, rel=1e-12)
    faster = [dataclasses.replace(cost, seconds=4.0) for cost in (more, two, last)]
    found = _stage("measure", [one, *faster], 10, 100, WEIGHTS, HIDDEN)
    assert found.seconds == 4.0


@pytest.mark.parametrize("blocks", [3, 80])
def test_what_a_gpu_holds_grows_with_blocks_and_batches(blocks: int) -> None:
    law = Law(device=True)
    found = stage(law, blocks, 100)
    assert found.memory_bytes == HELD
    assert found.seconds == pytest.approx(law.seconds(blocks, 100), rel=1e-12)
    # Half a gigabyte for the context, and a tenth for fragmentation.
    assert found.device_bytes == pytest.approx(5e8 + 1.1 * law.bytes(blocks, 100), rel=1e-12)


# Models cut short.


def config_of(name: str) -> Any:
    return (tiny_vision_model() if name == "vision" else tiny_model(name)).config


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_a_configuration_that_is_cut_is_that_of_a_model_that_runs(name: str, blocks: int) -> None:
    config = config_of(name)
    before = copy.deepcopy(config.to_dict())
    small = _cut(config, blocks)
    assert config.to_dict() == before
    model: Any = AutoModelForCausalLM.from_config(small)  # type: ignore[no-untyped-call]
    assert len(find_blocks(model)[1]) == blocks
    with torch.inference_mode():
        logits = model(torch.arange(3, 15)[None]).logits
    assert torch.isfinite(logits).all()
    whole: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    theirs = {layer.name: (layer.neurons, layer.inputs) for layer in find_layers(whole)}
    for layer in find_layers(model):
        assert theirs[layer.name] == (layer.neurons, layer.inputs)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_lists_that_have_an_entry_for_each_block_are_cut_too(name: str) -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"]
    config = tiny_model(name, num_hidden_layers=4, layer_types=kinds).config
    config.others = [1, 2, 3]  # not as many
    for blocks in (1, 2, 3):
        small = _cut(config, blocks)
        assert small.num_hidden_layers == blocks
        assert small.layer_types == kinds[:blocks]
        assert small.others == [1, 2, 3]
    assert config.layer_types == kinds


def test_a_model_of_one_block_is_made_longer() -> None:
    config = tiny_model("gemma3", num_hidden_layers=1, layer_types=["full_attention"]).config
    AutoModelForCausalLM.from_config(_cut(config, 2))  # type: ignore[no-untyped-call]


# Plans, of commands that are not run.


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of a plan; each costs what the law says."""
    lines: list[list[str]] = []

    def run(words: Sequence[str], out: Path, blocks: int, batches: int) -> planning._Cost:
        lines.append(list(words))
        folder = Path(words[1])
        small = entangle.load_model(folder)
        assert len(find_blocks(small)[1]) == blocks
        entangle.load_tokenizer(folder)
        return Law().cost(blocks, batches)

    monkeypatch.setattr(planning, "_run", run)
    return lines


@pytest.mark.parametrize("patterns", [("*",), ("*.0.*", "*.1.mlp.*"), ("*.1.*",)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plan_counts_what_the_model_has(
    name: str, patterns: tuple[str, ...], place: Path, lines: list[list[str]]
) -> None:
    model = save_tiny(place / "model", name)
    chosen = find_layers(model, patterns)
    found = planned(place, layers=patterns)
    assert (found.model, found.text) == (str(place / "model"), str(place / "text.txt"))
    assert found.layers == len(chosen)
    assert found.blocks == 1 + max(layer.block for layer in chosen)  # those before are run too
    assert found.neurons == sum(layer.neurons for layer in chosen)
    assert found.weights == sum(weight_of(layer).numel() for layer in chosen)
    assert found.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    block = sum(parameter.nbytes for parameter in find_blocks(model)[1][0].parameters())
    assert found.block_bytes == found.largest_block_bytes == block
    assert (found.windows, found.tokens) == (WINDOWS, WINDOWS * LENGTH)
    assert [stage.command for stage in found.stages] == ["measure", "sparsify"]
    for stage in found.stages:
        expected = Law().seconds(found.blocks, WINDOWS // 4)
        assert stage.seconds == pytest.approx(expected, rel=1e-12)
        assert stage.disk_bytes == FILES + found.blocks * FILE


def test_the_dtype_that_was_asked_for_or_stored_is_that_of_the_weights(
    place: Path, lines: list[list[str]]
) -> None:
    model = save_tiny(place / "model", dtype=torch.bfloat16)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert planned(place).model_bytes == 2 * size
    assert planned(place, dtype="float32").model_bytes == 4 * size


def test_commands_are_those_that_the_whole_model_would_be_run_with(
    place: Path, lines: list[list[str]]
) -> None:
    save_tiny(place / "model")
    words: dict[str, Any] = {
        "layers": ["*.1.mlp.*"],
        "input_layers": ["*.down_proj", "*.1.*.q_proj"],
    }
    planned(place, batch_size=2, bins=64, sparsity="2:4", experts=3, solve="admm", **words)
    assert [line[0] for line in lines] == ["measure"] * 5 + ["sparsify"] * 5
    for line in lines:
        said = " ".join(line)
        assert f"--text {place / 'text.txt'}" in said
        assert f"--length {LENGTH} --batch-size 2" in said
        assert "--layers *.mlp.down_proj *.mlp.gate_proj *.mlp.up_proj --windows" in said
        assert "--offload" not in said
        given = "--bins 64 --input-layers *.mlp.down_proj *.self_attn.q_proj"
        assert (given in said) == (line[0] == "measure")
        given = "--sparsity 2:4 --experts 3 --solve admm --reconstruct none"
        assert (given in said) == (line[0] == "sparsify")
    sizes = [(Path(line[1]).name, line[line.index("--windows") + 1]) for line in lines]
    assert sizes == [("1", "4"), ("1", "4"), ("1", "20"), ("2", "4"), ("2", "20")] * 2
    lines.clear()
    planned(place, offload=True, windows=3)
    assert all("--offload" in line for line in lines)
    assert {line[line.index("--windows") + 1] for line in lines} == {"4"}


def test_blocks_in_files_cost_no_memory_each(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(place / "model", num_hidden_layers=9)
    cost = Law().cost(1, 1)
    monkeypatch.setattr(
        planning, "_run", lambda _, __, b, n: dataclasses.replace(cost, blocks=b, batches=n)
    )
    found = {offload: planned(place, offload=offload).stages for offload in (False, True)}
    hidden = (5 - 2) * 4 * LENGTH * 24 * 4  # of the batches that are more than the fewest
    assert [stage.memory_bytes for stage in found[True]] == [cost.memory + hidden] * 2
    block = sum(p.nbytes for p in find_blocks(tiny_model())[1][0].parameters())
    twice = 2 * block  # the written model is loaded again
    assert found[False][1].memory_bytes == pytest.approx(cost.memory + hidden + 8 * twice)
    neurons = sum(layer.neurons for layer in find_layers(tiny_model()) if layer.block == 0)
    each = block + neurons * (4 * 1024 + planning.RUN_BYTES)
    assert found[False][0].memory_bytes == pytest.approx(cost.memory + 8 * each)


def test_a_gpu_is_planned_without_one(
    place: Path,
    lines: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_tiny(place / "model", num_hidden_layers=9)
    on_cpu, on_gpu = (planned(place, device=device).stages for device in ("cpu", "cuda:1"))
    assert all("--device cpu" in " ".join(line) for line in lines)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert cpu.device_bytes == 0
        assert gpu.device_bytes == pytest.approx(5e8 + 1.1 * cpu.memory_bytes, rel=1e-12)
        assert gpu.memory_bytes == Law().bytes(2, 5)  # the most that a command had
    # Offloaded hidden states wait on the host.
    hidden = 4 * LENGTH * 24 * 4
    cpu, gpu = (planned(place, offload=True, device=kind).stages[0] for kind in ("cpu", "cuda"))
    assert gpu.memory_bytes == cpu.memory_bytes
    expected = max(Law().bytes(2, batches) - batches * hidden for batches in (2, 5))
    assert gpu.device_bytes == pytest.approx(5e8 + 1.1 * expected, rel=1e-12)
    words = ["plan", str(place / "model"), "--text", str(place / "text.txt"), "--device", "cuda"]
    assert main([*words, "--windows", str(WINDOWS), "--length", str(LENGTH)]) == 0
    said = capsys.readouterr().out
    assert "no GPU" in said
    assert f"{on_gpu[0].device_bytes / 1e9:.2f} GB on the GPU" in said


def test_the_command_line_says_the_plan(
    place: Path, lines: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(place / "model", num_hidden_layers=20)
    words = ["plan", str(place / "model"), "--text", str(place / "text.txt")]
    words += ["--windows", str(WINDOWS), "--length", str(LENGTH), "--layers", "*.mlp.*"]
    words += ["--input-layers", "*.up_proj"]
    assert main([*words, "--json"]) == 0
    expected = dataclasses.asdict(planned(place, layers=["*.mlp.*"], input_layers="*.up_proj"))
    assert json.loads(capsys.readouterr().out) == expected
    assert main(words) == 0
    said = capsys.readouterr().out
    neurons = f"{expected['neurons']:,} neurons, 480 inputs"
    assert re.search(rf"{place / 'model'}\W.*\b60 layers.*\b20 blocks.*\b{neurons}", said)
    assert re.search(rf"\b640 tokens.*{place / 'text.txt'}.*\b20 windows\b", said)
    seconds = Law().seconds(20, 5)
    for command in ("measure", "sparsify"):
        assert re.search(rf"(?m)^- {command}: .*\b{seconds:.0f} s\b", said)
    assert "0.02 GB written" in said
    assert "GPU" not in said
    assert "largest" not in said


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "lfm2_moe"])
def test_a_configuration_is_cut_to_the_blocks_with_experts_behind_a_dense_one(name: str) -> None:
    whole = tiny_mixture(name)
    for blocks in (1, 2):
        small: Any = AutoModelForCausalLM.from_config(_cut(whole.config, blocks, 1))  # type: ignore[no-untyped-call]
        theirs = {layer.role for layer in find_layers(whole) if layer.block == 1}
        assert "mlp.experts.3.down_proj" in theirs or name == "lfm2_moe"
        for block in range(blocks):
            assert {one.role for one in find_layers(small) if one.block == block} == theirs


def test_the_command_line_says_that_a_plan_of_a_dense_block_is_not_of_the_largest(
    place: Path, lines: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture of experts behind a dense block: the experts are in what is run, if chosen."""
    save_tiny(place / "model", "qwen3")
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1, "moe_intermediate_size": 40}
    config = Qwen3MoeConfig(**sizes, num_experts=8, mlp_only_layers=[0], vocab_size=VOCABULARY)
    config.save_pretrained(place / "model")
    words = ["plan", str(place / "model"), "--text", str(place / "text.txt")]
    assert main([*words, "--json"]) == 0
    behind = json.loads(capsys.readouterr().out)
    assert "*.mlp.experts.7.down_proj" in lines[0]
    assert "*.mlp.down_proj" not in lines[0]
    dense = ["--layers", "model.layers.0.*"]  # *.0.* is expert 0 too
    assert main([*words, *dense, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    empty = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    blocks = [sum(p.nbytes for p in b.parameters()) for b in find_blocks(empty)[1]]
    assert blocks[0] < blocks[1] == blocks[2]
    assert [found["block_bytes"], found["largest_block_bytes"]] == blocks[:2]
    assert behind["block_bytes"] == behind["largest_block_bytes"] == blocks[1]
    assert main([*words, *dense]) == 0
    first, largest = (f"{size / 1e9:.2g} GB" for size in blocks[:2])
    assert re.search(rf"\b{first}.*largest.*\b{largest}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "nowhere"}, FileNotFoundError, "model.*nowhere"),
        ({"layers": ["*.up_prj"]}, LookupError, r"layer.*'\*\.up_prj'.*up_proj"),
        ({"layers": (), "input_layers": "*.up_proj"}, ValueError, "needs layers"),
        ({"length": 9999}, ValueError, "9999"),
        ({"length": 65}, ValueError, r"windows of 65.*context of 64"),
        ({"windows": 0}, ValueError, r"\b1 window.*\b0 windows of 32\b"),
        ({"sparsity": "1.5"}, ValueError, r"sparsity.*n:m.*\b1\.5"),
        ({"experts": 0}, ValueError, "expert.*0"),
        ({"bins": 1}, ValueError, r"bins.*even.*\b1\b"),
    ],
)
def test_bad_input_is_refused_before_a_command_runs(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    place: Path,
    lines: list[list[str]],
) -> None:
    save_tiny(place / "model")
    with pytest.raises(error, match=message):
        planned(place, **options)
    assert lines == []


# Commands that are run.


def test_a_command_that_fails_is_an_error_with_what_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_forks(monkeypatch)
    words = ["measure", str(place / "nowhere"), "--text", str(place / "text.txt")]
    with pytest.raises(ValueError, match=r"^measure.*\b2\b.*blocks.*model.*nowhere"):
        _run(words, place / "out", 2, 5)
    assert not (place / "out").exists()


def test_a_failed_command_without_a_word_is_told_by_its_code(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(place / "model")
    (place / "dies").write_text("#!/bin/sh\nexit 7\n")
    (place / "dies").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(place / "dies"))
    with pytest.raises(RuntimeError, match=r"^measure.*\b1\b.*blocks.*\b7\b"):
        planned(place)


def test_a_cost_is_what_the_command_wrote_and_logged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(place / "model")
    peaks = run_in_forks(monkeypatch)
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    begin = time.perf_counter()
    cost = _run([*words, "--bins", "64"], place / "out", 3, 7)
    whole = time.perf_counter() - begin
    log = json.loads((place / "out" / "log.json").read_text())
    assert (cost.blocks, cost.batches, cost.device) == (3, 7, log.get("peak_device_bytes", 0))
    assert log["seconds"] < cost.seconds < whole
    assert cost.memory == log["peak_memory_bytes"]
    assert cost.memory == pytest.approx(peaks[-1], rel=0.1)  # by the system's own count
    files = [path for path in (place / "out").rglob("*") if path.is_file()]
    assert cost.disk == sum(path.stat().st_size for path in files)


LAST_WORDS = """
import os, resource, runpy
leave = os._exit

def end(code):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
    leave(code)

os._exit = end
runpy.run_module("entangle", run_name="__main__", alter_sys=True)
"""


def run_in_forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fork the commands of a plan; return the list of their largest resident sets, in bytes."""
    peaks: list[int] = []

    def run(line: list[str], **_: Any) -> Any:
        assert line[:3] == [sys.executable, "-m", "entangle"]
        done = forked("-c", LAST_WORDS, *line[3:])
        peaks.append(int(done.stdout.splitlines()[-1]))
        return done

    monkeypatch.setattr(planning, "subprocess", SimpleNamespace(run=run))
    return peaks


def test_a_plan_of_a_model_whose_weights_are_not_there_is_what_it_then_costs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are run; on random weights, files are as large as those of the model's own."""
    peaks = run_in_forks(monkeypatch)
    save_tiny(place / "model")
    model = entangle.load_model(place / "model")
    (place / "model" / "model.safetensors").unlink()
    found = planned(place, batch_size=10, input_layers="*.up_proj")
    assert (found.blocks, found.layers, found.neurons, found.inputs) == (3, 21, 486, 3 * 24)
    assert found.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    windows = entangle.token_windows(
        place / "text.txt",
        entangle.load_tokenizer(place / "model"),
        windows=WINDOWS,
        length=LENGTH,
    )
    tokenizer = entangle.load_tokenizer(place / "model")
    entangle.measure(model, windows, input_layers="*.up_proj", out=place / "measure")
    entangle.sparsify(model, windows, sparsity=0.5, tokenizer=tokenizer, out=place / "sparsify")
    for stage in found.stages:
        files = [path for path in (place / stage.command).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        assert stage.disk_bytes == pytest.approx(size, rel=0.1)
        # A tiny model needs next to nothing beside what Python and its libraries need.
        assert stage.memory_bytes == pytest.approx(max(peaks), rel=0.25)
        assert stage.seconds > 0
        assert (stage.device_bytes > 0) == torch.cuda.is_available()
    assert len(peaks) == 10

"""The benchmark for GPUs on tiny sizes: each part runs, and each of its checks can fail."""

import math
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_experts, timing
from benchmarks.gpu_results import Result, Shape, built
from benchmarks.prune import problem
from entangle.model import experts
from entangle.numerics import histograms
from entangle.numerics.device_weights import DeviceSliced
from entangle.numerics.histograms import Histograms
from entangle.numerics.kernels import histograms_triton
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments
from tests.numerics.test_masks_triton import DEVICE, by_triton

TINY: Shape = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
PARTS: dict[str, gpu.Part] = {
    "recording": lambda: gpu.recording("tiny", TINY, 2, 32, DEVICE, 1.5, 2),
    "pruning": lambda: gpu.pruning([(24, 40), (40, 24)], DEVICE),
    "experts": lambda: gpu.expert_pruning(24, 40, 3, DEVICE),
    "router": lambda: gpu.router(64, 200, 3, DEVICE),
    "sparsify": lambda: gpu.sparsifying(TINY, 4, 32, 1, DEVICE, 1, 2),
    "mixture": lambda: gpu.sparsifying(TINY, 4, 32, 2, DEVICE, 1, 2),
    "hashing": lambda: gpu.hashing(TINY, DEVICE),
}


EXPERTS: dict[str, gpu.Part] = {
    "one token, packed": lambda: gpu_experts.packed_token([(24, 40), (9, 24)], DEVICE),
    "one token, experts": lambda: gpu_experts.mixture_token(12, 40, 3, DEVICE),
    "a prompt, experts": lambda: gpu_experts.mixture_prompt(12, 40, 3, 30, DEVICE),
    "writing": lambda: gpu_experts.writing(TINY, 3, 3, DEVICE),
}


@pytest.fixture
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_experts, "BEYOND_CACHE", 0)
    monkeypatch.setattr(gpu_experts, "side_by_side", partial(timing.side_by_side, rounds=1))


@pytest.mark.usefixtures("gpu", "few_turns")
@pytest.mark.parametrize("name", EXPERTS)
def test_each_part_with_experts_gives_its_rows(name: str) -> None:
    rows = EXPERTS[name]()
    assert len(rows) == (3 if name == "one token, packed" else 1)
    assert all(0 < row.measured < math.inf and str(row).count("|") == 7 for row in rows)


@pytest.mark.usefixtures("gpu", "few_turns")
@pytest.mark.parametrize("name", [*EXPERTS][:3])
def test_a_wrong_product_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, product in (
        (gpu_experts, "multiply_few"),
        (experts, "multiply_few"),
        (DeviceSliced, "many"),
    ):
        right = getattr(place, product)
        monkeypatch.setattr(place, product, lambda *args, right=right: 1.05 * right(*args))
    with pytest.raises(AssertionError, match=r"outputs differ by 0\.0\d"):
        EXPERTS[name]()


@pytest.mark.usefixtures("gpu", "few_turns")
def test_tokens_that_a_graph_changes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_experts, "recorded", lambda step: lambda: None)
    with pytest.raises(AssertionError, match="tokens differ without a CUDA graph"):
        EXPERTS["writing"]()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Histograms]:
    """The states that the kernel counted: bfloat16 rows, those of the device. Numba counts the host's.

    Without a GPU the kernel runs by Triton's interpreter.
    """
    states: list[Histograms] = []
    monkeypatch.setattr(histograms_triton, "_PROGRAMS", 1)  # 8 neurons each: fewer are quicker here

    def add(state: Histograms, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        if rows.dtype == torch.bfloat16:
            histograms_triton.add_rows(rows, places, *state.tensors().values())
            states.append(state)
        else:
            histograms._add_numba(state, rows, places)

    monkeypatch.setattr(histograms, "_adder", lambda _: add)
    return states


@pytest.mark.parametrize("name", PARTS)
def test_each_part_gives_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    first, *memory = PARTS[name]()
    assert 0 < first.measured < math.inf
    assert str(first).count("|") == 7
    assert all(one.what.endswith("GB") and one.measured >= 0 for one in memory)


def test_the_kernel_counts_the_rows_of_all_layers(counted: list[Histograms]) -> None:
    model = built(TINY, DEVICE)
    gpu.check_recording(model, gpu.random_tokens(model, 2, 32).to(DEVICE))
    assert len(counted) == 7
    assert all((state.count == 64).all() for state in counted)
    assert any(state.tail_count.any() for state in counted)


@pytest.mark.usefixtures("counted")
def test_a_lost_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    add = histograms_triton.add_rows
    monkeypatch.setattr(histograms_triton, "add_rows", lambda rows, *state: add(rows[:-1], *state))
    with pytest.raises(AssertionError, match=r"q_proj: .* counts differ"):
        PARTS["recording"]()


INTEGERS = [
    *("counts", "count", "steps", "tail_count", "tail_excess", "tail_square"),
    *("nonfinite", "beyond"),
]


@pytest.mark.parametrize("field", INTEGERS)
def test_one_wrong_integer_is_noticed(field: str) -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    first, second = Histograms.from_rows(rows), Histograms.from_rows(rows)
    gpu.check_integers("mlp", first, second)
    getattr(first, field)[-1] += torch.tensor(1)
    with pytest.raises(AssertionError, match=f"mlp: .* {field} differ"):
        gpu.check_integers("mlp", first, second)


def test_the_kernels_prune_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = problem(24, 40)
    pruned = by_triton(monkeypatch, weight, moments, gpu.SPARSITY).weight
    gpu.check_pruned(pruned, weight, moments)


def one_zero_more(pruned: torch.Tensor) -> None:
    pruned[3, int(pruned[3].abs().argmax())] = 0


def another_place(pruned: torch.Tensor) -> None:
    """Move one zero of each row."""
    zero, kept = (pruned == 0).int().argmax(dim=1), pruned.abs().argmax(dim=1)
    every = torch.arange(len(pruned))
    pruned[every, zero], pruned[every, kept] = pruned[every, kept], torch.tensor(0.0)


def another_weight(pruned: torch.Tensor) -> None:
    pruned *= 1.001


def not_a_number(pruned: torch.Tensor) -> None:
    pruned[0, int(pruned[0].abs().argmax())] = math.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_zero_more, "1 of 24 rows have another number of zeros"),
        (another_place, "of the mask's places differ"),
        (another_weight, "the error differs"),
        (not_a_number, "the error differs"),
    ],
)
def test_a_wrong_pruning_is_noticed(spoil: Callable[[torch.Tensor], None], message: str) -> None:
    weight, moments = problem(24, 40)
    pruned = prune(weight, moments, gpu.SPARSITY).weight
    gpu.check_pruned(pruned, weight, moments)
    spoil(pruned)
    with pytest.raises(AssertionError, match=message):
        gpu.check_pruned(pruned, weight, moments)


@pytest.mark.parametrize("part", ["pruning", "experts"])
def test_each_pruning_is_checked(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's result is spoilt; the host's is the second with one expert's moments."""
    monkeypatch.setattr(gpu, "side_by_side", lambda *_: {"published": 1.0, "ours": 1.0})
    calls: list[torch.Tensor] = []

    def first_is_wrong(weight: torch.Tensor, moments: InputMoments, sparsity: Any) -> Any:
        found = prune(weight, moments, sparsity)
        if not calls:
            found.weight.zero_()
        calls.append(found.weight)
        return found

    monkeypatch.setattr(gpu, "prune", first_is_wrong)
    with pytest.raises(AssertionError, match="another number of zeros"):
        PARTS[part]()


@pytest.mark.parametrize(
    ("measured", "goal", "least", "verdict"),
    [
        (1.35, 1.35, 1.6, "reached"),
        (1.6, 1.35, 1.6, "acceptable"),
        (1.61, 1.35, 1.6, "missed"),
        (25, 25, 15, "reached"),
        (15, 25, 15, "acceptable"),
        (14.9, 25, 15, "missed"),
        (24, 24, 24, "reached"),
        (24.1, 24, 24, "missed"),
        (math.nan, 1.35, 1.6, "missed"),
    ],
)
def test_a_row_says_whether_its_goal_is_reached(
    measured: float, goal: float, least: float, verdict: str
) -> None:
    assert Result("what", measured, goal, least, "").verdict == verdict


def test_a_part_that_differs_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def differs() -> list[Result]:
        raise AssertionError("3 counts differ")

    fine = Result("hash", 1, 2, 2, "")
    assert gpu.table([lambda: [fine]])
    assert not gpu.table([differs, lambda: [fine]])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| WRONG: 3 counts differ | | | | | |",
        "| hash | 1 | 2 | 2 | reached |  |",
    ]


def test_without_a_card_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(gpu.__file__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path[1:]])  # as `python FILE` sets it
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code == 2
    assert sys.path[0] == str(file.parents[1])
    printed = capsys.readouterr()
    assert not printed.out
    assert "needs a GPU" in printed.err
    assert printed.err.count("\n") == 1

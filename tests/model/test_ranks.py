"""Shards, and ranks under torchrun: each counts its own batches, and together they count what one does."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xarray as xr

import entangle
from entangle.__main__ import main
from entangle.measurement import measuring
from entangle.measurement.measuring import measure
from entangle.model import ranks
from entangle.model.ranks import Shard
from entangle.model.sampling import walk_blocks
from entangle.numerics.histograms import MAX_TOKENS, Histograms
from entangle.numerics.kernels.bins import MAX_SQUARES
from entangle.runs.store import open_run
from tests.command_lines import running
from tests.forking import forked, forked_ranks
from tests.measurement.test_recording import LATTICE, captured, flat, tokens, windows_of
from tests.tiny_models import save_tiny, tiny_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
LOOSE = {"skewness", "kurtosis", "powers"}  # float64 sums, whose order is another
WORDS = "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly. "


def torchrun(processes: int, *words: str | Path) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *start, *map(str, words)]


def ran(
    words: Sequence[str], *, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that does not end is killed with all that it started."""
    with subprocess.Popen(
        words,
        env=ENVIRONMENT | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill_all(process)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started: torchrun's ranks outlive it."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.kill()
    process.wait()


def datasets(tree: xr.DataTree) -> list[xr.Dataset]:
    """Return a run's neurons, its histograms and its text."""
    nodes = (tree, tree.children["histogram"], tree.children["text"])
    return [node.to_dataset(inherit=False) for node in nodes]


def assert_same_run(found: xr.DataTree, whole: xr.DataTree) -> None:
    """Assert that two runs are the same bits, but for what is loose, which agrees to 1e-9."""
    assert set(found.children) == set(whole.children) == {"histogram", "text"}
    for one, other in zip(datasets(found), datasets(whole), strict=True):
        assert set(one.variables) == set(other.variables)
        for name in map(str, other.variables):
            a, b = one[name], other[name]
            assert (a.dims, a.dtype, a.attrs) == (b.dims, b.dtype, b.attrs), name
            if name in LOOSE:
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=name)


# Which batches are whose.


@pytest.mark.parametrize(("text", "shard"), [("1/1", (0, 1)), ("3/8", (2, 8)), ("8/8", (7, 8))])
def test_a_shard_is_read_as_it_is_written(text: str, shard: tuple[int, int]) -> None:
    assert Shard.parse(text) == Shard(*shard)
    assert str(Shard.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "3", "/8", "3/", "0/8", "9/8", "-1/8", "3/0", "1/0", "a/b", "3/8/9", "1.0/2", "²/3"],
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"shard.*{re.escape(repr(text))}"):
        Shard.parse(text)


@pytest.mark.parametrize("of", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_each_batch_is_in_exactly_one_shard_and_none_has_two_more_than_another(
    count: int, of: int
) -> None:
    parts = [Shard(number, of).batches(count) for number in range(of)]
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(list(part) == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_there_is_one_rank_and_nothing_is_sent() -> None:
    assert (ranks.count(), ranks.rank(), ranks.shard()) == (1, 0, Shard(0, 1))
    tensor = torch.tensor([1.0, math.nan, -3.0])
    for change in (ranks.all_reduce_sum_, ranks.all_reduce_min_, ranks.all_reduce_max_):
        change(tensor)
    assert torch.equal(tensor.nan_to_num(7), torch.tensor([1.0, 7.0, -3.0]))
    thing = object()
    assert ranks.all_gather(thing)[0] is thing
    with ranks.rank_zero_runs({"a": 1}):
        pass
    ranks.wait_for_rank_zero({"a": 1})
    with pytest.raises(KeyError, match="as it was"), ranks.rank_zero_runs("what"):
        raise KeyError("as it was")


@pytest.mark.parametrize("skip_first", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shard", ["1/3", "2/3", "3/3", "4/4"])
def test_a_shard_counts_its_batches_and_no_others(name: str, shard: str, skip_first: int) -> None:
    model, windows = tiny_model(name), windows_of(tokens(7))
    run = measure(model, windows, batch_size=2, skip_first=skip_first, shard=shard)
    number, of = map(int, shard.split("/"))
    mine = windows.tokens.split(2)[number - 1 :: of]
    with captured(model) as outputs:
        for batch in mine:
            model(batch)
    rows = flat(outputs, skip_first)
    assert run.attrs["tokens"] == len(rows) == sum(map(len, mine)) * (16 - skip_first)
    assert (run["count"] == len(rows)).all()
    np.testing.assert_array_equal(run["min"], rows.min(axis=0))
    np.testing.assert_array_equal(run["max"], rows.max(axis=0))
    # All shards have the bins of the first batch, whether they count it or not.
    with captured(model) as first:
        model(windows.tokens[:2])
    pilot = flat(first, skip_first)
    scale = run["histogram/scale"].to_numpy()
    np.testing.assert_allclose(run["histogram/center"], pilot.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale, pilot.std(axis=0), rtol=1e-5)
    off = np.abs(run["mean"].to_numpy() - rows.mean(axis=0)) / scale
    assert (off <= LATTICE).all()


def test_a_shard_says_of_what_it_is_one() -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(7))
    with running("as said"):
        whole = measure(model, windows, batch_size=2)
    assert "shard" not in whole.attrs
    for shard, counted in (("1/3", 3), ("2/3", 2), ("3/3", 2)):  # the fourth batch is one window
        with running("as said"):
            attributes = measure(model, windows, batch_size=2, shard=shard).attrs
        assert attributes == whole.attrs | {"tokens": 16 * counted, "shard": shard}
        assert list(attributes)[-1] == "shard"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "5/5"}, r"shard 5/5 .*no batch.*\b4\b.*\b2 windows"),
        ({"shard": "1/2", "difficulty": 9}, r"difficulty.*shard 1/2"),
        ({"shard": "3/2"}, r"shard.*'3/2'"),
        ({"shard": ""}, r"shard.*''"),
    ],
)
def test_shards_that_cannot_be_are_refused_before_the_model_runs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, passes = tiny_model(), []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=message):
        measure(model, windows_of(tokens(7)), batch_size=2, out=tmp_path / "run", **options)
    assert passes == []
    assert list(tmp_path.iterdir()) == []


# Going on after an error, in one process.


class HaltError(Exception):
    pass


def save_after_each_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time stand still but for the model's passes, so that to save costs none."""
    passes: list[int] = []
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: len(passes)))
    monkeypatch.setattr(measuring, "SECONDS", 0.0)


def stopping(model: Any, passes: int) -> Callable[[], None]:
    """Let a model run so many times, and then raise; return what undoes it."""
    left = iter(range(passes))

    def stop(*_: Any) -> None:
        if next(left, None) is None:
            raise HaltError

    return model.base_model.register_forward_pre_hook(stop).remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("shard", [None, "1/2", "2/2"])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    shard: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(25))
    save_after_each_batch(model, monkeypatch)
    words: dict[str, Any] = {"batch_size": 2, "shard": shard, "input_layers": "*.c_proj"}
    unbroken = measure(model, windows, **words)
    for _ in range(2):
        undo = stopping(model, 2)
        with pytest.raises(HaltError):
            measure(model, windows, **words, out=tmp_path / "run")
        undo()
    passes: list[int] = []
    count = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    run = measure(model, windows, **words, out=tmp_path / "run")
    count.remove()
    # Of 13 batches, or 7, or 6 and the first, which places the bins, four were saved.
    assert len(passes) == (13 if shard is None else 7) - 4
    assert run.identical(unbroken)
    assert open_run(tmp_path / "run").load().identical(unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.json",
        "neurons.zarr",
        "run.json",
        "text.npy",
    ]


def test_another_shard_does_not_go_on_with_what_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(13))
    save_after_each_batch(model, monkeypatch)
    undo = stopping(model, 2)
    with pytest.raises(HaltError), running("as said"):
        measure(model, windows, batch_size=2, shard="1/3", out=tmp_path / "run")
    undo()
    with pytest.raises(FileNotFoundError, match=r"run\.partial .*unfinished"):
        open_run(tmp_path / "run.partial")
    began = f"as said --shard 1/3 --out {tmp_path / 'run'}"
    for other in ("2/3", "1/2", None):
        with pytest.raises(FileExistsError, match=r"unfinished.*settings.*--overwrite") as error:
            measure(model, windows, batch_size=2, shard=other, out=tmp_path / "run")
        assert f"shard: 1/3, now {other or 'none'}" in str(error.value)
        assert began in str(error.value)
    run = measure(model, windows, batch_size=2, out=tmp_path / "run", overwrite=True)
    assert run.identical(measure(model, windows, batch_size=2))


# The reduction.


def random_state(seed: int, *, neurons: int = 5, bins: int = 16) -> Histograms:
    """Return a state in bins that are the same for all seeds, some of its numbers near the limits."""
    rng = torch.Generator().manual_seed(seed)
    pilot = torch.randn(50, neurons, generator=torch.Generator().manual_seed(99))
    state = Histograms.zeros(neurons, bins=bins)
    state.start(pilot)
    state.add(torch.randn(100 + seed, neurons, generator=rng) * torch.logspace(0, 8, neurons))
    state.nonfinite.copy_(torch.randint(0, 9, (neurons,), generator=rng))
    state.beyond.copy_(torch.randint(0, 9, (neurons,), generator=rng))
    state._mark_nonfinite()
    return state


def reduced(states: Sequence[Histograms]) -> Histograms:
    """Return what `reduce_` makes of the first of these states, the ranks' (they are left).

    What a rank gives to a collective does not hang on what it got from the one before. So each of
    the others runs alone first, and what it gave is kept for when the first asks.
    """
    kinds = ("add", "least", "most")
    given: list[list[tuple[str, torch.Tensor]]] = []
    for state in states[1:]:
        kept: list[tuple[str, torch.Tensor]] = []

        def keep(tensor: torch.Tensor, *, kind: str, kept: Any = kept) -> None:
            kept.append((kind, tensor.clone()))

        copy_of(state).reduce_(*(functools.partial(keep, kind=kind) for kind in kinds))
        given.append(kept)
    queues = [iter(kept) for kept in given]
    combine: dict[str, Callable[..., torch.Tensor]] = {
        "add": torch.add,
        "least": torch.minimum,
        "most": torch.maximum,
    }

    def collective(tensor: torch.Tensor, *, kind: str) -> None:
        for queue in queues:
            asked, other = next(queue)
            assert asked == kind
            assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(combine[kind](tensor, other))

    first = copy_of(states[0])
    mine = first.tensors()
    first.reduce_(*(functools.partial(collective, kind=kind) for kind in kinds))
    assert all(first.tensors()[name] is tensor for name, tensor in mine.items())  # in place
    assert [next(queue, None) for queue in queues] == [None] * len(queues)
    return first


def copy_of(state: Histograms) -> Histograms:
    return Histograms(**{name: tensor.clone() for name, tensor in state.tensors().items()})


def equal(one: Histograms, other: Histograms) -> bool:
    for name, tensor in one.tensors().items():
        if name == "powers":
            assert torch.allclose(tensor, other.powers, rtol=1e-9)
        else:
            torch.testing.assert_close(
                tensor, other.tensors()[name], rtol=0, atol=0, equal_nan=True, msg=name
            )
    return True


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_reducing_is_merging(count: int) -> None:
    states = [random_state(seed) for seed in range(count)]
    merged = functools.reduce(Histograms.merged, states)
    assert equal(reduced(states), merged)
    assert equal(reduced(states[::-1]), merged)
    empty = random_state(0)
    for name in ("counts", "count", "steps", "powers", "tail_count", "tail_excess", "tail_square"):
        empty.tensors()[name].zero_()
    for name in ("nonfinite", "beyond"):
        empty.tensors()[name].zero_()
    empty.minimum.fill_(math.inf)
    empty.maximum.fill_(-math.inf)
    assert equal(reduced([empty, *states]), merged)  # of a rank without a batch
    assert equal(reduced([*states, empty]), merged)


@pytest.mark.parametrize(
    ("squares", "total"),
    [
        ([1, 2, 3], 6),
        ([2**32 - 1] * 3, 3 * (2**32 - 1)),  # the lower halves carry
        ([2**61 - 1, 2**61 - 1, 1], 2**62 - 1),
        ([2**61, 2**61], MAX_SQUARES),
        ([2**61 + 5, 2**61, 7], MAX_SQUARES),
        ([MAX_SQUARES - 1, 1], MAX_SQUARES),
        ([MAX_SQUARES - 2**31, 2**31 - 1], MAX_SQUARES - 1),
        ([MAX_SQUARES, 0, 0], MAX_SQUARES),
        ([0, MAX_SQUARES], MAX_SQUARES),
        ([MAX_SQUARES] * 2, MAX_SQUARES),
        ([MAX_SQUARES] * 3, MAX_SQUARES),  # whose sum int64 does not hold
        ([MAX_SQUARES - 1] * 9, MAX_SQUARES),
    ],
)
def test_squares_of_tails_stop_where_merged_ones_do(squares: list[int], total: int) -> None:
    states = [random_state(seed) for seed in range(len(squares))]
    for state, square in zip(states, squares, strict=True):
        state.tail_square[2, 1] = square
    found = reduced(states)
    assert int(found.tail_square[2, 1]) == min(sum(squares), MAX_SQUARES) == total
    assert equal(found, functools.reduce(Histograms.merged, states))
    assert found.invalid()[2] == (
        total == MAX_SQUARES or bool(found.nonfinite[2] + found.beyond[2])
    )


def test_more_tokens_than_counts_can_hold_are_refused_and_as_many_are_not() -> None:
    states = [random_state(seed) for seed in range(3)]
    for state, count in zip(states, (2**30, 2**30 - 2, 1), strict=True):
        state.count.fill_(count)
    assert int(reduced(states).count[0]) == 2**31 - 1 == MAX_TOKENS
    states[1].count[3] += 1  # of one neuron
    for order in (states, states[::-1]):
        with pytest.raises(OverflowError, match=f"{MAX_TOKENS} tokens"):
            reduced(order)
        with pytest.raises(OverflowError):
            functools.reduce(Histograms.merged, order)


@pytest.mark.parametrize("name", ["center", "scale"])
@pytest.mark.parametrize("factor", [1 + 1e-7, 0.5])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_states_with_other_bins_are_refused(name: str, factor: float, which: int) -> None:
    states = [random_state(seed) for seed in range(3)]
    states[which].tensors()[name][1::2] *= factor
    with pytest.raises(ValueError, match=r"\b2 of 5 neurons.*bins.*process"):
        reduced(states)


def test_a_state_without_bins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\b5 of 5 neurons.*bins.*process"):
        reduced([random_state(0), Histograms.zeros(5, bins=16)])


def test_a_copy_on_a_device_is_a_copy() -> None:
    state = random_state(1)
    copy = state.to(torch.device("cpu"))
    assert equal(copy, state)
    copy.count.add_(1)
    assert (copy.count == state.count + 1).all()
    shapes = {name: tensor.shape for name, tensor in state.tensors().items()}
    away = state.to(torch.device("meta"))
    assert {tensor.device.type for tensor in away.tensors().values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in away.tensors().items()} == shapes


# Under torchrun.


TOGETHER = """
import json, os, sys
import numpy as np
import torch
from pathlib import Path
from torch import distributed

import entangle
from entangle.__main__ import main
from entangle.model import ranks
from entangle.model.kept_logits import keep_logits
from tests.model.test_ranks import odd, random_state, told, windows_of, tokens
from tests.tiny_models import tiny_model

folder = Path(sys.argv[1])
ranks.join()
del os.environ["TORCHELASTIC_RUN_ID"]  # joined: commands below need not
rank, said = ranks.rank(), {}
said["who"] = [rank, ranks.count(), str(ranks.shard()), ranks.all_gather({"rank": rank})]

for name, windows in (("seven", 7), ("three", 3), ("one", 1)):  # of batches: 4, 2 and 1
    run = entangle.measure(tiny_model("gpt2"), windows_of(tokens(windows)), batch_size=2)
    entangle.measure(
        tiny_model("gpt2"), windows_of(tokens(windows)), batch_size=2, out=folder / name
    )
    written = entangle.open_run(folder / name) if rank == 0 else None
    said[name] = {
        "attributes": run.attrs,
        "sums": {str(key): told(value) for key, value in run.to_dataset().variables.items()},
        "histogram": {
            str(key): told(value) for key, value in run["histogram"].to_dataset().variables.items()
        },
        "written": written is None or written.load().identical(run),
    }
score = entangle.perplexity(tiny_model("gpt2"), windows_of(tokens(7)), batch_size=2, skip_first=3)
broken, spoilt = tiny_model("llama"), tokens(7)
spoilt[2, 5] = 1  # which is in no other window, and is rank 1's
with torch.no_grad():
    broken.get_input_embeddings().weight[1] = torch.nan
said["score"] = [score.window_nats.tolist(), score.tokens, score.perplexity]
kept = keep_logits(tiny_model("gpt2", seed=1), windows_of(tokens(7)), batch_size=2)
score = entangle.perplexity(tiny_model("gpt2"), windows_of(tokens(7)), against=kept, batch_size=2)
said["divergence"] = score.divergence.columns()
said["repetition"] = entangle.repetition(
    tiny_model("gpt2"), windows_of(tokens(7)), prompt_tokens=4, tokens=6, batch_size=3
).columns()

state = random_state(rank)
state.reduce_(ranks.all_reduce_sum_, ranks.all_reduce_min_, ranks.all_reduce_max_)
torch.save(state.tensors(), folder / f"reduced-{rank}.pt")

def error(work):
    try:
        work()
    except Exception as caught:
        return [type(caught).__name__, str(caught)]
    return None

said["bins"] = error(lambda: odd(rank).reduce_(ranks.all_reduce_sum_, ranks.all_reduce_min_, ranks.all_reduce_max_))
def lead(what, fails=False):
    if rank > 0:
        return ranks.wait_for_rank_zero(what)
    with ranks.rank_zero_runs(what):
        if fails:
            raise KeyError("of rank 0")
said["agreed"] = error(lambda: lead({"a": 1}))
said["failed"] = error(lambda: lead({"a": 1}, fails=True))
said["other"] = error(lambda: lead({"a": int(rank == 2)}))
said["other run"] = error(
    lambda: entangle.measure(
        tiny_model("gpt2", seed=int(rank == 1)), windows_of(tokens(3)), out=folder / "mixed"
    )
)
said["taken"] = error(
    lambda: entangle.measure(tiny_model("gpt2"), windows_of(tokens(3)), out=folder / "seven")
)
said["shard"] = error(
    lambda: entangle.measure(tiny_model("gpt2"), windows_of(tokens(3)), shard="1/3")
)
said["broken"] = error(lambda: entangle.perplexity(broken, windows_of(spoilt), batch_size=2))
said["afterwards"] = error(lambda: lead("still in step"))
(folder / f"{rank}.json").write_text(json.dumps(said))
"""


def told(variable: xr.Variable) -> list[Any]:
    """Return what is equal only for equal bits, as JSON has it."""
    values = variable.to_numpy()
    return [str(values.dtype), list(values.shape), values.tobytes().hex()]


def odd(rank: int) -> Histograms:
    """Return a rank's state, of which that of rank 1 has one neuron's bins elsewhere."""
    state = random_state(rank)
    state.center[3] += rank == 1
    return state


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks did and said."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "together.py").write_text(TOGETHER)
    done = forked_ranks(3, folder / "together.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def said(together: Path) -> list[dict[str, Any]]:
    return [json.loads((together / f"{rank}.json").read_text()) for rank in range(3)]


def test_each_process_knows_who_it_is(said: list[dict[str, Any]]) -> None:
    everyone = [{"rank": rank} for rank in range(3)]
    for rank in range(3):
        assert said[rank]["who"] == [rank, 3, f"{rank + 1}/3", everyone]


@pytest.mark.parametrize(("name", "count"), [("seven", 7), ("three", 3), ("one", 1)])
def test_ranks_measure_what_one_process_does_and_all_return_it(
    name: str, count: int, together: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Four batches of which the last is smaller; two, and one, so that some ranks have none."""
    windows = windows_of(tokens(count))
    whole = measure(tiny_model("gpt2"), windows, batch_size=2, out=tmp_path / "whole")
    assert_same_run(open_run(together / name), whole)
    for file in ("run.json",):
        assert (together / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for rank in range(3):
        assert said[rank][name]["written"]
        assert said[rank][name]["attributes"] == whole.attrs
        for key, expected in zip(("sums", "histogram"), datasets(whole)[:2], strict=True):
            exact = {
                n
                for n in map(str, expected.variables)
                if n not in LOOSE and expected[n].dtype.kind != "U"
            }
            assert len(exact) >= 12
            for n in exact:
                assert said[rank][name][key][n] == told(expected[n].variable), n
            assert said[rank][name][key] == said[0][name][key]  # in all bits, these too
    assert sorted(path.name for path in (together / name).iterdir()) == [
        "log.json",
        "neurons.zarr",
        "run.json",
        "text.npy",
    ]


def test_ranks_score_what_one_process_does(said: list[dict[str, Any]]) -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(7))
    score = entangle.perplexity(model, windows, batch_size=2, skip_first=3)
    assert np.isfinite(score.window_nats).all()
    assert (score.window_nats > 0).all()
    for rank in range(3):
        assert said[rank]["score"] == [score.window_nats.tolist(), score.tokens, score.perplexity]
    dense = tiny_model("gpt2", seed=1)
    divergence = entangle.perplexity(model, windows, against=dense, batch_size=2).divergence
    written = entangle.repetition(model, windows, prompt_tokens=4, tokens=6, batch_size=3)
    assert divergence is not None
    assert divergence.kl.min() > 0
    for rank in range(3):
        assert said[rank]["divergence"] == divergence.columns()
        assert said[rank]["repetition"] == written.columns()


def test_ranks_reduce_as_states_merge(together: Path) -> None:
    merged = functools.reduce(Histograms.merged, [random_state(rank) for rank in range(3)])
    for rank in range(3):
        assert equal(Histograms(**torch.load(together / f"reduced-{rank}.pt")), merged)


def test_all_ranks_refuse_what_one_has_otherwise(
    together: Path, said: list[dict[str, Any]]
) -> None:
    for rank in range(3):
        kind, message = said[rank]["bins"]
        assert kind == "ValueError"
        assert re.search(r"\b1 of 5 neurons.*bins.*process", message)
        assert said[rank]["agreed"] is None
        expected = ("KeyError", "'of rank 0'") if rank == 0 else ("StoppedError", "rank 0 ")
        kind, message = said[rank]["failed"]
        assert kind == expected[0]
        assert expected[1] in message
        kind, message = said[rank]["other"]
        assert kind == "RuntimeError"
        assert re.match(r"rank 2 .*other arguments.*model", message)
        kind, message = said[rank]["other run"]
        assert kind == "RuntimeError"
        assert re.match(r"rank 1 .*other arguments.*model", message)
        kind, message = said[rank]["taken"]
        assert (kind, "seven exists" in message) == (
            ("FileExistsError", True) if rank == 0 else ("StoppedError", False)
        )
        kind, message = said[rank]["broken"]
        assert kind == "NotFiniteError"
        assert re.search(r"not finite.*\b1 of 7 windows", message)
        kind, message = said[rank]["shard"]
        assert kind == "ValueError"
        assert re.search(r"torchrun.*shard 1/3", message)
        assert said[rank]["afterwards"] is None
    assert not list(together.glob("mixed*"))


# The command line.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text(WORDS * 60)
    return folder


def measured(place: Path, out: Path, *options: str) -> list[str]:
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    return [*words, "--windows", "13", "--batch-size", "4", *options, "--out", str(out)]


@pytest.mark.parametrize("options", [[], ["--difficulty", "20"]])
def test_the_command_line_in_two_processes(
    options: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(measured(place, tmp_path / "one", *options)) == 0
    alone = capsys.readouterr().out
    words = measured(place, tmp_path / "zwei ½", *options)
    done = forked_ranks(2, "-m", "entangle", *words)
    assert done.returncode == 0, done.stderr
    assert_same_run(open_run(tmp_path / "zwei ½"), open_run(tmp_path / "one"))
    for file in ["run.json", *(["tables/difficulty.csv"] if options else [])]:
        assert (tmp_path / "zwei ½" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert (tmp_path / "zwei ½" / "figures" / "difficulty.png").is_file() == bool(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "zwei ½"]

    def findings(said: str) -> list[str]:  # said once, and the same but for what it cost, and where
        return [line for line in said.splitlines() if str(tmp_path) not in line]

    assert findings(done.stdout) == findings(alone)
    assert "Traceback" not in done.stderr


def test_scoring_on_the_command_line_in_two_processes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["perplexity", str(place / "model"), "--text", str(place / "text.txt")]
    words += ["--length", "32", "--windows", "13", "--batch-size", "4", "--json"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    done = forked_ranks(2, "-m", "entangle", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone


def test_a_command_for_one_process_is_refused_in_several(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    out = tmp_path / "run"
    assert main(["merge", str(place / "a"), str(place / "b"), "--out", str(out)]) == 2
    assert re.search(r"\bmerge .*torchrun", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_slips_in_a_shard_are_told_on_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in [
        (["--shard", "4"], r"shard.*'4'"),
        (["--shard", "5/5"], r"shard 5/5 .*no batch.*\b4\b.*\b4 windows"),
        (["--shard", "1/2", "--difficulty", "9"], r"difficulty.*shard 1/2"),
    ]:
        assert main(measured(place, tmp_path / "run", *options)) == 2
        said = capsys.readouterr().err
        assert re.search(message, said)
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_with_a_link_as_target_nothing_is_left_beside_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "run")
    done = forked_ranks(2, "-m", "entangle", *measured(place, tmp_path / "link"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "link").is_symlink()
    assert main(measured(place, tmp_path / "one")) == 0
    assert_same_run(open_run(tmp_path / "far" / "run"), open_run(tmp_path / "one"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link", "one"]
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["run"]


# Other numbers of processes go on with what some left.


PARTLY = """
import sys
from types import SimpleNamespace

import entangle
from entangle.__main__ import main
from entangle.measurement import measuring
from entangle.model.sampling import walk_blocks

load, left, passes = entangle.load_model, int(sys.argv[1]), []
measuring.time = SimpleNamespace(monotonic=lambda: len(passes))  # to save costs no time
measuring.SECONDS = 0.0

def load_model(*args, **options):
    model = load(*args, **options)
    def stop(*_):
        if len(passes) == left:
            raise RuntimeError("stopped here")
        passes.append(1)
    model.base_model.register_forward_pre_hook(stop)
    return model

entangle.load_model = load_model
sys.exit(main(sys.argv[2:]))
"""


def test_another_number_of_processes_does_not_go_on_wrongly(place: Path, tmp_path: Path) -> None:
    """It counts each batch once, and begins anew: a batch is another rank's now."""
    runs_to = tmp_path / "runs"
    runs_to.mkdir()
    words = measured(place, runs_to / "run", "--batch-size", "2")
    stopped = forked_ranks(2, "-c", PARTLY, "3", *words)
    assert stopped.returncode != 0
    assert "stopped here" in stopped.stderr
    partial = runs_to / "run.partial"
    assert list((partial / "state").glob("*.safetensors"))
    done = forked("-m", "entangle", *words)
    assert done.returncode == 0, done.stderr
    assert main(measured(place, tmp_path / "one", "--batch-size", "2")) == 0
    assert_same_run(open_run(runs_to / "run"), open_run(tmp_path / "one"))


# What is pruned by several processes.

PRUNED = """
import json, os, random, string, sys
from pathlib import Path
import torch
import entangle
from entangle.model import ranks
from entangle.model.text import TokenWindows
from entangle.pruning import reconstruction

torch.set_num_threads(1)
if "TORCHELASTIC_RUN_ID" in os.environ:
    ranks.join()
place, out = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = entangle.load_tokenizer(place / "model")
windows = entangle.token_windows(place / "text.txt", tokenizer, windows=13, length=32)
letters = "".join(random.Random(0).choices(string.ascii_letters, k=128))
calibration, evaluation = windows[:9], entangle.token_windows([letters], tokenizer, length=32)
model = entangle.load_model(place / "model", offload=out / "files")
entangle.measure(model, windows, batch_size=2, input_layers="*.1.*", out=out / "measured")
found = {}
for words in (
    {"across": "owl"},
    {"experts": 3, "propagate": "dense"},
    {"experts": 3, "propagate": "dense", "assign": "random"},
    {"method": "wanda"},
    {"budget": "trim"},
):
    model = entangle.load_model(place / "model")
    # Greedy, since the number of steps of exact depends on rounding.
    words |= {"sparsity": 0.5, "solve": "greedy", "batch_size": 2}
    pruned = entangle.sparsify(model, calibration, **words)
    rows = pruned.layers[["layer", "zeros", "error", "tokens", "clusters", "damping"]]
    nats = entangle.perplexity(model, evaluation, batch_size=2).nats
    found[str(words)] = {**rows.to_dict(orient="list"), "nats": nats}
# Each half of the vocabulary is a cluster, and every other batch, which is a process's, of one half.
model = entangle.load_model(place / "model")
table = model.get_input_embeddings().weight.data
table[130:] += 5
table[:130] -= 5
tokens = torch.randint(3, 130, (5, 2, 32), generator=torch.Generator().manual_seed(0))
tokens[::2] += 127
halves = TokenWindows(tokens.flatten(0, 1), "halves", 10, 0, "never")
words = {"sparsity": 0.5, "solve": "greedy", "experts": 2, "propagate": "dense", "batch_size": 2}
pruned = entangle.sparsify(model, halves, **words)
rows = pruned.layers[["layer", "zeros", "error", "tokens", "smallest_cluster"]]
nats = entangle.perplexity(model, halves, batch_size=2).nats
found["halves"] = {**rows.to_dict(orient="list"), "nats": nats}
model = entangle.load_model(place / "model")
words = {"propagate": ["dense"], "method": ["wanda", "magnitude"], "batch_size": 2}
table = entangle.sweep(model, calibration, evaluation, sparsity=[0.5], **words)
found["sweep"] = {"nats": table["nats"].tolist(), "held": table["held_out_error"].tolist()[1:]}
model = entangle.load_model(place / "model")
words = {"sparsity": 0, "inputs": "teal", "input_sparsity": 0.25, "batch_size": 2}
words |= {"layers": ["*.1.mlp.up_proj", "*.1.mlp.down_proj"]}
rows = entangle.sparsify(model, calibration, **words).layers  # greedy shares
names = ["layer", "input_share", "input_threshold", "realised_inputs", "multiply_adds"]
nats = entangle.perplexity(model, evaluation, batch_size=2).nats
found["inputs"] = {**rows[names].to_dict(orient="list"), "nats": nats}
model = entangle.load_model(place / "model")
reconstruction.RATE = 5e-3  # a higher rate fits the few tokens too closely
words = {"sparsity": 0.5, "solve": "greedy", "layers": "*.0.mlp.*", "batch_size": 2}
words |= {"reconstruct": "mlp"}
tuned = entangle.sparsify(model, calibration, **words).layers
sums = [float(parameter.double().abs().sum()) for parameter in model.parameters()]
found["tuned"] = tuned[["layer", "zeros", "mlp_error_before", "mlp_error"]].to_dict(orient="list")
found["tuned"]["different"] = len({tuple(one) for one in ranks.all_gather(sums)})
if ranks.rank() == 0:
    print(json.dumps(found))
"""


def test_two_processes_prune_as_one_does(place: Path, tmp_path: Path) -> None:
    found = []
    for name, run in (("one", forked), ("two", functools.partial(forked_ranks, 2))):
        (tmp_path / name).mkdir()
        done = run("-c", PRUNED, place, tmp_path / name)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    one, two = (open_run(tmp_path / name / "measured") for name in ("one", "two"))
    assert_same_run(two, one)
    alone, shared = found
    # A step of two processes takes two batches, so the weights are others, but the same in both.
    tuned = [one.pop("tuned") for one in found]
    for one in tuned:
        assert max(one["mlp_error"]) < min(one["mlp_error_before"])
        assert one["mlp_error_before"] == pytest.approx(tuned[0]["mlp_error_before"], rel=1e-3)
        assert one["zeros"] == tuned[0]["zeros"]
        assert one["different"] == 1
    assert shared.keys() == alone.keys()
    assert len({*alone["inputs"]["input_share"]}) > 1
    # All tokens of the second process, whose layers know no other cluster.
    assert alone["halves"]["smallest_cluster"].count(2 * 2 * 32) > 3
    for words, expected in alone.items():
        for name, values in expected.items():
            if name in {"layer", "zeros", "tokens", "clusters", "smallest_cluster", "damping"}:
                assert shared[words][name] == values, (words, name)
            else:  # Grams are other sums
                assert shared[words][name] == pytest.approx(values, rel=1e-3), (words, name)


def test_more_processes_than_batches_are_too_many(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    model = entangle.load_model(place / "model")
    tokenizer = entangle.load_tokenizer(place / "model")
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=4, length=32)
    with pytest.raises(RuntimeError, match=r"\b2 batches of 2 windows.*\b3 processes"):
        walk_blocks(model, windows, 2, 0)

"""Sweeps: each arm against the same pruning done alone, and a table that a kill does not change."""

import dataclasses
import json
import math
import re
import signal
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

import entangle
from entangle.experiments import sweeping
from entangle.experiments.sweep_table import read_table
from entangle.model import packing
from entangle.model.blocks import BlockWalk
from entangle.model.divergence import COLUMNS
from entangle.model.experts import PackedLinear
from entangle.model.layers import find_layers, weight_of, write_weight
from entangle.model.mixing import mixed_windows
from entangle.model.scoring import NotFiniteError
from entangle.model.text import TokenWindows
from entangle.numerics.rounding import round_to_nearest, rounded_bytes
from entangle.runs import setup
from entangle.show import plots
from tests.forking import Forked, forked
from tests.pruning.test_sparsifying import placed, random_windows
from tests.tiny_models import tiny_model

METHODS = ("sparsegpt", "wanda", "magnitude")
OPTIONS: dict[str, Any] = {"layers": ["*.self_attn.*", "*.gate_proj"], "batch_size": 2}


def held_out(windows: int = 5) -> Any:
    return random_windows(windows, seed=7)


def run(model: PreTrainedModel, sparsities: Sequence[str | float], **options: Any) -> pd.DataFrame:
    return entangle.sweep(
        model, random_windows(), held_out(), sparsity=sparsities, **OPTIONS | options
    )


def same_weights(model: PreTrainedModel) -> bool:
    dense = tiny_model("llama").state_dict()
    return all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_each_arm_scores_as_the_model_pruned_alone(device: torch.device) -> None:
    model = placed(tiny_model("llama"), device)
    table = run(model, ["0.5", "2:4"], mask=("row", "block"), propagate=("dense", "sparse"))
    assert same_weights(model.cpu())
    assert len(table) == 1 + 2 * (2 * 2 + 2) + 3  # sparsegpt, wanda; magnitude; n:m by row only
    dense = entangle.perplexity(placed(tiny_model("llama"), device), held_out(), batch_size=2)
    assert table["method"][0] == "dense"
    assert (table["perplexity"][0], table["ratio"][0]) == (dense.perplexity, 1)
    assert [table[name][0] for name in COLUMNS[::2]] == [0, 0, 1, 0, 0]
    for arm in table[1:].to_dict(orient="records"):
        alone = placed(tiny_model("llama"), device)
        words = {name: arm[name] for name in ("method", "mask", "propagate")}
        found = entangle.sparsify(
            alone, random_windows(), sparsity=arm["sparsity"], **words, **OPTIONS
        )
        unpruned = placed(tiny_model("llama"), device)
        score = entangle.perplexity(alone, held_out(), against=unpruned, batch_size=2)
        tolerance = 0 if device.type == "cpu" else 1e-6
        assert score.divergence is not None
        found_columns = {name: arm[name] for name in COLUMNS}
        assert found_columns == pytest.approx(score.divergence.columns(), rel=tolerance)
        assert arm["nats"] == pytest.approx(score.nats, rel=tolerance), words
        assert arm["perplexity_error"] == pytest.approx(score.perplexity_error, rel=tolerance)
        change = score.window_nats - dense.window_nats
        assert arm["difference"] == pytest.approx(np.mean(change), rel=1e-12)
        assert arm["difference_error"] == pytest.approx(np.std(change, ddof=1) / math.sqrt(5))
        assert arm["ratio"] == pytest.approx(score.perplexity / dense.perplexity, rel=1e-9)
        assert arm["realised"] == found.sparsity
        assert arm["layer_error"] == found.error
        assert 0 < arm["held_out_error"] < 1
        zeros = sum(int((p == 0).sum()) for p in alone.parameters())
        assert arm["model_sparsity"] == zeros / sum(p.numel() for p in alone.parameters())
        assert (arm["windows"], arm["tokens"]) == (5, 75)


def test_dense_arms_share_one_pass_over_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    walks, steps = [], []

    class Counted(BlockWalk):
        def __init__(self, *args: Any, **options: Any) -> None:
            walks.append(self)
            super().__init__(*args, **options)

        def run(self, number: int) -> torch.Tensor:
            steps.append(number)
            return super().run(number)

    monkeypatch.setattr("entangle.model.sampling.BlockWalk", Counted)
    table = run(tiny_model("llama"), [0.3, 0.5, 0.7], mask=("row", "block"), propagate=("dense",))
    assert len(table) == 1 + 18
    # The calibration's and the evaluation's windows: blocks by batches, each once.
    assert (len(walks), len(steps)) == (2, 3 * 3 + 3 * 3)


def test_tables_are_written_and_read(tmp_path: Path) -> None:
    table = run(tiny_model("llama"), [0.5, "2:4"], propagate=("dense",), out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "arms",
        "log.json",
        "run.json",
        "tables",
    ]
    opened = read_table(tmp_path / "run")
    pd.testing.assert_frame_equal(opened, table, check_exact=True)
    assert opened.attrs["evaluation_fingerprint"] == held_out().fingerprint
    assert opened.attrs["arms"] == table.attrs["arms"]
    layers = pd.read_csv(tmp_path / "run" / "tables" / "layers.csv")
    assert len(layers) == 6 * 15
    arm = layers[(layers["method"] == "wanda") & (layers["sparsity"] == "2:4")]
    assert arm["error"].mean() == pytest.approx(
        table.query("method == 'wanda' and sparsity == '2:4'")["layer_error"].item()
    )
    words = (tmp_path / "run" / "tables" / "sweep.md").read_text()
    assert re.search(r"\b96 tokens.*random.*\b6 windows of 16\b", words)
    assert re.search(r"\b75 tokens.*random.*\b5 windows of 16\b", words)
    row = next(line for line in words.splitlines() if line.startswith("| sparsegpt"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    expected = table.query("method == 'sparsegpt'").iloc[0]
    assert cells[:6] == ["sparsegpt", "row", "exact", "dense", "none", "0.5"]
    assert float(cells[7].split(" ± ")[0]) == pytest.approx(expected["perplexity"], rel=1e-2)
    assert float(cells[9].split(" ± ")[1]) == pytest.approx(expected["difference_error"], rel=0.05)
    with pytest.raises(FileNotFoundError, match=r"\bmeasured\b.*tables"):
        entangle.open_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r" tables/sweep\.csv"):
        read_table(tmp_path)
    for name in ("run.json", "tables/sweep.csv"):
        file = tmp_path / "run" / name
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"0.5", b"0.6", 1))
        with pytest.raises(ValueError, match=rf"\brun is damaged: {name}"):
            read_table(tmp_path / "run")
        file.write_bytes(whole)
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert {*log.pop("files")} == {"run.json", "tables/sweep.csv"}
    (tmp_path / "run" / "log.json").write_text(json.dumps(log))  # as 0.1.0 wrote it
    older = table.rename(columns={"shrinkage": "pull"})
    older.to_csv(tmp_path / "run" / "tables" / "sweep.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "run"), opened, check_exact=True)
    older = table.drop(columns="solve")  # which was always greedy then
    older.to_csv(tmp_path / "run" / "tables" / "sweep.csv", index=False)
    solved = read_table(tmp_path / "run")["solve"].tolist()
    assert solved == ["", *["greedy"] * (len(table) - 1)]
    table.drop(columns="density").to_csv(tmp_path / "run" / "tables" / "sweep.csv")
    with pytest.raises(ValueError, match=r"\brun\b.*older version"):
        read_table(tmp_path / "run")


def test_rounded_weights_are_rows_beside_the_dense_model(tmp_path: Path) -> None:
    model = tiny_model()
    table = run(
        model, [0.5], method="wanda", layers="*.mlp.*", rounded=[4, 8, 4], out=tmp_path / "run"
    )
    assert same_weights(model)
    assert table["method"].tolist() == ["dense", "rtn4", "rtn8", "wanda"]
    rows: dict[str, Any] = {row["method"]: row for row in table.to_dict("records")}
    for bits in (4, 8):
        rounded, row = tiny_model(), rows[f"rtn{bits}"]
        layers = find_layers(rounded, ["*.mlp.*"])
        for layer in layers:
            write_weight(layer, round_to_nearest(weight_of(layer), bits))
        score = entangle.perplexity(rounded, held_out(), against=tiny_model())
        assert score.divergence is not None
        assert row["nats"] == pytest.approx(score.nats, rel=1e-6)
        assert row["kl"] == pytest.approx(float(score.divergence.kl.mean()), rel=1e-4)
        size = sum(rounded_bytes(layer.neurons, layer.inputs, bits) for layer in layers)
        assert row["disk_bytes"] == row["memory_bytes"] == size
        assert row["density"] == 1
        assert math.isnan(row["layer_error"])
    assert 0 < rows["rtn8"]["kl"] < rows["rtn4"]["kl"]
    pd.testing.assert_frame_equal(read_table(tmp_path / "run"), table)
    lines = (tmp_path / "run" / "tables" / "sweep.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[-4:]] == ["dense", "rtn4", "rtn8", "wanda"]
    labels = plots.sweep(table).axes[0].get_legend_handles_labels()[1]
    assert (
        sum("rounded to 4 bits" in label or "rounded to 8 bits" in label for label in labels) == 2
    )
    with pytest.raises(ValueError, match=r"8 or 4.*rounded=5"):
        run(model, [0.5], rounded=[5])


def test_the_time_of_a_token_is_of_the_packed_model_and_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], float]] = []

    def timed(model: PreTrainedModel, prompt: torch.Tensor) -> float:
        packed = {n for n, one in model.named_modules() if isinstance(one, PackedLinear)}
        with torch.inference_mode():
            seen.append((packed, float(model(input_ids=prompt).logits.sum())))
        if len(seen) == 2:
            raise ValueError("it cannot write")
        if len(seen) == 4:
            raise KeyboardInterrupt
        return 1e3 * len(seen)

    monkeypatch.setattr(sweeping, "token_microseconds", timed)
    model, words = tiny_model(), {"method": "wanda", "layers": "*.mlp.*", "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        run(model, [0.3, 0.6, 0.7], speed=True, **words)
    assert same_weights(model)
    layers = {layer.name for layer in find_layers(model, ["*.mlp.*"])}
    assert [packed for packed, _ in seen] == [set(), set(), layers, layers]
    alone = tiny_model()
    entangle.sparsify(
        alone, random_windows(), sparsity=0.6, **OPTIONS | {"layers": "*.mlp.*", "method": "wanda"}
    )
    outputs = alone(input_ids=held_out().tokens[:1, :1]).logits.detach()
    assert seen[2][1] == pytest.approx(float(outputs.sum()), rel=1e-4)
    table = run(model, [0.3, 0.6, 0.7], speed=True, **words)
    assert len(seen) == 4  # the arm that was stopped has its result, and no time
    assert table["nats"].notna().all()
    assert table["microseconds"].fillna(0).tolist() == [1000, 0, 3000, 0]
    lines = (tmp_path / "run" / "tables" / "sweep.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in lines[-4:]] == ["1 ms", "- ms", "3 ms", "- ms"]
    monkeypatch.setattr(sweeping, "ranks", types.SimpleNamespace(count=lambda: 2))
    with pytest.raises(ValueError, match=r"one process.*2"):
        run(model, [0.6], speed=True, method="wanda")


def test_an_arm_that_fails_says_why_and_costs_the_others_nothing(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():  # so that no token reaches the MLP of block 1
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    table = run(model, [0.5], propagate=("dense",), out=tmp_path / "run")
    assert table["method"].tolist() == ["dense", *METHODS]
    assert np.isfinite(table["perplexity"]).tolist() == [True, False, True, True]
    assert (table["problem"] == "").tolist() == [True, False, True, True]
    assert re.search(r"layers\.1\.mlp\.gate_proj.*singular", table["problem"][1])
    words = (tmp_path / "run" / "tables" / "sweep.md").read_text()
    assert re.search(f"sparsegpt row exact dense none 0.5.*{re.escape(table['problem'][1])}", words)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, OSError])
def test_after_an_error_the_weights_are_back_and_what_is_done_is_kept(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model("llama"), [0.5], propagate=("dense",))
    model, calls = tiny_model("llama"), []

    def scored(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise error("can't allocate memory")
        return entangle.perplexity(*args, **options)

    monkeypatch.setattr(setup, "score_of", scored)
    with pytest.raises(error, match="can't allocate"):
        run(model, [0.5], propagate=("dense",), out=tmp_path / "run")
    assert same_weights(model)
    assert len(list((tmp_path / "run.partial" / "arms").glob("*.json"))) == 2
    resumed = run(model, [0.5], propagate=("dense",), out=tmp_path / "run")
    assert len(calls) == 3 + 2
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert not (tmp_path / "run.partial").exists()


def test_a_score_that_is_not_finite_is_a_problem_of_its_arm_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        if (model.get_parameter("model.layers.0.self_attn.q_proj.weight") == 0).any():
            raise NotFiniteError("not finite in 5 of 5 windows")
        return entangle.perplexity(model, *args, **options)

    monkeypatch.setattr(setup, "score_of", broken)
    table = run(tiny_model("llama"), [0.5], method=("wanda",), propagate=("dense",))
    assert table["problem"].tolist() == ["", "not finite in 5 of 5 windows"]
    assert np.isfinite(table["perplexity"]).tolist() == [True, False]


def test_a_full_disk_is_told_and_what_is_done_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        saved.append(file)
        if len(saved) == 4:
            raise SafetensorError("I/O error: No space left on device")
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "save_file", full)
        with pytest.raises(OSError, match=r"1-1-kmeans-None\.safetensors.*I/O"):
            run(tiny_model("llama"), [0.5], propagate=("dense",), out=tmp_path / "run")
    grams = tmp_path / "run.partial" / "grams"
    assert len(list(grams.iterdir())) == 3  # block 0, and the held-out inputs of block 1
    for name in ("1-1-kmeans-None", "2", "2-1-kmeans-None"):
        (grams / f"{name}.safetensors").write_bytes(b"cut off")
    with pytest.raises(OSError, match=r"1-1-kmeans-None\.safetensors.*damaged"):
        run(tiny_model("llama"), [0.5], propagate=("dense",), out=tmp_path / "run")


def test_an_unfinished_sweep_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def interrupt(*args: Any, **words: Any) -> Any:
        scored.append(1)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return entangle.perplexity(*args, **words)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "score_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model("llama"), [0.5], out=tmp_path / "run")
    with pytest.raises(
        FileExistsError, match=r"run\.partial.*\bbatch_size: 2, now 3\b.*--overwrite"
    ):
        run(tiny_model("llama"), [0.5], out=tmp_path / "run", batch_size=3)
    with pytest.raises(FileExistsError, match=r"run\.partial.*\bweights: .*--overwrite"):
        run(tiny_model("llama", seed=1), [0.5], out=tmp_path / "run")
    assert (tmp_path / "run.partial" / "run.json").exists()
    table = run(tiny_model("llama"), [0.5], out=tmp_path / "run", batch_size=3, overwrite=True)
    assert len(table) == 4


def test_what_cannot_be_swept_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"\b100\.0% .*evaluation"):
        entangle.sweep(model, random_windows(), random_windows(), sparsity=[0.5])
    with pytest.raises(ValueError, match=r"down_proj.*\b2:4\b.*groups.*\b37\b"):
        run(model, [0.5, "2:4"], layers="*", out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"method.*sparsegpt, wanda, magnitude.*'luck'"):
        run(model, [0.5], method=("luck",), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"\b65 tokens.*context.*\b64\b"):
        entangle.sweep(model, random_windows(), random_windows(2, 65), sparsity=[0.5])
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, torch
from pathlib import Path
from tests.experiments.test_sweeping import run
from tests.tiny_models import tiny_model
torch.set_num_threads(1)
words = {"propagate": ("dense", "sparse"), "experts": (1, 2)}
run(tiny_model("llama"), [0.4, 0.6], out=Path(sys.argv[1]), **words)
"""


def test_killed_at_any_time_it_ends_with_the_same_tables(tmp_path: Path) -> None:
    """Kill while Grams are saved, and after the first arms; each time a new process goes on."""
    whole = forked("-c", KILLED, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    partial = tmp_path / "killed.partial"
    marks = [
        "grams/0.safetensors",
        "arms/dense.json",
        "arms/wanda-row-greedy-dense-none-1-dense-0.6.json",
    ]
    killed = 0
    for mark in [*marks, "arms/sparsegpt-row-exact-sparse-none-2-kmeans-auto-0.5-dense-0.4.json"]:
        process = Forked(["-c", KILLED, tmp_path / "killed"])
        while process.poll() is None and not (partial / mark).exists():
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # or the machine is too fast for this test
    last = forked("-c", KILLED, tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    for name in ("sweep.csv", "layers.csv", "sweep.md"):
        written = [(tmp_path / folder / "tables" / name) for folder in ("whole", "killed")]
        assert written[0].read_bytes() == written[1].read_bytes()
    log = json.loads((tmp_path / "killed" / "log.json").read_text())
    assert log["arms_run"] < 15


def texts() -> list[TokenWindows]:
    return [held_out(), dataclasses.replace(random_windows(3, seed=8), text="other/second.txt")]


def test_each_evaluation_text_is_scored_by_itself(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": [0.5, 0.7], "method": "wanda", **OPTIONS}
    parts = texts()
    table = entangle.sweep(
        tiny_model("llama"), random_windows(), mixed_windows(parts), out=tmp_path / "run", **options
    )
    alone = [entangle.sweep(tiny_model("llama"), random_windows(), p, **options) for p in parts]
    assert table["evaluation"].tolist() == ["random", "other/second.txt"] * 3
    assert table["sparsity"].tolist() == ["", "", "0.5", "0.5", "0.7", "0.7"]
    # Held-out errors are over the windows of both texts.
    same = [name for name in table if not str(name).startswith("held_out")]
    for place, one in enumerate(alone):
        rows = table[place::2].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows[same], one[same], rtol=1e-6)
    assert table["windows"].tolist() == [5, 3] * 3
    assert table["tokens"].tolist() == [75, 45] * 3
    pd.testing.assert_frame_equal(read_table(tmp_path / "run"), table, check_exact=True)
    facts = table.attrs["evaluation_texts"]
    assert [one["fingerprint"] for one in facts.values()] == [p.fingerprint for p in parts]
    words = (tmp_path / "run" / "tables" / "sweep.md").read_text()
    assert (
        "75 tokens of random (5 windows of 16) and on 45 tokens of other/second.txt "
        "(3 windows of 16)" in words
    )
    cells = [line.strip("|").split("|") for line in words.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in cells[0]]
    assert len(cells) == 2 + 3  # a row per arm
    for place, name in enumerate(["random", "other/second"]):
        column = heads.index(f"perplexity, {name}")
        shown = [float(row[column].split(" ± ")[0]) for row in cells[2:]]
        assert shown == pytest.approx(alone[place]["perplexity"].tolist(), rel=0.01)


def test_each_evaluation_text_must_be_held_out() -> None:
    """Of all tokens few enough are shared; of the second text all are."""
    first = random_windows(60, seed=9)
    second = dataclasses.replace(random_windows(), text="second")[:1]
    with pytest.raises(ValueError, match=r"\b100\.0% .*evaluation \(second\)"):
        entangle.sweep(
            tiny_model("llama"), random_windows(), mixed_windows([first, second]), sparsity=0.5
        )


def test_several_texts_or_the_models_own_are_refused_where_a_score_is_of_one() -> None:
    model, (first, second) = tiny_model("llama"), texts()
    with pytest.raises(ValueError, match=r"one text.*random \+ other/second"):
        entangle.perplexity(model, mixed_windows([first, second]))
    own = dataclasses.replace(second, text="self:")
    with pytest.raises(ValueError, match=r"self:.*writes itself"):
        entangle.sweep(model, random_windows(), mixed_windows([first, own]), sparsity=0.5)

"""What delphi reads of neurons: the ends of the distributions, at the tokens where they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entangle.measurement.context_search import contexts
from entangle.measurement.explainers import Examples, check_examples
from entangle.measurement.measuring import measure
from tests.measurement.test_context_search import drawn_windows
from tests.tiny_models import tiny_model, tiny_tokenizer

SKIP = 3
LAYER = "model.layers.1.mlp.down_proj"


def test_activations_are_the_ends_of_the_outputs_at_their_places(tmp_path: Path) -> None:
    windows = drawn_windows(10, 32)
    outputs = np.random.default_rng(0).standard_t(3, (10, 32 - SKIP, 3)).astype(np.float32)
    examples = Examples(windows, SKIP)
    names = {f"{LAYER}:7": 0, f"{LAYER}:19": 1, f"{LAYER}:input:4": 2}
    for name, column in names.items():
        examples.add(name, outputs[:, :, column].ravel())
    examples.write(tmp_path / "new", "a/model")
    modules = [f"{LAYER}.{end}" for end in ("high", "low", "input.high", "input.low")]
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == sorted(modules)
    for name, column in names.items():
        own = outputs[:, :, column]
        index = int(name.rpartition(":")[2])
        module = f"{LAYER}.input" if "input" in name else LAYER
        file = "4_4" if "input" in name else "7_19"
        for end, values in (("high", own), ("low", -own)):
            folder = tmp_path / "new" / f"{module}.{end}"
            held = load_file(folder / f"{file}.safetensors")
            about = json.loads((folder / "config.json").read_text())
            assert (about["model_name"], about["ctx_len"]) == ("a/model", 32)
            assert torch.equal(held["tokens"].long(), windows.tokens)
            assert held["locations"].dtype in {torch.int32, torch.int64}  # which delphi reads
            mine = held["locations"][:, 2] + int(file.split("_")[0]) == index
            window, position = held["locations"][mine, :2].T.numpy()
            level = np.quantile(values, 0.95)
            assert (position >= SKIP).all()
            found = np.zeros_like(values)
            found[window, position - SKIP] = held["activations"][mine].numpy()
            assert found == pytest.approx(np.maximum(values - level, 0), abs=1e-5)
            assert abs(np.mean(found > 0) - 0.05) < 0.01


def test_an_end_whose_outputs_are_all_equal_is_left_out(tmp_path: Path) -> None:
    outputs = np.maximum(np.random.default_rng(0).standard_normal(320), 0).astype(np.float32)
    examples = Examples(drawn_windows(10, 32), 0)
    examples.add(f"{LAYER}:7", outputs)
    examples.write(tmp_path / "new", "a/model")
    assert [one.name for one in (tmp_path / "new").iterdir()] == [f"{LAYER}.high"]


def test_windows_and_folders_that_delphi_could_not_read_are_refused(tmp_path: Path) -> None:
    check_examples(tmp_path / "new", drawn_windows(2, 32))
    check_examples(tmp_path, drawn_windows(2, 32))  # which is empty
    with pytest.raises(ValueError, match="multiple of 32"):
        check_examples(tmp_path / "new", drawn_windows(2, 40))
    (tmp_path / "other").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        check_examples(tmp_path, drawn_windows(2, 32))


def test_contexts_writes_the_examples_of_its_neurons(tmp_path: Path) -> None:
    model, windows, neuron = tiny_model("llama"), drawn_windows(6, 32), f"{LAYER}:7"
    run = measure(model, windows, layers=LAYER)
    heard: list[torch.Tensor] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda *x: heard.append(x[2]))
    with torch.inference_mode():
        model(windows.tokens)
    handle.remove()
    out: Any = {"run": run, "neurons": neuron, "tokenizer": tiny_tokenizer()}
    contexts(model, windows, **out, delphi=tmp_path / "new")
    held = load_file(tmp_path / "new" / f"{LAYER}.high" / "7_7.safetensors")
    values = heard[0][..., 7].numpy()
    window, position, index = held["locations"].T.numpy()
    assert not index.any()
    level = np.quantile(values, 0.95)
    assert held["activations"].numpy() == pytest.approx(values[window, position] - level, abs=1e-4)
    assert abs(len(window) - 0.05 * values.size) <= 2
    with pytest.raises(FileExistsError, match="not empty"):
        contexts(model, windows, **out, delphi=tmp_path / "new")

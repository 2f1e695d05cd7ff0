"""A folder that does not give back the model in memory is not called written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import entangle
from entangle.model.folders import partial_of
from entangle.model.loading import load_model, save_model
from entangle.model.reloading import check_saved
from entangle.pruning import sparsifying
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model, tiny_tokenizer, tiny_vision_model

TOKENS = random_windows(windows=1).tokens


@pytest.fixture(params=["whole", "one tensor at a time"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with memory for a second model, and one without."""
    if request.param != "whole":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=1))


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "bloom", "vision"])
def test_a_saved_model_is_the_one_in_memory(name: str, tmp_path: Path) -> None:
    model = tiny_vision_model() if name == "vision" else tiny_model(name, dtype=torch.bfloat16)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    check_saved(model, tmp_path / "model", TOKENS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_in_files_is_compared_too(tmp_path: Path) -> None:
    save_model(tiny_model(), None, tmp_path / "model")
    model = load_model(tmp_path / "model", offload=tmp_path / "offload")
    save_model(model, None, tmp_path / "again")
    check_saved(model, tmp_path / "again", TOKENS, tmp_path)
    _change(tmp_path / "again", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(OSError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight differs"):
        check_saved(model, tmp_path / "again", TOKENS, tmp_path)


@pytest.mark.usefixtures("_memory")
def test_a_model_with_nan_is_equal_to_itself(tmp_path: Path) -> None:
    model = tiny_model()
    weight: Any = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data[2, 3] = torch.nan
    save_model(model, None, tmp_path / "model")
    check_saved(model, tmp_path / "model", TOKENS, tmp_path)


def _change(folder: Path, key: str) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key].view(-1)[-1] += 1e-3
            save_file(tensors, file, {"format": "pt"})


def _remove(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _add(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["more." + key] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("damage", [_change, _remove, _add])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_tensor_that_differs_is_named(
    key: str, damage: Callable[[Path, str], None], tmp_path: Path
) -> None:
    model = tiny_model()
    save_model(model, None, tmp_path / "model")
    damage(tmp_path / "model", key)
    with pytest.raises(OSError, match=key.replace(".", r"\.")):
        check_saved(model, tmp_path / "model", TOKENS, tmp_path)


def test_equal_tensors_with_another_configuration_give_other_outputs(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, None, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 9_000.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="other outputs"):
        check_saved(model, tmp_path / "model", TOKENS, tmp_path)


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("experts", [1, 2])
def test_pruned_blocks_stay_when_the_saved_model_differs(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(*arguments: Any) -> None:
        save_model(*arguments)
        folder = arguments[2]
        name = "dense" if experts > 1 else "model"
        data = bytearray((folder / f"{name}.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / f"{name}.safetensors").write_bytes(data)

    options: dict[str, Any] = {"sparsity": "0.5", "experts": experts}
    whole = entangle.sparsify(tiny_model(), random_windows(), **options, out=tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sparsifying, "save_model", bad)
        with pytest.raises(OSError, match=r"(differs|damaged)"):
            entangle.sparsify(tiny_model(), random_windows(), **options, out=out)
    assert len([*partial_of(out).glob("blocks/*.json")]) == 3
    monkeypatch.setattr(sparsifying, "calibrate", None)  # the blocks are read
    again = entangle.sparsify(tiny_model(), random_windows(), **options, out=out)
    assert again.layers.equals(whole.layers)
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert (out / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()


CODE = """
import torch, transformers
class TwiceConfig(transformers.LlamaConfig):
    model_type = "twice"
class TwiceForCausalLM(transformers.LlamaForCausalLM):
    config_class = TwiceConfig
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found
"""


@pytest.mark.parametrize("experts", [1, 2])
def test_the_code_that_comes_with_a_model_is_in_the_folder(experts: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model().save_pretrained(source)
    (source / "twice_code.py").write_text(CODE)
    about = json.loads((source / "config.json").read_text())
    classes = {
        "AutoConfig": "twice_code.TwiceConfig",
        "AutoModelForCausalLM": "twice_code.TwiceForCausalLM",
    }
    about |= {"model_type": "twice", "auto_map": classes}
    (source / "config.json").write_text(json.dumps(about))
    model = load_model(source, trust_remote_code=True)
    out = tmp_path / "out"
    entangle.sparsify(model, random_windows(), sparsity="0.5", experts=experts, out=out)
    with torch.no_grad():
        expected = model(TOKENS).logits
    shutil.rmtree(source)
    again = load_model(out, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, expected)

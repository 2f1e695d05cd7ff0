"""A damaged folder of a model is told, by the name of the file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.__main__ import main
from entangle.model.loading import load_model
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A plainly pruned and an expanded model, by the number of experts."""
    place = tmp_path_factory.mktemp("pruned")
    for experts in (1, 2):
        entangle.sparsify(
            tiny_model(),
            random_windows(),
            sparsity="0.5",
            experts=experts,
            tokenizer=tiny_tokenizer(),
            out=place / str(experts),
        )
    return {experts: place / str(experts) for experts in (1, 2)}


@pytest.fixture(params=[1, 2])
def folder(request: pytest.FixtureRequest, pruned: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of a pruned or an expanded model, to be damaged."""
    return Path(shutil.copytree(pruned[request.param], tmp_path / "copy"))


def test_the_log_has_the_sum_and_the_size_of_each_other_file(folder: Path) -> None:
    log = json.loads((folder / "log.json").read_text())
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.json"
    }
    assert log["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert log["bytes"] == {name: len(data) for name, data in files.items()}
    assert {"config.json", "tokenizer.json", "run.json", "sparsity.json"} < set(files)


def test_a_whole_folder_is_verified(folder: Path) -> None:
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    names = {name for name, _ in load_model(folder, verify=True).named_parameters()}
    assert names == {name for name, _ in load_model(folder).named_parameters()}


def test_plain_transformers_loads_the_folder(pruned: dict[int, Path]) -> None:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pruned[1])
    ours = load_model(pruned[1], verify=True)
    assert all(
        torch.equal(one, other)
        for one, other in zip(found.parameters(), ours.parameters(), strict=True)
    )


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize("kind", ["weights", "config.json", "tokenizer.json", "sparsity.json"])
def test_a_file_that_is_not_as_it_was_written_is_named(
    kind: str, damage: Callable[[Path], None], folder: Path
) -> None:
    weights = "dense.safetensors" if (folder / "expansion.json").exists() else "model.safetensors"
    name = weights if kind == "weights" else kind
    damage(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"(?s){folder}.*{name}"):
        load_model(folder, verify=True)


@pytest.mark.parametrize("damage", [_cut, Path.unlink])
def test_weights_that_were_cut_or_lost_are_always_seen(
    damage: Callable[[Path], None], folder: Path
) -> None:
    for name in ("dense.safetensors", "model.safetensors"):
        if (folder / name).exists():
            damage(folder / name)
            with pytest.raises(ValueError, match=rf"{folder} is damaged: {name}"):
                load_model(folder)


def test_a_file_that_its_user_changed_is_told_only_when_verified(
    pruned: dict[int, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pruned[1], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    assert load_model(copy).config.bos_token_id == 5
    with pytest.raises(ValueError, match=r"config\.json .* on purpose"):
        load_model(copy, verify=True)


def test_files_that_entangle_did_not_write_are_checked_by_their_headers(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "log.json").write_text("[1")  # of some other program
    assert load_model(tmp_path).config.model_type == "llama"
    with pytest.raises(ValueError, match="no SHA-256 sums"):
        load_model(tmp_path, verify=True)
    shard = sorted(tmp_path.glob("model-0*"))[1]
    data = shard.read_bytes()
    for damaged in (data[:-1], data[:9], b"", data + b"0", b"<html>not found</html>"):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{tmp_path} is damaged: {shard.name}"):
            load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path} is damaged: {shard.name} is missing"):
        load_model(tmp_path)
    shard.write_bytes(data)
    for index in ("", "[]", "{}", '{"weight_map": [1]}', "[" * 10_000):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"is damaged: model\.safetensors\.index\.json"):
            load_model(tmp_path)


def test_commands_verify(
    pruned: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(pruned[1], tmp_path / "copy"))
    words = ["generate", str(copy), "--prompt", "ab", "--tokens", "1"]
    assert main([*words, "--verify"]) == 0
    _flip(copy / "model.safetensors")
    assert main(words) == 0  # one bit of one weight
    assert main([*words, "--verify"]) == 2
    assert "model.safetensors does not match the SHA-256 sum" in capsys.readouterr().err
    save_tiny(tmp_path / "dense")
    words[1] = str(tmp_path / "dense")
    assert main([*words, "--verify"]) == 2
    assert "no SHA-256 sums" in capsys.readouterr().err

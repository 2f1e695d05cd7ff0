"""What a model wrote is kept beside run.json: its tokens are the truth, and are read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entangle.measurement.measuring import measure
from entangle.measurement.merging import merge
from entangle.model.mixing import mixed_windows
from entangle.model.text import TokenWindows, token_windows
from entangle.model.writing import write_windows
from entangle.pruning import sparsifying
from entangle.pruning.sparsifying import sparsify
from entangle.runs import own_text
from entangle.runs.own_text import own_windows
from tests.tiny_models import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {"windows": 6, "length": 24, "seed": 4}
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    measure(tiny_model(), own_windows(tiny_model(), TOKENIZER, **SIZES), out=tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run / "self.npy").is_file()

    def write(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("the text is written again")

    monkeypatch.setattr(own_text, "write_windows", write)


def test_the_windows_are_what_the_model_writes() -> None:
    windows = own_windows(tiny_model(), TOKENIZER, **SIZES)
    assert torch.equal(windows.tokens, write_windows(tiny_model(), TOKENIZER, **SIZES))
    assert (windows.text, windows.available, windows.seed) == ("self:", None, 4)
    assert windows.seconds > 0
    starting = own_windows(tiny_model(), TOKENIZER, **SIZES, bos="always")
    assert (windows.starts, starting.starts) == (0, 1)


def test_tokens_and_text_are_kept_beside_run_json(run: Path) -> None:
    tokens = np.load(run / "self.npy")
    windows = write_windows(tiny_model(), TOKENIZER, **SIZES)
    assert tokens.tolist() == windows.tolist()
    text = (run / "self.txt").read_text(encoding="utf-8")
    first = str(TOKENIZER.decode(windows[0], skip_special_tokens=True))
    assert text.startswith(first[:10])
    # The text has other tokens, for example since bytes that are no UTF-8 have none.
    assert TOKENIZER(text)["input_ids"][: tokens.size] != tokens.ravel().tolist()
    about = json.loads((run / "run.json").read_text())
    assert (about["text"], about["windows"], about["available_windows"]) == ("self:", 6, None)
    assert about["fingerprint"] == TokenWindows(windows, "", None, 0, "auto").fingerprint
    assert "texts" not in about
    log = json.loads((run / "log.json").read_text())
    assert log["own_text_seconds"] > 0


@pytest.mark.usefixtures("unwritten")
def test_the_same_windows_are_read_again(run: Path) -> None:
    windows = own_windows(tiny_model(), TOKENIZER, **SIZES, folder=run)
    assert windows.fingerprint == json.loads((run / "run.json").read_text())["fingerprint"]
    assert windows.seconds == 0


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize("change", ["windows", "length", "seed", "bos", "model", "tokens", "file"])
def test_what_may_be_other_windows_is_written_again(run: Path, change: str) -> None:
    sizes, model = SIZES | {"bos": "auto"}, tiny_model(seed=int(change == "model"))
    if change in sizes:
        sizes[change] = "always" if change == "bos" else sizes[change] - 1
    if change == "tokens":
        np.save(run / "self.npy", np.load(run / "self.npy")[::-1])
    if change == "file":
        (run / "self.npy").write_bytes(b"")
    with pytest.raises(AssertionError, match="written again"):
        own_windows(model, TOKENIZER, **sizes, folder=run)


def parts(folder: Path) -> list[TokenWindows]:
    text = token_windows(["a text " * 99], TOKENIZER, **SIZES)
    return [text, own_windows(tiny_model(), TOKENIZER, **SIZES, folder=folder)]


def test_a_mix_is_told_text_by_text_and_its_shards_merge(tmp_path: Path) -> None:
    mixed = mixed_windows(parts(tmp_path))
    measure(tiny_model(), mixed, out=tmp_path / "whole")
    for shard in ("1/2", "2/2"):
        measure(tiny_model(), mixed, shard=shard, out=tmp_path / shard[0])
    merge([tmp_path / "2", tmp_path / "1"], out=tmp_path / "merged")
    for name in ("run.json", "self.npy", "self.txt", "text.npy"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    about = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (about["windows"], about["text"]) == (12, "documents given in Python + self:")
    for part, (name, drawn) in zip(mixed.by_text(), about["texts"].items(), strict=True):
        assert (name, drawn["windows"]) == (part.text, 6)
        assert drawn["fingerprint"] == part.fingerprint
    kept = own_windows(tiny_model(), TOKENIZER, **SIZES, folder=tmp_path / "merged")
    assert (kept.seconds, kept.fingerprint) == (0, mixed.by_text()[1].fingerprint)
    whole = (tmp_path / "whole" / "self.npy").read_bytes()
    np.save(tmp_path / "zeros.npy", np.zeros((6, 24), np.int32))
    header = bytearray(whole)
    header[8] = ord("6")  # a text that Python cannot parse
    for number, damaged in enumerate([(tmp_path / "zeros.npy").read_bytes(), bytes(header), b"PK"]):
        (tmp_path / "2" / "self.npy").write_bytes(damaged)
        merge([tmp_path / "2", tmp_path / "1"], out=tmp_path / f"mended{number}")
        assert (tmp_path / f"mended{number}" / "self.npy").read_bytes() == whole
    (tmp_path / "1" / "self.npy").unlink()
    merge([tmp_path / "2", tmp_path / "1"], out=tmp_path / "without")
    assert not (tmp_path / "without" / "self.npy").exists()


def test_a_killed_command_goes_on_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"sparsity": "0.5", "tokenizer": TOKENIZER}
    partial = tmp_path / "killed.partial"
    sparsify(tiny_model(), mixed_windows(parts(partial)), out=tmp_path / "whole", **options)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sparsifying, "check_saved", killed)
        windows = mixed_windows(parts(partial))
        with pytest.raises(KeyboardInterrupt):
            sparsify(tiny_model(), windows, out=tmp_path / "killed", **options)
    monkeypatch.setattr(own_text, "write_windows", killed)  # it is not written again
    sparsify(tiny_model(), mixed_windows(parts(partial)), out=tmp_path / "killed", **options)
    for file in (tmp_path / "whole").iterdir():
        if file.name != "log.json":
            assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()

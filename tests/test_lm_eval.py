"""The model `entangle` of lm-eval, against lm-eval's own `hf` and a pass over each text alone."""

import json
import math
import random
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from entangle.model.loading import load_model, save_model
from tests.model.test_packing import expanded
from tests.tiny_models import CONTEXT, save_tiny, tiny_tokenizer

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from entangle.lm_eval import EntangleLM, main

ROOT = Path(__file__).parents[1]
Pair = tuple[str, str]
CHOICES = ["a", "b c", "d"]


def sentences(count: int) -> list[str]:
    """Return texts of 2 to some 90 bytes, which are tokens: some exceed the context."""
    draw = random.Random(0)
    letters = "abcdefghijklm é語 \n"
    return ["".join(draw.choices(letters, k=draw.randint(1, 70))) + "." for _ in range(count)]


# Contexts are none, a third and two thirds of a text; one has several continuations of one token.
TEXTS = sentences(50)
CUTS = [len(text) * (i % 3) // 3 for i, text in enumerate(TEXTS)]
PAIRS = [(text[:cut], text[cut:][:40]) for text, cut in zip(TEXTS, CUTS, strict=True)]
PAIRS += [(TEXTS[0], letter) for letter in "ab "]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts for each layer, 60% of their weights zero, so that they can be packed."""
    folder = tmp_path_factory.mktemp("experts")
    save_model(expanded(at_random=False), tiny_tokenizer(), folder)
    return folder


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def scores(lm: Any, pairs: Sequence[Pair] = PAIRS) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = lm.loglikelihood(requests("loglikelihood", pairs))
    return found


def rolling(lm: Any, texts: Sequence[str] = TEXTS) -> list[float]:
    kind = "loglikelihood_rolling"
    found: list[float] = lm.loglikelihood_rolling(requests(kind, [(text,) for text in texts]))
    return found


def written(lm: Any, texts: Sequence[str], **settings: Any) -> list[str]:
    arguments = [(text, settings) for text in texts]
    found: list[str] = lm.generate_until(requests("generate_until", arguments))
    return found


def ids_of(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return those of the token after each of these (tokens, vocabulary), in float64."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    found: torch.Tensor = logits.double().log_softmax(dim=-1)
    return found


def alone(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Score one continuation without a batch; what does not fit loses its beginning."""
    if not context:
        before, after = [1], ids_of(continuation)
    else:
        moved = context[len(context.rstrip()) :]  # lm-eval scores spaces with the next word
        before, after = ids_of(context.rstrip()), ids_of(moved + continuation)
    whole = [*before, *after][-CONTEXT - 1 :]
    found = log_probabilities(model, whole[:-1])[-len(after) :]
    target = torch.tensor(after)
    likely = found.gather(1, target[:, None]).sum()
    return float(likely), bool((found.argmax(dim=1) == target).all())


def most_likely(model: PreTrainedModel) -> Pair:
    """Return a context, and the continuation of one token that is its most likely one."""
    for text in TEXTS:
        context = text.rstrip()[:20]
        likely = tiny_tokenizer().decode(
            int(log_probabilities(model, ids_of(context))[-1].argmax())
        )
        if str(likely).isascii() and str(likely).isprintable() and len(likely) == 1:
            return context, str(likely)
    pytest.fail("the most likely token is never a letter")


def alone_rolling(model: PreTrainedModel, text: str) -> float:
    """Score a text in full windows: the last one ends with the text, and is scored where it is new."""
    ids, total, done = [1, *ids_of(text)], 0.0, 1
    while done < len(ids):
        end = min(done + CONTEXT, len(ids))
        first = max(end - CONTEXT - 1, 0)
        found = log_probabilities(model, ids[first : end - 1])
        total += sum(float(found[place - first - 1, ids[place]]) for place in range(done, end))
        done = end
    return total


def per_token(found: Sequence[float], expected: Sequence[float], texts: Sequence[str]) -> float:
    """Return the largest difference, in nats per token."""
    triples = zip(found, expected, texts, strict=True)
    return max(abs(one - other) / max(len(ids_of(text)), 1) for one, other, text in triples)


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_plain_folder_has_the_scores_of_hf(plain: Path, add_bos_token: bool | None) -> None:
    options: dict[str, Any] = {"batch_size": 4, "add_bos_token": add_bos_token}
    ours = EntangleLM(str(plain), **options)
    theirs = HFLM(str(plain), device="cpu", **options)
    assert scores(ours) == scores(theirs)
    assert rolling(ours) == rolling(theirs)
    settings = {"until": ["\n", "a"], "max_gen_toks": 8}
    assert written(ours, TEXTS[:8], **settings) == written(theirs, TEXTS[:8], **settings)


@pytest.mark.parametrize(
    ("kind", "packed"), [("plain", False), ("experts", False), ("experts", True)]
)
def test_scores_are_those_of_each_text_alone(
    kind: str, packed: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    model, lm = load_model(folder), EntangleLM(str(folder), packed=packed, batch_size=7)
    pairs = [*PAIRS, most_likely(model)]
    expected = [alone(model, *pair) for pair in pairs]
    found = scores(lm, pairs)
    continuations = [continuation for _, continuation in pairs]
    nats = per_token([one for one, _ in found], [one for one, _ in expected], continuations)
    assert nats < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    assert per_token(rolling(lm), [alone_rolling(model, text) for text in TEXTS], TEXTS) < 1e-4
    assert max(len(ids_of(text)) for text in TEXTS) > CONTEXT + 1


@pytest.mark.parametrize("max_length", [12, 40])
def test_a_shorter_max_length_cuts_contexts_and_windows(plain: Path, max_length: int) -> None:
    pairs = [(context, continuation[:4] or ".") for context, continuation in PAIRS if context]
    found = EntangleLM(str(plain), max_length=max_length, batch_size=4)
    expected = HFLM(str(plain), device="cpu", max_length=max_length, batch_size=1)
    assert per_token(rolling(found), rolling(expected), TEXTS) < 1e-4
    one, other = ([nats for nats, _ in scores(lm, pairs)] for lm in (found, expected))
    assert per_token(one, other, [continuation for _, continuation in pairs]) < 1e-4
    assert rolling(found) != rolling(EntangleLM(str(plain), batch_size=4))


def test_the_experts_are_other_models_than_the_dense_one(plain: Path, experts: Path) -> None:
    dense, mixed = (rolling(EntangleLM(str(folder)), TEXTS[:4]) for folder in (plain, experts))
    assert per_token(dense, mixed, TEXTS[:4]) > 0.1


def greedy(model: PreTrainedModel, context: str, until: Sequence[str], tokens: int) -> str:
    """Write the most likely tokens after a context, one pass for each, up to a stop sequence."""
    ids = ids_of(context)[-(CONTEXT - tokens) :]
    new: list[int] = []
    for _ in range(tokens):
        new.append(int(log_probabilities(model, [*ids, *new])[-1].argmax()))
        text = str(tiny_tokenizer().decode(new, skip_special_tokens=True))
        if new[-1] == 2 or any(stop in text for stop in until):
            break
    for stop in until:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize(
    ("kind", "packed"), [("plain", False), ("experts", False), ("experts", True)]
)
def test_it_writes_what_each_context_alone_is_followed_by(
    kind: str, packed: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    model, lm = load_model(folder), EntangleLM(str(folder), packed=packed, batch_size=5)
    texts = TEXTS[:7]
    free = written(lm, texts, until=[], max_gen_toks=10)
    assert free == [greedy(model, text, [], 10) for text in texts]
    pieces = [piece for text in free for piece in re.findall(r"[ -~]{1,2}", text[1:])]
    stops = sorted(pieces, key=len)[-2:]
    found = written(lm, texts, until=stops, max_gen_toks=10)
    assert found == [greedy(model, text, stops, 10) for text in texts]
    assert found != free
    assert max(len(ids_of(text)) for text in texts) > CONTEXT - 10


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks on files: one chooses among continuations, one scores whole texts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)  # its handler stays for ever
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval sets it
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip
    # Without its own 14,000 files of tasks, which it reads for ten seconds.
    assert TaskManager.__init__.__defaults__ == (None, None, True, None)
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": text, "choices": CHOICES, "answer": i % 3} for i, text in enumerate(TEXTS[:9])]
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choosing = {"doc_to_choice": "choices", "doc_to_target": "answer"}
    kinds = {
        "choosing": {"output_type": "multiple_choice", **choosing},
        "reading": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"},
    }
    metrics = {"choosing": "acc", "reading": "bits_per_byte"}
    for name, kind in kinds.items():
        task = {"task": name, **source, **kind, "metric_list": [{"metric": metrics[name]}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder


def results_of(model: PreTrainedModel) -> dict[str, float]:
    """Return the results of the two tasks, from each text alone."""
    right, nats = 0, 0.0
    for place, text in enumerate(TEXTS[:9]):
        found = [alone(model, text, f" {choice}")[0] for choice in CHOICES]
        right += found.index(max(found)) == place % 3
        nats -= alone_rolling(model, text)
    size = sum(len(text.encode()) for text in TEXTS[:9])
    return {"choosing": right / 9, "reading": nats / size / math.log(2)}


def test_the_command_is_that_of_lm_eval_with_our_model(
    experts: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"--model entangle --model_args pretrained={experts},packed=True,batch_size=4"
    out = tasks / "results.json"
    command = f"lm_eval run {words} --tasks {tasks} --output_path {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert main() == 0
    [file] = tasks.glob("results*.json")
    results = json.loads(file.read_text())["results"]
    expected = results_of(load_model(experts))
    assert results["choosing"]["acc,none"] == pytest.approx(expected["choosing"])
    assert results["reading"]["bits_per_byte,none"] == pytest.approx(expected["reading"], rel=1e-5)


def test_it_can_be_handed_to_lm_eval(experts: Path, tasks: Path) -> None:
    task = json.loads((tasks / "choosing.yaml").read_text())
    found = lm_eval.simple_evaluate(EntangleLM(str(experts)), tasks=[task], bootstrap_iters=0)
    expected = results_of(load_model(experts))["choosing"]
    assert found["results"]["choosing"]["acc,none"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, r"no argument colour: .*pretrained, revision, .*, prefix_token_id$"),
        ({"pretrained": None}, "needs the argument pretrained"),
        ({"pretrained": 12}, r"pretrained must be text .*12"),
        ({"revision": 12}, r"revision must be text .*12"),
        ({"dtype": "int8"}, r"dtype .*float32.*'int8'"),
        ({"device": "mars"}, r"device 'mars'"),
        ({"packed": "yes"}, "packed must be true or false, got 'yes'"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, got 1"),
        ({"max_length": 0}, "max_length must be .*, got 0"),
        ({"max_length": True}, "max_length must be .*, got True"),
        ({"max_length": CONTEXT + 1}, rf"max_length is {CONTEXT + 1}, .* {CONTEXT} tokens"),
        ({"prefix_token_id": -1}, "prefix_token_id must be .*, got -1"),
        ({"batch_size": "many"}, "batch_size must be .*, got 'many'"),
        ({"batch_size": 0}, "batch_size must be .*, got 0"),
        ({"batch_size": "auto", "device": "cpu"}, "batch_size auto .* give a number"),
    ],
)
def test_an_argument_without_meaning_is_refused_in_words(
    changes: dict[str, Any], message: str, plain: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        get_model("entangle").create_from_arg_obj({"pretrained": str(plain), **changes})


def test_several_processes_are_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        EntangleLM(str(plain))


def test_a_tokenizer_without_a_token_to_begin_with_needs_one(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    bare: Any = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give prefix_token_id"):
        EntangleLM(str(tmp_path))
    assert EntangleLM(str(tmp_path), prefix_token_id=1).prefix_token_id == 1


@pytest.mark.parametrize("continuation", ["", "a" * (CONTEXT + 1)])
def test_a_continuation_of_a_wrong_length_is_refused(plain: Path, continuation: str) -> None:
    with pytest.raises(ValueError, match=rf"has {len(continuation)} tokens: .* {CONTEXT}$"):
        scores(EntangleLM(str(plain)), [("a", continuation)])


def test_a_command_that_fails_says_why_in_one_line(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model entangle --model_args pretrained={tasks} --tasks {tasks}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *words.split()])
    assert main() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"entangle.lm_eval: the folder {tasks} holds no model")


def test_model_args_count_more_than_flags_and_none_is_the_default(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    lm = EntangleLM.create_from_arg_string(f"pretrained={plain},batch_size=3,dtype=none", flags)
    assert (lm.batch_size, lm.device.type, lm.model.dtype) == (3, "cpu", torch.float32)
    assert not caplog.records  # hf warns of a model that is already loaded


def test_a_model_in_files_has_the_same_scores(plain: Path, tmp_path: Path) -> None:
    lm = EntangleLM(str(plain), offload=str(tmp_path / "offload"))
    assert rolling(lm, TEXTS[:4]) == rolling(EntangleLM(str(plain)), TEXTS[:4])


def test_lm_eval_finds_the_model_by_its_name_and_as_a_plugin() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    plugin = EntryPoint("entangle", declared["lm_eval.models"]["entangle"], "lm_eval.models")
    assert plugin.load() is EntangleLM is get_model("entangle")

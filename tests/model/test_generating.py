"""What a model writes: against a greedy loop without a cache, and a model that recites a text."""

import copy
import dataclasses
import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from entangle.measurement.recording import record
from entangle.model import generating
from entangle.model.generating import Generated, generate, token_microseconds
from entangle.model.layers import find_layers, weight_of
from entangle.model.packing import pack_layer, weight_bytes
from entangle.numerics.sparse import Sliced
from tests.tiny_models import CONTEXT, tiny_model, tiny_tokenizer

PROMPT = "The quick brown"
VARIED = [
    ("llama", 3),
    ("llama", 5),
    ("gpt2", 0),
    ("gpt2", 1),
]  # which write more than three tokens
TEXT = "Grüße, two words\nand 語 more\n\n  spaces €."


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> list[int]:
    """Return the most likely tokens, from a pass over the whole text for each; no end."""
    with torch.inference_mode():
        for _ in range(tokens):
            scores = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)
    return [int(token) for token in ids[0, -tokens:]]


def ids_of(text: str) -> torch.Tensor:
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids


def reciting(text: str) -> PreTrainedModel:
    """Return a model that says this text, whatever is before: its tokens are its positions'."""
    ids = [*ids_of(text)[0].tolist(), 2]
    model: Any = tiny_model("gpt2", n_embd=66, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name.endswith("ln_f.weight"):
                parameter.fill_(1.0)
        model.transformer.wpe.weight[:, :CONTEXT] = torch.eye(CONTEXT)
        for position, token in enumerate(ids[1:]):
            model.lm_head.weight[token, position] = 1.0
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize(("name", "seed"), VARIED)
def test_it_writes_what_is_most_likely_without_a_cache_too(name: str, seed: int) -> None:
    model, tokenizer = tiny_model(name, seed=seed), tiny_tokenizer()
    pieces: list[str] = []
    found = generate(model, tokenizer, PROMPT, tokens=16, on_text=pieces.append)
    expected = greedy(model, ids_of(PROMPT), 16)
    assert len({*expected}) > 3
    assert 2 not in expected
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == found.text
    assert (found.prompt_tokens, found.tokens) == (15, 16)
    assert found.weight_bytes == weight_bytes(model)


@pytest.mark.parametrize(("name", "seed"), VARIED)
@pytest.mark.parametrize("others", [[], [259]])
def test_it_ends_where_the_model_ends_the_sequence(name: str, seed: int, others: list[int]) -> None:
    model, tokenizer = tiny_model(name, seed=seed), tiny_tokenizer()
    expected = greedy(model, ids_of(PROMPT), 16)
    end = expected[5]
    length = expected.index(end) + 1
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [*others, end] if others else end
    found = generate(model, tokenizer, PROMPT, tokens=16)
    assert found.tokens == length
    assert found.text == tokenizer.decode(expected[:length])


@pytest.mark.parametrize("known", [True, False])
def test_a_text_is_written_to_its_end(known: bool) -> None:
    """Its end is no part of the text; a model that knows no end has the tokenizer's."""
    model = reciting(TEXT)
    assert model.generation_config is not None
    if not known:
        model.generation_config.eos_token_id = None
    length = ids_of(TEXT).shape[1]
    assert length > len(TEXT)
    pieces: list[str] = []
    found = generate(model, tiny_tokenizer(), TEXT[:4], tokens=64 - 6, on_text=pieces.append)
    assert found.text == TEXT[4:]
    assert "".join(pieces) == found.text
    assert sum(bool(piece) for piece in pieces) > 4  # as it comes, not at once
    assert found.prompt_tokens == 6  # ü and ß are two bytes
    assert found.tokens == length - 6 + 1


def test_it_writes_as_many_tokens_as_asked_for() -> None:
    model = reciting(TEXT)
    for tokens in (1, 2, 7):
        found = generate(model, tiny_tokenizer(), TEXT[0], tokens=tokens)
        assert found.tokens == tokens
        written = TEXT.encode()[1 : 1 + tokens].decode(errors="replace")
        assert found.text == written


def test_a_sampling_configuration_draws_nothing() -> None:
    model: Any = tiny_model("llama", seed=5)
    expected = generate(model, tiny_tokenizer(), PROMPT, tokens=12).text
    model.generation_config.update(do_sample=True, max_new_tokens=3)
    for seed in range(3):
        torch.manual_seed(seed)
        assert generate(model, tiny_tokenizer(), PROMPT, tokens=12).text == expected


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}],
)
def test_a_models_own_settings_change_nothing(settings: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    assert model.generation_config is not None
    model.generation_config.update(**settings)  # type: ignore[no-untyped-call]
    expected = greedy(model, ids_of(PROMPT), 16)
    found = generate(model, tokenizer, PROMPT, tokens=16)
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    ((name, value),) = settings.items()
    assert getattr(model.generation_config, name) == value


def test_neither_the_model_nor_its_configuration_is_changed() -> None:
    model = tiny_model("llama", seed=5)
    before = copy.deepcopy(model.generation_config)
    generate(model, tiny_tokenizer(), PROMPT, tokens=2)
    assert before is not None
    assert model.generation_config is not None
    assert model.generation_config.to_dict() == before.to_dict()


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [("", 8, "prompt.* 0 tokens"), ("ab", 0, r"1 token .* 0$"), ("ab", -3, r"1 token .* -3$")],
)
def test_nothing_to_read_or_to_write_is_refused(prompt: str, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), tiny_tokenizer(), prompt, tokens=tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_may_be_filled_and_no_more(name: str) -> None:
    text = ("abcdefghi " * 7)[:CONTEXT]
    model = reciting(text) if name == "gpt2" else tiny_model(name, seed=5)
    found = generate(model, tiny_tokenizer(), text[:10], tokens=CONTEXT - 10)
    assert (found.prompt_tokens, found.tokens) == (10, CONTEXT - 10)
    assert name == "llama" or found.text == text[10:]
    with pytest.raises(ValueError, match=r"prompt of 10 tokens.*\b55\b.*\b64\b"):
        generate(model, tiny_tokenizer(), text[:10], tokens=CONTEXT - 9)
    with pytest.raises(ValueError, match=r"prompt of 70 tokens.*\b1\b.*\b64\b"):
        generate(model, tiny_tokenizer(), "x" * 70, tokens=1)


def test_a_token_that_the_tokenizer_adds_is_of_the_prompt() -> None:
    found = generate(tiny_model(), tiny_tokenizer(adds_bos=True), "abc", tokens=1)
    assert (found.prompt_tokens, found.tokens) == (4, 1)


def test_an_end_that_the_tokenizer_adds_is_not_of_the_prompt() -> None:
    model, ended = tiny_model(), tiny_tokenizer(template="<s> $A </s>")
    found = generate(model, ended, PROMPT, tokens=5)
    assert found == dataclasses.replace(
        generate(model, tiny_tokenizer(adds_bos=True), PROMPT, tokens=5),
        first_seconds=found.first_seconds,
        seconds=found.seconds,
    )


# Time.


def made(tokens: int, seconds: float) -> Generated:
    return Generated(
        text="",
        prompt_tokens=3,
        tokens=tokens,
        first_seconds=9.0,
        seconds=seconds,
        weight_bytes=0,
        threads=1,
    )


def test_the_speed_is_of_the_tokens_after_the_first() -> None:
    assert made(11, 2.0).tokens_per_second == 5.0
    assert made(2, 0.5).tokens_per_second == 2.0
    assert math.isnan(made(1, 0.0).tokens_per_second)


@pytest.mark.parametrize(("tokens", "seconds"), [(1, 0.0), (2, 2.0), (4, 2.0 + 4.0 + 8.0)])
def test_time_is_taken_at_each_token(
    tokens: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes 1 s on when asked for the first time, then 2 s, 4 s, and so on."""
    times = itertools.accumulate(2.0**n for n in itertools.count())
    monkeypatch.setattr(generating, "time", types.SimpleNamespace(perf_counter=times.__next__))
    found = generate(tiny_model("llama", seed=5), tiny_tokenizer(), PROMPT, tokens=tokens)
    assert (found.first_seconds, found.seconds) == (2.0, 2 * seconds)


def test_kernels_are_compiled_before_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", seed=5)
    asked: list[str] = []
    for layer in find_layers(model, ["*.mlp.*"]):
        weight_of(layer)[:, ::2] = 0.0
        pack_layer(model, layer)

    def noting(name: str, kept: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            asked.append(name)
            return kept(*args)

        return noted

    for name in ("dense", "product", "one"):
        monkeypatch.setattr(Sliced, name, noting(name, getattr(Sliced, name)))
    clock = types.SimpleNamespace(perf_counter=noting("clock", lambda: 0.0))
    monkeypatch.setattr(generating, "time", clock)
    generate(model, tiny_tokenizer(), PROMPT, tokens=2)
    before = asked[: asked.index("clock")]
    assert before[:2] == ["dense", "product"]
    assert before[2:] == ["one"] * len(find_layers(tiny_model("llama"), ["*.mlp.*"]))


def test_time_goes_on() -> None:
    found = generate(tiny_model("llama", seed=5), tiny_tokenizer(), PROMPT, tokens=5)
    assert found.first_seconds > 0
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(4 / found.seconds)


def test_the_time_of_a_token_is_a_median_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = tiny_model(), [9.0] * 9 + [0.25, 0.5, 1.0] * 10 + [0.5]
    now = itertools.accumulate([0.0, *steps])
    monkeypatch.setattr("entangle.model.generating.time.perf_counter", lambda: next(now))
    assert token_microseconds(model, torch.tensor([[3]])) == 0.5e6
    assert next(now, None) is None
    model.config.max_position_embeddings = 9
    now = itertools.accumulate(itertools.repeat(1.0))
    assert math.isnan(token_microseconds(model, torch.tensor([[3]])))


@pytest.mark.parametrize(
    ("seconds", "chosen", "tried"),
    [
        ({4: 1.0, 2: 1.05, 1: 1.2}, 2, [4, 2, 1]),
        ({4: 1.0, 2: 1.6, 1: 0.1}, 4, [4, 2]),
        ({4: 9.0, 2: 3.0, 1: 1.0}, 1, [4, 2, 1]),
        ({6: 1.0, 3: 1.2, 1: 1.09}, 1, [6, 3, 1]),
        ({1: 1.0}, 1, []),
    ],
)
def test_tokens_are_computed_with_the_quickest_number_of_threads(
    seconds: dict[int, float], chosen: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that a measurement finds; afterwards it is what it was, also if the model fails."""
    asked, used = [], []

    def timed(model: PreTrainedModel, token: torch.Tensor) -> float:
        asked.append(torch.get_num_threads())
        return seconds[asked[-1]]

    monkeypatch.setattr(generating, "_token_seconds", timed)
    model, most = tiny_model("llama"), max(seconds)
    model.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    torch.set_num_threads(most)
    found = generate(model, tiny_tokenizer(), "abc", tokens=4)
    assert (asked, found.threads, torch.get_num_threads()) == (tried, chosen, most)
    assert used == [most, *[chosen] * (found.tokens - 1)]
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0 if len(used) % 3 == 0 else None)
    with pytest.raises(ZeroDivisionError):
        generate(model, tiny_tokenizer(), "abc", tokens=4)
    handle.remove()
    assert torch.get_num_threads() == most


def test_a_recording_counts_the_tokens_of_the_text_alone() -> None:
    """On two threads the time of a token is measured by more passes."""
    model = tiny_model("llama")
    torch.set_num_threads(2)
    with record(model, ["*.up_proj"]) as recorder:
        found = generate(model, tiny_tokenizer(), PROMPT, tokens=5)
    assert found.threads in {1, 2}
    counts = recorder.dataset()["count"].to_numpy()
    assert (counts == found.prompt_tokens + found.tokens - 1).all()

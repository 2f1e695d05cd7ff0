"""What a model writes: against a loop without a cache, and the exact distribution."""

from pathlib import Path
from typing import Any

import pytest
import scipy
import torch
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from entangle.model import writing
from entangle.model.loading import load_model
from entangle.model.text import Bos
from entangle.model.writing import document_start, text_of, write_windows
from tests.tiny_models import CONTEXT, save_tiny, tiny_mamba, tiny_model, tiny_tokenizer

BOS, EOS = 1, 2
MANY = [EOS, *range(40, 90)]  # so that documents end often


def ending(name: str = "llama", ends: Any = EOS) -> PreTrainedModel:
    model = tiny_model(name)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends
    return model


def looped(model: PreTrainedModel, uniform: torch.Tensor, ends: list[int]) -> list[list[int]]:
    """One window after the other, a whole pass for each token, by `numpy.cumsum` and comparison."""
    rows = []
    for numbers in uniform.tolist():
        ids, after_end = [BOS], False
        for number in numbers:
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            cumulative = scores.double().softmax(dim=0).numpy().cumsum()
            sampled = int((cumulative <= number * cumulative[-1]).sum())
            ids.append(BOS if after_end else sampled)
            after_end = not after_end and sampled in ends
        rows.append(ids[1:])
    return rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "opt", "bloom"])
@pytest.mark.parametrize("ends", [EOS, MANY])
def test_it_samples_as_a_loop_without_a_cache_does(name: str, ends: Any) -> None:
    model = ending(name, ends)
    found = write_windows(model, tiny_tokenizer(), windows=4, length=24, seed=3)
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(4, 24, generator=generator, dtype=torch.float64)
    expected = looped(model, uniform, ends if isinstance(ends, list) else [ends])
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    if ends == MANY:  # each end is followed by a start, within the window
        inside = found[:, :-1]
        ended = torch.isin(inside, torch.tensor(MANY))
        assert int(ended.sum()) > 8
        assert {*found[:, 1:][ended].tolist()} == {BOS}


def test_the_frequencies_are_the_exact_probabilities() -> None:
    model = tiny_model("gpt2")
    found = write_windows(model, tiny_tokenizer(), windows=4000, length=2, seed=1)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].double().softmax(dim=0)
        pairs = torch.stack([torch.full((260,), BOS), torch.arange(260)], dim=1)
        second = model(input_ids=pairs).logits[:, -1].double().softmax(dim=1)
    second[EOS] = torch.eye(260)[BOS]  # a new document
    for column, probabilities in enumerate((first, first @ second)):
        counts = torch.bincount(found[:, column], minlength=260).double()
        expected = 4000 * probabilities
        common = expected >= 5
        observed = [*counts[common].tolist(), float(counts[~common].sum())]
        wanted = [*expected[common].tolist(), float(expected[~common].sum())]
        if wanted[-1] == 0:
            observed, wanted = observed[:-1], wanted[:-1]
        assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_the_seed_and_nothing_else_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options: dict[str, Any] = {"windows": 7, "length": 20}
    torch.manual_seed(0)
    first = write_windows(model, tokenizer, **options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(write_windows(model, tokenizer, **options), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(write_windows(model, tokenizer, seed=1, **options), first)
    monkeypatch.setattr(writing, "_at_once", lambda *_: 3)
    assert torch.equal(write_windows(model, tokenizer, **options), first)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == EOS  # as before


@pytest.mark.parametrize(
    ("bos", "adds_bos", "starts"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("always", False, True),
        ("never", True, False),
    ],
)
def test_windows_begin_as_those_of_a_text(bos: Bos, adds_bos: bool, starts: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(adds_bos=adds_bos)
    found = write_windows(model, tokenizer, windows=3, length=CONTEXT, bos=bos)
    plain = write_windows(model, tiny_tokenizer(), windows=3, length=CONTEXT - starts)
    assert found.shape == (3, CONTEXT)
    assert [row[0] == BOS for row in found.tolist()] == [starts] * 3
    assert torch.equal(found[:, int(starts) :], plain)


def test_a_document_begins_with_what_the_tokenizer_has() -> None:
    assert document_start(tiny_tokenizer()) == [BOS]
    assert document_start(tiny_tokenizer(template="<pad> <s> $A </s>")) == [0, BOS]
    assert document_start(tiny_tokenizer(has_bos=False)) == [EOS]
    bare = tiny_tokenizer(has_bos=False)
    bare.eos_token = None
    assert document_start(bare) == [0]
    bare.pad_token = None
    with pytest.raises(ValueError, match="neither bos nor eos nor pad"):
        document_start(bare)


def test_several_start_tokens_follow_an_end_and_one_that_ends_too_stands_once() -> None:
    several = write_windows(
        ending(ends=MANY), tiny_tokenizer(template="<pad> <s> $A"), windows=4, length=40
    )
    for row in several.tolist():
        assert row[:2] == [0, BOS]
        ends = [place for place in range(2, 38) if row[place] in MANY]
        assert len(ends) > 2
        assert all(row[place + 1 : place + 3] == [0, BOS] for place in ends)
    model: Any = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[EOS] += 5  # it ends often
    once = write_windows(model, tiny_tokenizer(has_bos=False), windows=8, length=40)
    assert int((once == EOS).sum()) > 3
    assert BOS not in once[:, 1:][once[:, :-1] == EOS]


def test_the_text_has_no_special_tokens_and_a_blank_line_between_documents() -> None:
    tokenizer = tiny_tokenizer()
    one, two = (tokenizer(text)["input_ids"] for text in ("Grüße\n", "two"))
    assert text_of([BOS, *one, EOS, BOS, *two], tokenizer, [EOS]) == "Grüße\n\n\ntwo"


def test_a_state_space_model_writes_too() -> None:
    found = write_windows(tiny_mamba(), tiny_tokenizer(), windows=2, length=8)
    assert found.shape == (2, 8)


def test_what_cannot_write_is_refused(tmp_path: Path) -> None:
    def refused(model: PreTrainedModel, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            write_windows(model, tiny_tokenizer(), **{"windows": 2, "length": 8} | options)

    refused(tiny_model(), "0 windows", windows=0)
    refused(tiny_model(), "1 tokens", length=1)
    refused(tiny_model(), f"{CONTEXT + 2} tokens.*{CONTEXT}", length=CONTEXT + 1)
    training = tiny_model()
    training.train()
    refused(training, "training mode")
    broken = tiny_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    refused(broken, "not finite")
    encoder = BertLMHeadModel(
        BertConfig(
            vocab_size=260,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=37,
        )
    )
    encoder.eval()  # type: ignore[no-untyped-call]
    refused(encoder, "depend on later tokens")
    save_tiny(tmp_path / "model")
    refused(load_model(tmp_path / "model", offload=tmp_path / "files"), "offload")

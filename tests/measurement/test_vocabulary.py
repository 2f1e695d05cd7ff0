"""The words of a neuron are plain products of its weights with the embeddings."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from entangle.measurement.measuring import measure
from entangle.measurement.vocabulary import SHOWN, NeuronWords, Words, words
from entangle.model.experts import ExpertLinear
from entangle.model.layers import find_layers, replace_layer
from entangle.model.sides import find_channel
from entangle.numerics.routing import CentroidRouter
from entangle.runs import store
from tests.measurement.test_context_search import drawn_windows
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import tiny_mamba, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE = len(TOKENIZER)
MLP = "model.layers.1.mlp"


@functools.cache
def tiny(name: str, **changes: Any) -> Any:
    return tiny_model(name, **changes)


def found(model: PreTrainedModel, neuron: str) -> dict[str, Words]:
    """Return what a neuron reads and writes, by the neuron whose weights they are."""
    (one,) = words(model, neuron, tokenizer=TOKENIZER)
    assert one.neuron == neuron
    assert one.missing == []
    assert len({x.neuron for x in one.words}) == len(one.words)
    return {x.neuron: x for x in one.words}


def check(one: Words, values: torch.Tensor) -> None:
    """Check that these are the largest and smallest of the values (vocabulary,)."""
    values = values[:SIZE].detach().double()
    order = values.argsort(descending=True).tolist()
    ends = {True: order[:SHOWN], False: order[::-1][:SHOWN]}
    for largest, ids in ends.items():
        shown = one.top if largest else one.bottom
        assert [x.id for x in shown] == ids
        assert [x.value for x in shown] == pytest.approx(values[ids].tolist(), rel=1e-3, abs=1e-5)
        deviations = (values[ids] - values.mean()) / values.std(correction=0)
        assert [x.deviation for x in shown] == pytest.approx(
            deviations.tolist(), rel=1e-3, abs=1e-3
        )
        texts = [TOKENIZER.decode([x]) for x in ids]
        pairs = zip(shown, texts, strict=True)
        assert all(x.token == text or x.token == f"{text}<{x.id}>" for x, text in pairs)


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_hidden_unit_reads_its_two_rows_and_writes_its_column(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert (embedding is head) == tied
    block = model.model.layers[1]
    norm = block.post_attention_layernorm.weight
    expected = {
        f"{MLP}.gate_proj:30": embedding @ (norm * block.mlp.gate_proj.weight[30]),
        f"{MLP}.up_proj:30": embedding @ (norm * block.mlp.up_proj.weight[30]),
        f"{MLP}.down_proj:input:30": head
        @ (model.model.norm.weight * block.mlp.down_proj.weight[:, 30]),
    }
    for neuron in expected:  # whichever is asked for
        shown = found(model, neuron)
        assert {*shown} == {*expected}
        for name, values in expected.items():
            check(shown[name], values)
            assert shown[name].side == ("writes" if "down" in name else "reads")
    assert next(iter(found(model, f"{MLP}.up_proj:30"))) == f"{MLP}.up_proj:30"  # its own first


def test_a_neuron_that_writes_a_coordinate_of_the_stream() -> None:
    model = tiny("llama")
    shown = found(model, f"{MLP}.down_proj:5")
    assert [(one.side, one.what) for one in shown.values()] == [("writes", "coordinate")]
    head = model.get_output_embeddings().weight
    check(shown[f"{MLP}.down_proj:5"], head[:, 5] * model.model.norm.weight[5])
    shown = found(model, f"{MLP}.up_proj:input:5")
    norm = model.model.layers[1].post_attention_layernorm.weight
    check(shown[f"{MLP}.up_proj:input:5"], model.get_input_embeddings().weight[:, 5] * norm[5])


def test_norms_that_add_one_and_norms_behind_a_layer() -> None:
    model = tiny("gemma3")
    embedding, block = model.get_input_embeddings().weight, model.model.layers[1]
    shown = found(model, f"{MLP}.up_proj:7")
    before = 1 + block.pre_feedforward_layernorm.weight
    check(shown[f"{MLP}.up_proj:7"], embedding @ (before * block.mlp.up_proj.weight[7]))
    written = shown[f"{MLP}.down_proj:input:7"]
    behind, final = 1 + block.post_feedforward_layernorm.weight, 1 + model.model.norm.weight
    check(written, embedding @ (final * behind * block.mlp.down_proj.weight[:, 7]))
    assert written.through == ["the RMS norm behind it", "the final RMS norm"]


def test_layer_norms_and_fused_attention_of_gpt2() -> None:
    model = tiny("gpt2")
    block, embedding = model.transformer.h[1], model.transformer.wte.weight
    final = centred(embedding * model.transformer.ln_f.weight)
    rows = block.attn.c_attn.weight.T
    value = 2 * 24 + 5
    shown = found(model, f"transformer.h.1.attn.c_attn:{value}")
    assert [one.side for one in shown.values()] == ["reads", "writes"]
    read = embedding @ centred(rows[value] * block.ln_1.weight)
    check(shown[f"transformer.h.1.attn.c_attn:{value}"], read)
    column = block.attn.c_proj.weight.T[:, 5]
    check(shown["transformer.h.1.attn.c_proj:input:5"], final @ column)
    query = found(model, "transformer.h.1.attn.c_attn:3")
    assert [one.side for one in query.values()] == ["reads"]
    check(query["transformer.h.1.attn.c_attn:3"], embedding @ centred(rows[3] * block.ln_1.weight))


@pytest.mark.parametrize(
    ("name", "block", "norm", "up", "down"),
    [
        ("phi", "model.layers.1", "input_layernorm", "mlp.fc1", "mlp.fc2"),
        (
            "falcon",
            "transformer.h.1",
            "input_layernorm",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
    ],
)
def test_blocks_whose_attention_and_mlp_are_side_by_side(
    name: str, block: str, norm: str, up: str, down: str
) -> None:
    model = tiny(name)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    final = model.get_submodule("model.final_layernorm" if name == "phi" else "transformer.ln_f")
    gain = model.get_submodule(f"{block}.{norm}").weight
    row = model.get_submodule(f"{block}.{up}").weight[9]
    shown = found(model, f"{block}.{up}:9")
    check(shown[f"{block}.{up}:9"], embedding @ centred(row * gain))
    column = model.get_submodule(f"{block}.{down}").weight[:, 9]
    check(shown[f"{block}.{down}:input:9"], centred(head * final.weight) @ column)


def test_what_says_nothing_of_words_is_refused_with_the_reason() -> None:
    def refused(model: PreTrainedModel, neuron: str, kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as error:
            words(model, neuron, tokenizer=TOKENIZER)
        return str(error.value)

    assert "neither reads" in refused(tiny_mamba(), "backbone.layers.1.mixer.x_proj:2")
    assert "change" in refused(tiny("bloom"), "transformer.h.1.self_attention.query_key_value:2")
    assert "output embedding" in refused(tiny("opt"), "model.decoder.layers.1.fc2:3")
    assert "36" in refused(tiny("llama"), f"{MLP}.up_proj:37", LookupError)
    assert f"{MLP}.up_proj" in refused(tiny("llama"), f"{MLP}.up_pro:1", LookupError)
    model = tiny_model("llama")
    layer, _ = find_channel(find_layers(model), f"{MLP}.up_proj:0")
    weight: Any = layer.module.get_parameter("weight")  # type: ignore[union-attr]
    router = CentroidRouter(torch.zeros(24, 2), torch.tensor([0.0, 1.0]))
    mixture = ExpertLinear(torch.stack([weight.data] * 2), None, router, [1, 1])
    replace_layer(model, layer, mixture)  # type: ignore[arg-type]
    assert "2 experts" in refused(model, f"{MLP}.up_proj:0")
    assert "trained expert" in refused(tiny_mixture(), f"{MLP}.experts.0.gate_up_proj:1")


def test_what_is_there_is_shown_where_the_other_side_is_missing() -> None:
    (one,) = words(tiny("bloom"), "transformer.h.1.mlp.dense_h_to_4h:4", tokenizer=TOKENIZER)
    assert [x.side for x in one.words] == ["writes"]
    assert len(one.missing) == 1
    assert "embeddings" in one.missing[0]


def test_the_words_are_added_to_the_run_that_measured_these_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    run = measure(model, drawn_windows(4, 16), layers="*.up_proj", out=tmp_path / "run")
    names = [f"{MLP}.up_proj:3", f"{MLP}.down_proj:input:3"]  # which need not be measured
    results: list[NeuronWords] = []
    for name in names:
        results += words(model, name, tokenizer=TOKENIZER, run=run, out=tmp_path / "run")
    kept = store.read_json(tmp_path / "run" / "words.json")
    assert [*kept] == names
    for one in results:
        assert kept[one.neuron]["words"][0]["top"][0]["value"] == one.words[0].top[0].value
    with pytest.raises(ValueError, match="other weights"):
        words(tiny("llama", seed=1), names[0], tokenizer=TOKENIZER, run=run)

"""What the trial says that layers read and write is what their architectures' papers say."""

import functools
from typing import Any

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, PreTrainedModel

from entangle.model.layers import find_layers
from entangle.model.stream import Stream, find_stream
from tests.tiny_models import tiny_llama4, tiny_mamba, tiny_model

ROLES = {  # what each reads the stream through, what each writes to it through, and who feeds whom
    "llama": (
        {"q_proj": "rms", "k_proj": "rms", "v_proj": "rms", "gate_proj": "rms", "up_proj": "rms"},
        {"o_proj": "", "down_proj": ""},
        {"o_proj": {"v_proj"}, "down_proj": {"gate_proj", "up_proj"}},
    ),
    "gemma3": (
        {"q_proj": "rms", "k_proj": "rms", "v_proj": "rms", "gate_proj": "rms", "up_proj": "rms"},
        {"o_proj": "rms", "down_proj": "rms"},
        {"o_proj": {"v_proj"}, "down_proj": {"gate_proj", "up_proj"}},
    ),
    "olmo2": (
        {"q_proj": "", "k_proj": "", "v_proj": "", "gate_proj": "", "up_proj": ""},
        {"o_proj": "rms", "down_proj": "rms"},
        {"o_proj": {"v_proj"}, "down_proj": {"gate_proj", "up_proj"}},
    ),
    "gpt2": (
        {"c_attn": "layer", "c_fc": "layer"},
        {"attn.c_proj": "", "mlp.c_proj": ""},
        {"attn.c_proj": {"c_attn"}, "mlp.c_proj": {"c_fc"}},
    ),
    "phi": (
        {"q_proj": "layer", "k_proj": "layer", "v_proj": "layer", "fc1": "layer"},
        {"dense": "", "fc2": ""},
        {"dense": {"v_proj"}, "fc2": {"fc1"}},
    ),
    "falcon": (
        {"query_key_value": "layer", "dense_h_to_4h": "layer"},
        {"self_attention.dense": "", "dense_4h_to_h": ""},
        {"self_attention.dense": {"query_key_value"}, "dense_4h_to_h": {"dense_h_to_4h"}},
    ),
    "mixtral": (
        {"q_proj": "rms", "k_proj": "rms", "v_proj": "rms"},
        {"o_proj": ""},
        {"o_proj": {"v_proj"}},
    ),
}


@functools.cache
def tried(name: str) -> tuple[PreTrainedModel, Stream]:
    model = tiny_model(name)
    return model, find_stream(model, {1})


def short(name: str, known: dict[str, Any]) -> str:
    return next(key for key in known if name.endswith(f".{key}"))


@pytest.mark.parametrize("name", ROLES)
def test_who_reads_writes_and_feeds_whom(name: str) -> None:
    reads, writes, fed = ROLES[name]
    _, stream = tried(name)
    assert {short(key, reads): one.norm for key, one in stream.reads.items()} == reads
    assert {short(key, writes): one.norm for key, one in stream.writes.items()} == writes
    found = {
        short(key, fed): {short(layer, reads) for layer, _ in parts}
        for key, parts in stream.units.items()
    }
    assert found == fed
    assert stream.embedded
    assert stream.output is not None


def test_the_gain_is_the_norms_weight_with_the_bits_it_has() -> None:
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0)):
        model: Any = tiny_model("llama", dtype=dtype)
        stream = find_stream(model, {1})
        block = model.model.layers[1]
        reads = stream.reads["model.layers.1.mlp.gate_proj"]
        weight = block.post_attention_layernorm.weight.detach().float()
        assert reads.gain == pytest.approx(weight, abs=error)
        assert stream.output is not None
        assert stream.output.gain == pytest.approx(
            model.model.norm.weight.detach().float(), abs=error
        )
    gemma, stream = tried("gemma3")
    block = gemma.get_submodule("model.layers.1")
    for name, norm in (
        ("reads", "pre_feedforward_layernorm"),
        ("writes", "post_feedforward_layernorm"),
    ):
        layer = "up_proj" if name == "reads" else "down_proj"
        gain = getattr(stream, name)[f"model.layers.1.mlp.{layer}"].gain
        weight = 1 + block.get_submodule(norm).get_parameter("weight").detach()
        assert gain == pytest.approx(weight, rel=1e-5)


def test_a_scale_of_what_is_written_is_in_the_gain() -> None:
    model = tiny_model("granite", residual_multiplier=0.25)
    stream = find_stream(model, {0})
    for one in stream.writes.values():
        assert one.gain == pytest.approx(torch.full((24,), 0.25), rel=1e-6)


def test_a_unit_is_its_rows_and_its_column() -> None:
    _, stream = tried("llama")
    mlp = "model.layers.1.mlp"
    assert stream.feeding(f"{mlp}.down_proj", 30) == [
        (f"{mlp}.gate_proj", 30),
        (f"{mlp}.up_proj", 30),
    ]
    assert stream.fed_by(f"{mlp}.up_proj", 36) == (f"{mlp}.down_proj", 36)
    attention = "model.layers.1.self_attn"  # three heads share one of keys and values
    for channel in (3, 11, 19):
        assert stream.feeding(f"{attention}.o_proj", channel) == [(f"{attention}.v_proj", 3)]
    assert stream.fed_by(f"{attention}.v_proj", 3) is None  # it makes three channels
    assert stream.fed_by(f"{attention}.q_proj", 3) is None
    _, gpt2 = tried("gpt2")  # query, key and value are one layer
    attention = "transformer.h.1.attn"
    assert gpt2.feeding(f"{attention}.c_proj", 5) == [(f"{attention}.c_attn", 2 * 24 + 5)]
    assert gpt2.fed_by(f"{attention}.c_attn", 48 + 5) == (f"{attention}.c_proj", 5)
    assert gpt2.fed_by(f"{attention}.c_attn", 5) is None


def test_other_embeddings_and_outputs_are_told_apart() -> None:
    bloom = find_stream(tiny_model("bloom"), {0})  # a norm of the embeddings
    assert not bloom.embedded
    assert bloom.output is not None
    opt = find_stream(tiny_model("opt"), {0})  # projections of them to another width, and back
    assert not opt.embedded
    assert opt.output is None
    assert opt.reads
    assert opt.writes


def test_layers_that_do_something_else_neither_read_nor_write() -> None:
    mamba = find_stream(tiny_mamba(), {1})
    assert {name.rpartition(".")[2] for name in mamba.reads} == {"in_proj"}
    assert {name.rpartition(".")[2] for name in mamba.writes} == {"out_proj"}
    llama4 = find_stream(tiny_llama4(), {1})  # its router is a layer that returns a tuple
    assert "model.layers.1.feed_forward.router" in llama4.reads
    assert "model.layers.1.feed_forward.router" not in llama4.writes


def test_a_stream_of_several_states_is_refused_in_words() -> None:
    """Gemma 3n's blocks have four states for a token."""
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
    sizes |= {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    sizes |= {
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    config = Gemma3nTextConfig(**sizes, layer_types=["full_attention"] * 2)
    model = Gemma3nForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"4 x 1 x 1 x 24.*no words"):
        find_stream(model, {1})


def test_a_trial_that_fails_is_refused_in_words() -> None:
    model = tiny_model("llama")
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 2:  # in the trial, and not in the passes before it
            raise IndexError("index 9 is out of range")

    class Failing(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            fail()
            return states

    model.model.norm = Failing()
    with pytest.raises(ValueError, match=r"IndexError: index 9 .*no words"):
        find_stream(model, {1})
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_trial_leaves_the_model_and_its_recordings_as_they_were() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(3, 20)[None]
    logits = model(tokens).logits
    heard: list[int] = []
    layer = find_layers(model)[0].module
    handle = layer.register_forward_hook(lambda *_: heard.append(1))
    find_stream(model, {0})
    assert not heard
    assert torch.equal(model(tokens).logits, logits)
    assert heard == [1]
    handle.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

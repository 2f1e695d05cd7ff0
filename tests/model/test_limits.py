"""The longest sequence is the longest that the model itself runs; configurations may be odd."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from entangle.model.limits import context_of
from tests.tiny_models import CONTEXT, tiny_model, tiny_vision_model

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 1}
SIZES |= {"bos_token_id": 2, "eos_token_id": 3}
BERTS = SIZES | {"intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
BERTS |= {"is_decoder": True}
LEARNED: dict[str, dict[str, Any]] = {  # models with a fixed number of positions
    "Bert": BERTS,
    "Roberta": BERTS,  # its first positions stand for padding
    "CTRL": SIZES | {"n_layer": 1, "dff": 24, "n_positions": 32},
    "GPTBigCode": SIZES | {"n_layer": 1, "n_positions": 32},
    "GPTNeo": BERTS | {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 50, "max_seq_len": 32},
}


def runs(model: Any, length: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", [*LEARNED, "gpt2", "gpt-j", "opt"])
def test_a_model_runs_what_is_allowed_and_not_one_token_more(name: str) -> None:
    if name in LEARNED:
        config = getattr(transformers, f"{name}Config")(**LEARNED[name])
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.eval()
    else:
        model = tiny_model(name)
    limit = context_of(model)
    assert limit is not None
    assert runs(model, limit)
    assert not runs(model, limit + 1)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_there_is_no_limit_to_distances(name: str) -> None:
    model = tiny_model(name, max_position_embeddings=CONTEXT, seq_length=CONTEXT)
    assert context_of(model) is None
    assert runs(model, 3 * CONTEXT)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "seq_length"])
@pytest.mark.parametrize(("value", "expected"), [(99, 99), (-1, None), (0, None), (None, None)])
def test_a_configuration_may_say_it_otherwise_or_not_at_all(
    name: str, value: int | None, expected: int | None
) -> None:
    values: dict[str, Any] = {name: value}
    config = transformers.PreTrainedConfig(**values)
    model: Any = SimpleNamespace(config=config, named_modules=dict)
    assert context_of(model) == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, CONTEXT),
        ({"rope_type": "linear", "factor": 4.0}, 4 * CONTEXT),
        ({"rope_type": "dynamic", "factor": 2.5}, 160),
        ({"rope_type": "yarn", "factor": 4.0}, 4 * CONTEXT),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            CONTEXT,  # the scaled length
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
        (
            {
                "rope_type": "longrope",
                "long_factor": [1.0] * 4,
                "short_factor": [1.0] * 4,
                "original_max_position_embeddings": 16,
            },
            CONTEXT,
        ),
    ],
)
def test_scaled_rotary_embeddings_reach_farther(rope: dict[str, Any], expected: int) -> None:
    model = tiny_model("llama", rope_parameters=rope | {"rope_theta": 10_000.0})
    assert context_of(model) == expected


def test_a_kind_of_layer_may_be_scaled_by_itself() -> None:
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    kinds["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    model = tiny_model("gemma3", rope_parameters=kinds)
    assert context_of(model) == 8 * CONTEXT


def test_the_positions_of_images_do_not_count() -> None:
    model = tiny_vision_model()
    assert context_of(model) == model.config.get_text_config().max_position_embeddings

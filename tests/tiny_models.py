"""Tiny random models of many architectures and a tiny tokenizer, all made here: no hub, no file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260  # the 256 bytes and the special tokens below, and one that no text has
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CONTEXT = 64

# Sizes that differ from each other wherever the architecture lets them.
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
}
_GPT_LIKE = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 41, "n_positions": CONTEXT}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_WIDE_HEADS = _LLAMA_LIKE | {"head_dim": 10}
_ALL_HEADS = _LLAMA_LIKE | {"num_key_value_heads": 3}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 24, "n_layer": 3, "n_head": 3}),
    "falcon": (
        "FalconConfig",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "ffn_hidden_size": 41,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "falcon-alibi": (
        "FalconConfig",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "alibi": True,
            "bias": True,
            "new_decoder_architecture": True,
            "num_kv_heads": 1,
        },
    ),
    "gemma2": ("Gemma2Config", _WIDE_HEADS | _SLIDING),
    "gemma3": ("Gemma3TextConfig", _WIDE_HEADS | _SLIDING),
    "gpt2": ("GPT2Config", _GPT_LIKE),
    "gpt-j": ("GPTJConfig", _GPT_LIKE | {"rotary_dim": 4}),
    "gpt-neox": (
        "GPTNeoXConfig",
        {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"},
    ),
    "llama": ("LlamaConfig", _LLAMA_LIKE | {"num_hidden_layers": 3, "mlp_bias": True}),
    "mistral": ("MistralConfig", _WIDE_HEADS | {"sliding_window": 7}),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 24,
            "word_embed_proj_dim": 16,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "phi": ("PhiConfig", _ALL_HEADS | {"hidden_size": 48}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _WIDE_HEADS),
    "stablelm": ("StableLmConfig", _ALL_HEADS | {"hidden_size": 48}),
}
ARCHITECTURES = tuple(_CONFIGS)
_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {  # more of them are in `tiny_mixtures`
    "mixtral": (
        "MixtralConfig",
        _LLAMA_LIKE | {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
_SCALED: dict[str, tuple[str, dict[str, Any]]] = {  # these multiply or divide their logits
    "cohere": ("CohereConfig", _LLAMA_LIKE),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 3.0}),
}


def tiny_model(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a random model in eval mode; ``changes`` go to its configuration."""
    kind, options = (_CONFIGS | _SCALED | _MIXTURES)[name]
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    make: Callable[..., PreTrainedConfig] = getattr(transformers, kind)
    config = make(vocab_size=VOCABULARY, **ids | options | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    _filled(model, seed).to(dtype)  # type: ignore[arg-type]  # a dtype is right; the stub is not
    return model


def tiny_mamba() -> PreTrainedModel:
    """Return a random Mamba, which reads the weight of its `dt_proj` without running it."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, state_size=8, time_step_rank=5
    )
    return _filled(MambaForCausalLM(config))


def tiny_llama4() -> PreTrainedModel:
    """Return a random Llama 4, whose router is a linear layer that returns a tuple."""
    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        head_dim=8,
        intermediate_size_mlp=37,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        attention_chunk_size=16,
        **_LLAMA_LIKE,
    )
    return _filled(Llama4ForCausalLM(config))


def _filled(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Fill a model with random weights, also its biases and norms, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (parameter if parameter.ndim == 1 else 0))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def tiny_vision_model() -> PreTrainedModel:
    """Return a random model for text and images, both with as many blocks."""
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"hidden_size": 16, "intermediate_size": 20, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=_WIDE_HEADS | {"vocab_size": VOCABULARY},
        vision_config=depth | images,
        mm_tokens_per_image=4,
    )
    model: PreTrainedModel = Gemma3ForConditionalGeneration(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def tiny_tokenizer(
    *, adds_bos: bool = False, has_bos: bool = True, template: str = ""
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes; with ``adds_bos`` it begins texts with ``<s>``.

    ``template`` is what it makes of a text ``$A``, such as ``<s> $A </s>``.
    """
    words = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos or template:
        backend.post_processor = processors.TemplateProcessing(
            single=template or "<s> $A",
            special_tokens=[(word, i) for i, word in enumerate(SPECIAL.values())],
        )
    special = SPECIAL if has_bos else {key: SPECIAL[key] for key in ("pad_token", "eos_token")}
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, model_max_length=CONTEXT, **special
    )
    return tokenizer


def save_tiny(
    folder: Path, name: str = "llama", *, adds_bos: bool = False, **options: Any
) -> PreTrainedModel:
    """Save a tiny model and its tokenizer into a folder, as a hub model would be; return it."""
    model = tiny_model(name, **options)
    model.save_pretrained(folder)
    tiny_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return model

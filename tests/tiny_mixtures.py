"""Tiny random mixtures of experts of every class whose experts' matrices are fused."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import CONTEXT, VOCABULARY, _filled

EXPERTS, HIDDEN = 4, 32
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
}
_HEADS = {"head_dim": 8}
_LATENT = {  # attention of DeepSeek
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_LOCAL = {"num_local_experts": EXPERTS}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": CONTEXT,
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": 20,
                "moe_num_experts": EXPERTS,
                "moe_top_k": 2,
            },
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        _LATENT | _SHARED | {"first_k_dense_replace": 0, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("DeepseekV3Config", _LATENT | _SHARED | _DENSE_FIRST),
    "dots1": ("Dots1Config", _HEADS | _SHARED | _DENSE_FIRST),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
        },
    ),
    "flex_olmo": ("FlexOlmoConfig", {"num_experts": EXPERTS}),
    "glm4_moe": ("Glm4MoeConfig", _HEADS | _SHARED | _DENSE_FIRST),
    "gpt_oss": (
        "GptOssConfig",
        _LOCAL
        | _HEADS
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granitemoe": ("GraniteMoeConfig", _LOCAL),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        _HEADS | {"num_experts": EXPERTS, "moe_topk": 2},
    ),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": EXPERTS,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        },
    ),
    "jetmoe": ("JetMoeConfig", _LOCAL | {"kv_channels": 8}),
    "kimi_linear": (
        "KimiLinearConfig",
        _LATENT
        | _LOCAL
        | _DENSE_FIRST
        | {"layer_types": ["full_attention"] * 2}  # the other kind is slow without a kernel
        | {"num_experts": EXPERTS, "num_experts_per_token": 2, "num_shared_experts": 1},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "num_experts": EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        _LOCAL
        | _HEADS
        | {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 28,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 16,
        },
    ),
    "minimax": ("MiniMaxConfig", _LOCAL | _HEADS | _MIXED | {"block_size": 16}),
    "minimax_m2": ("MiniMaxM2Config", _LOCAL | _HEADS),
    "mixtral": ("MixtralConfig", _LOCAL),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS}),
    "phimoe": ("PhimoeConfig", _LOCAL),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": 28},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _HEADS | {"num_experts": EXPERTS}),
    "qwen3_next": (
        "Qwen3NextConfig",
        _HEADS
        | _MIXED
        | {
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 28,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
MIXTURES = tuple(_CONFIGS)


def tiny_mixture(name: str = "mixtral", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random mixture in eval mode; a class that transformers lacks skips the test."""
    kind, options = _CONFIGS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    sizes = {} if name == "dbrx" else _SIZES
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **ids | sizes | options | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for module in model.modules():  # buffers of routers, which `from_config` leaves unset
        for key, buffer in module.named_buffers(recurse=False):
            if "correction_bias" in key:
                nn.init.zeros_(buffer)
    return _filled(model, seed)


def without_tokens(model: PreTrainedModel, expert: int) -> None:
    """Let no token be sent to an expert of a Mixtral, in any block."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.abs_()
                parameter[expert] = 0  # the smallest logit
                model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                    lambda _, args: (args[0].abs(),)
                )

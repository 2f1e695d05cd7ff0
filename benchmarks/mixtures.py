"""Cost of recording trained experts, as ratios of CPU times that are taken in turns (two minutes).

Run `python -m benchmarks.mixtures`. Prints the table of `benchmarks/README.md`.
"""

import copy
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import entangle
from benchmarks.measure import table
from benchmarks.timing import forward, machine, side_by_side
from entangle.model.hooks import recording_rows
from entangle.model.layers import find_layers

EXPERTS = "*.experts.*"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 576,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}


def main() -> None:
    """Time one batch of 4 windows of 512 through a mixture with random weights, recorded and not."""
    print(machine(), end="\n\n")
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES)).eval()  # type: ignore[no-untyped-call]
    eager, hooked, recorded = (copy.deepcopy(own) for _ in range(3))
    eager.set_experts_implementation("eager")
    tokens = torch.randint(512, (4, 512))
    with (
        entangle.record(recorded, EXPERTS),
        recording_rows(hooked, find_layers(hooked, EXPERTS), lambda *_: None),
    ):
        forward(recorded, tokens)  # the pilot
        forward(hooked, tokens)
        seconds = side_by_side(
            {
                "plain forward pass, eager experts": lambda: forward(eager, tokens),
                "plain forward pass, the model's own": lambda: forward(own, tokens),
                "experts heard by hooks that do nothing": lambda: forward(hooked, tokens),
                "experts recorded": lambda: forward(recorded, tokens),
            },
            clock=time.process_time,
        )
    table(
        "4 blocks of 16 experts, 2 for each token, 576 wide, 2,048 tokens, 128 layers",
        seconds,
        unit=1,
        name="CPU seconds",
        base="plain forward pass, eager experts",
    )


if __name__ == "__main__":
    main()

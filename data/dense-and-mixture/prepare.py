"""Train `dense-SEED` and `mixture-SEED`: tiny models of equal active size, on the same text.

Run as `python data/dense-and-mixture/prepare.py`, after `make data` and data/fortunes/prepare.py. A model whose
folder is there is not trained again.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HERE = Path(__file__).resolve().parent
TRAINING = [HERE.parent / "python-docs/calibration.txt", HERE.parent / "fortunes/fortunes.txt"]
VALIDATION = HERE.parent / "python-docs/evaluation.txt"
SEEDS = (0, 1, 2)
VOCABULARY, LENGTH, BATCH = 4096, 256, 16  # tokens, tokens a window, windows a step
STEPS = {"dense": 800, "mixture": 800}
RATE, WARM_UP, DECAY, BALANCE = 3e-3, 50, 0.1, 0.02
EXPERTS, CHOSEN, WIDTH = (
    8,
    2,
    192,
)  # neurons an expert; the dense MLP is as wide as the chosen experts
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": CHOSEN * WIDTH,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def main() -> None:
    """Train the models that are missing, and print their losses."""
    missing = [path for path in (*TRAINING, VALIDATION) if not path.is_file()]
    if missing:
        sys.exit(
            f"{HERE.name}: {missing[0]} is missing: run make data and data/fortunes/prepare.py"
        )
    tokenizer = trained_tokenizer()
    tokens, held_out = windows(tokenizer, TRAINING), windows(tokenizer, [VALIDATION])
    print(f"{HERE.name}: {tokens.numel():,} tokens to train on, {held_out.numel():,} held out")
    for seed in SEEDS:
        for kind in STEPS:
            folder = HERE / f"{kind}-{seed}"
            if not folder.is_dir():
                train(kind, seed, tokens, held_out, tokenizer, folder)
            made = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            print(
                f"{HERE.name}: {folder.name}: {made['validation_loss']:.3f} nats a token held out"
            )


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in TRAINING], trainer)
    fast: Any = PreTrainedTokenizerFast  # it has no types
    return fast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-any-return]


def windows(tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> torch.Tensor:
    """Return the texts' tokens (windows, length), without the rest."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def new_model(kind: str) -> PreTrainedModel:
    """Return an untrained model."""
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            moe_intermediate_size=WIDTH,
            norm_topk_prob=True,
        )
    )


def train(
    kind: str,
    seed: int,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Train a model and write its folder; the same seed has the same batches for both kinds."""
    torch.manual_seed(seed)
    model, steps, began = new_model(kind), STEPS[kind], time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    for step, batch in zip(range(steps), batches(tokens, seed), strict=False):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{folder.name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    made = {
        "validation_loss": validation_loss(model, held_out),
        "held_out_tokens": held_out.numel(),
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - began),
    }
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss of the next token; for a mixture with the balance of each block's experts.

    The models' own balance is that of all blocks together, which lets single experts have no token.
    """
    mixture = isinstance(model, Qwen3MoeForCausalLM)
    routed = {"output_router_logits": True} if mixture else {}
    output = model(input_ids=batch, labels=batch, **routed)
    loss: torch.Tensor = output.loss
    if mixture:
        own = output.aux_loss * model.router_aux_loss_coef  # of all blocks together, in the loss
        every: Any = [
            load_balancing_loss_func((one,), EXPERTS, CHOSEN) for one in output.router_logits
        ]
        loss = loss - own + BALANCE * torch.stack(every).mean()
    return loss


def batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows without end, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield tokens[order[start : start + BATCH]]


@torch.no_grad()
def validation_loss(model: PreTrainedModel, held_out: torch.Tensor) -> float:
    """Return the mean loss of the next token, in nats, without the balance of the experts."""
    model.train(False)
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
        * len(batch)
        for batch in held_out.split(BATCH)
    ]
    return float(sum(losses)) / len(held_out)


if __name__ == "__main__":
    main()

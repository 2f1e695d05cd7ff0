"""Let a model go on with a text, and time it."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from entangle.model.experts import PackedLinear
from entangle.model.packing import weight_bytes
from entangle.model.placing import home_of


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model wrote after a prompt, and how long it took."""

    text: str
    prompt_tokens: int
    tokens: int  # new ones, an end of sequence too
    first_seconds: float  # to the first new token: the prompt's
    seconds: float  # from the first new token to the last
    weight_bytes: int  # of the model in memory

    @property
    def tokens_per_second(self) -> float:
        """The speed after the first new token; NaN if there is no other."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else float("nan")


class _Clock(TextStreamer):
    """Notes when each token came, and hands the text on in whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say
        self.times: list[float] = []  # the first is the prompt's

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text."""
        self.say(text)


@contextmanager
def _no_settings(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model's own settings, such as a penalty for repetition, out of ours."""
    kept, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = kept


def _compile(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Have all kernels of packed layers compiled, which is not the model's speed."""
    packed = [module.sliced for module in model.modules() if isinstance(module, PackedLinear)]
    for sliced in {one.dtype: one for one in packed}.values():
        sliced.dense(0)
        sliced.product(torch.zeros(2, sliced.inputs), 0)
    if packed:
        model(input_ids=ids[:, :1])  # routed and not


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int = 64,
    say: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Return what the model finds most likely after the prompt, at most ``tokens`` of it.

    It ends early where the model ends the sequence. ``say`` is given the text as it comes. The
    model may be packed (see `load_model`).

    Raises:
        ValueError: a prompt without a token, fewer than one to write, or more than the model reads.
    """
    prompt.encode()  # a half of a character, as a shell passes bytes on, is a ValueError
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(home_of(model))
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not ids.numel() or tokens < 1:
        raise ValueError(
            f"expected a prompt of at least one token, and at least one token to write, got "
            f"{ids.shape[1]} and {tokens}"
        )
    if longest is not None and ids.shape[1] + tokens > longest:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {tokens} to write are more than the "
            f"{longest} that the model reads: ask for fewer, or give a shorter prompt"
        )
    end = model.generation_config.eos_token_id if model.generation_config else None
    end = tokenizer.eos_token_id if end is None else end
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    clock = _Clock(tokenizer, say)
    with torch.inference_mode(), _no_settings(model):
        _compile(model, ids)
        found = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=clock,
        )
    start, first, *others = clock.times
    new = found[0, ids.shape[1] :]
    return Generated(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=ids.shape[1],
        tokens=len(new),
        first_seconds=first - start,
        seconds=others[-1] - first if others else 0.0,
        weight_bytes=weight_bytes(model),
    )

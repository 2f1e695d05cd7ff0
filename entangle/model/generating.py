"""Greedy generation of text by a model, with its timing."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from entangle.model.experts import Mixture, PackedLinear
from entangle.model.hooks import on_trial
from entangle.model.limits import context_of
from entangle.model.packing import weight_bytes
from entangle.model.placing import input_device
from entangle.model.text import start_tokens
from entangle.numerics.sparse import Sliced
from entangle.numerics.torch_settings import with_torch_defaults

_WRITTEN, _WARMING = (
    40,
    8,
)  # tokens that are written to time a model, and the first that do not count
_TRIED = 5  # tokens to time a number of threads
_TRIED_SECONDS = 2.0  # after which no other number of threads is tried


@dataclasses.dataclass(frozen=True)
class Generated:
    """The text that a model generated after a prompt, with times and sizes."""

    text: str
    prompt_tokens: int
    tokens: int  # generated tokens, including the end of sequence
    first_seconds: float  # until the first generated token: reading the prompt
    seconds: float  # from the first generated token to the last
    weight_bytes: int  # the size of the model's weights in memory
    threads: int  # of the CPU, for the tokens after the first

    @property
    def tokens_per_second(self) -> float:
        """The speed after the first generated token; NaN if it is the only one."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else float("nan")


class _Times(BaseStreamer):
    """A streamer that records the time of each token; the first is that of the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


class _Clock(TextStreamer):
    """A streamer that records the time of each token, and passes the text on in whole words.

    All threads read the prompt, and ``threads`` compute the tokens after the first.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], threads: int
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.threads = threads
        self.times: list[float] = []  # the first is the time of the prompt

    def put(self, value: torch.Tensor) -> None:
        """Record the time, and decode the tokens."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:  # the prompt is read
            torch.set_num_threads(self.threads)
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass decoded text on."""
        self.on_text(text)


@contextmanager
def default_settings(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation settings by defaults, without e.g. a repetition penalty."""
    kept, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = kept


def _compile(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Compile all kernels of packed layers and experts, so that the timing does not include it.

    No recording counts the passes.
    """
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    packed = [module.sliced for module in mixtures if isinstance(module, PackedLinear)]
    for sliced in {one.dtype: one for one in packed if isinstance(one, Sliced)}.values():
        sliced.dense(0)
        sliced.product(torch.zeros(2, sliced.inputs), 0)
    on_device = bool(mixtures) and ids.device.type != "cpu"
    with on_trial(model):
        if packed or on_device:
            model(input_ids=ids[:, :1])  # compiles layers with and without a router
        if on_device:
            model(input_ids=ids)


@contextmanager
def _all_threads() -> Iterator[None]:
    """Set the number of threads back at the end."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _quickest_threads(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Return the least number of threads with which a token takes at most a tenth more than the least time.

    More threads gain nothing where memory is the limit. Beside other work they cost time: at the end
    of each product all wait for the one that another program has displaced. So the number is
    measured now. It is halved until a token takes half as long again as with the best, or time is up.
    No recording counts these passes.
    """
    most = torch.get_num_threads()
    if ids.device.type != "cpu" or most == 1:
        return most
    seconds: dict[int, float] = {}
    begin = time.perf_counter()
    with _all_threads(), on_trial(model):
        count = most
        while count and time.perf_counter() - begin < _TRIED_SECONDS:
            torch.set_num_threads(count)
            seconds[count] = _token_seconds(model, ids[:, :1])
            if seconds[count] > 1.5 * min(seconds.values()):
                break
            count //= 2
    return min(n for n, one in seconds.items() if one <= 1.1 * min(seconds.values()))


def _token_seconds(model: PreTrainedModel, token: torch.Tensor) -> float:
    """Return the mean seconds of a forward pass of one token, after one that is not counted."""
    model(input_ids=token, use_cache=False)
    start, tried = time.perf_counter(), 0
    while tried < _TRIED and (not tried or time.perf_counter() - start < _TRIED_SECONDS / 4):
        model(input_ids=token, use_cache=False)
        tried += 1
    return (time.perf_counter() - start) / tried


@with_torch_defaults
def token_microseconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Return how long a model takes to write one token behind a prompt (1, tokens), in microseconds.

    It is the median of the tokens that `transformers` writes one by one, always the most likely, after
    a few that are not counted (kernels are compiled then). Texts of at most `_WRITTEN` tokens are
    written, fewer if the model's context is shorter. NaN if no token is counted.
    """
    longest = context_of(model)
    room = _WRITTEN if longest is None else min(_WRITTEN, longest - prompt.shape[1])
    if room < 1:
        return math.nan
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=room, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids, clock = prompt.to(input_device(model)), _Times()
    with torch.inference_mode(), default_settings(model):
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock
        )
    steps = np.diff(clock.times)[1 + _WARMING :]  # the first has read the prompt
    return 1e6 * float(np.median(steps)) if len(steps) else math.nan


@with_torch_defaults
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int = 64,
    threads: int | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Generate at most ``tokens`` tokens after the prompt, always the most likely one.

    Generation stops at an end of sequence. ``on_text`` is called with the text as it is generated. The
    model may be packed (see `load_model`). ``threads`` of the CPU compute the tokens after the first; by
    default as many as a short measurement finds quickest now, and never more than torch has. Another
    number may round otherwise, and so choose another of two tokens that are almost equally likely.

    Raises:
        ValueError: the prompt has no tokens, ``tokens`` is not positive, or both together exceed
            the model's context.
    """
    prompt.encode()  # raises ValueError on bytes from the shell that are not UTF-8
    # Tokens that the tokenizer puts after a text are left out: no model continues after an end.
    body = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([[*start_tokens(tokenizer, "auto"), *body]], dtype=torch.int64)
    ids = ids.to(input_device(model))
    longest = context_of(model)
    if not ids.numel():
        raise ValueError("the prompt has 0 tokens: give at least one")
    if tokens < 1:
        raise ValueError(f"expected at least 1 token to generate after the prompt, got {tokens}")
    if longest is not None and ids.shape[1] + tokens > longest:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {tokens} generated tokens exceed the model's "
            f"context of {longest} tokens: generate fewer, or give a shorter prompt"
        )
    end = model.generation_config.eos_token_id if model.generation_config else None
    end = tokenizer.eos_token_id if end is None else end
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    with torch.inference_mode(), default_settings(model), _all_threads():
        _compile(model, ids)
        if threads is None:
            threads = _quickest_threads(model, ids) if tokens > 1 else torch.get_num_threads()
        clock = _Clock(tokenizer, on_text, threads)
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
        threads=clock.threads,
    )

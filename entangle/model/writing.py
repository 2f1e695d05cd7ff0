"""Text that a model writes itself: sampled at temperature 1, window by window."""

import math
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entangle.model.causality import dependences
from entangle.model.documents import BLANK
from entangle.model.generating import default_settings
from entangle.model.limits import context_of
from entangle.model.packing import weight_bytes
from entangle.model.placing import check_in_memory, input_device
from entangle.model.progress import progress_bar
from entangle.model.text import OWN, Bos, TokenWindows, start_tokens
from entangle.numerics.torch_settings import with_torch_defaults

CACHE = (
    2**31
)  # bytes: the cache of the windows written at once may have these, or the weights' size


@with_torch_defaults
def write_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int = 128,
    length: int = 512,
    seed: int = 0,
    bos: Bos = "auto",
    progress: bool | None = None,
) -> torch.Tensor:
    """Sample windows (windows, length) from a model at temperature 1, by ``seed``.

    Each window is written by itself after the model's start token (see `document_start`). Where a
    document ends, the start token and a new document follow in the same window. A window begins as
    windows of a text do: with ``bos`` ``never``, and with ``auto`` if the tokenizer puts nothing
    before a text, the first start token is left out.

    A token is the first at which the cumulative probability exceeds a uniform random number. There
    is one such number for each window and place, so windows do not depend on one another, and not
    on how many are written at once except by rounding.

    Raises:
        ValueError: the model is in training mode, its blocks are in files, it is not causal, its
            context is shorter than a window, or its outputs are not finite; the tokenizer has no
            token to start with; or a number is out of range.
    """
    if windows < 1 or length < 2:
        raise ValueError(
            f"expected at least 1 window of at least 2 tokens, got {windows} windows of {length} "
            "tokens"
        )
    start, ends = document_start(tokenizer), document_ends(model, tokenizer)
    kept = len(start_tokens(tokenizer, bos))  # start tokens at the beginning of a window
    if length <= kept:
        raise ValueError(
            f"windows of {length} tokens leave no room for text after the {kept} tokens that this "
            "tokenizer begins a text with: use a larger length"
        )
    tokens = length - kept
    _check(model, len(start) + tokens)
    generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger one
    uniform = torch.rand(windows, tokens, generator=generator, dtype=torch.float64)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    device, found = input_device(model), []
    with (
        torch.inference_mode(),
        default_settings(model),
        progress_bar(total=windows * tokens, unit="token", desc="write", shown=progress) as bar,
    ):
        for numbers in uniform.split(_at_once(model, windows, length)):
            sampler = _Sampler(numbers.to(device), start, ends, bar)
            prompt = torch.tensor([start] * len(numbers), device=device)
            written = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
            )
            found.append(written[:, len(start) - kept :].cpu())
    return torch.cat(found)


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a document begins with.

    They are those that the tokenizer puts before a text; if it puts none, its beginning-of-sequence
    token; if it has none, its end-of-sequence token or its padding.

    Raises:
        ValueError: the tokenizer has none of these.
    """
    start = start_tokens(tokenizer, "auto")
    tokens: list[Any] = [
        *(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
    ]
    known = [token for token in tokens if token is not None]
    if not start and not known:
        raise ValueError(
            f"the model cannot write a text of its own ({OWN}): its tokenizer has no token that a "
            "text begins with, neither bos nor eos nor pad. Give another text"
        )
    return start or known[:1]


def document_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a document, of the tokenizer and of the model's own settings."""
    settings: Any = model.generation_config and model.generation_config.eos_token_id
    own = settings if isinstance(settings, list) else [settings]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def text_of(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str:
    """Return the text of a window without special tokens; a blank line separates documents."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(token)
        if token in ends:
            documents.append([])
    texts = (str(tokenizer.decode(one, skip_special_tokens=True)) for one in documents)
    return BLANK.join(text for text in texts if text)


class _Sampler(LogitsProcessor):
    """Leaves one token of each row possible: the sampled one, or one that a document starts with."""

    def __init__(
        self, uniform: torch.Tensor, start: list[int], ends: list[int], bar: "tqdm[Any]"
    ) -> None:
        self.uniform = uniform  # (windows, tokens)
        self.start = torch.tensor(start, device=uniform.device)
        # A token that both ends a document and starts the next stands once between them.
        shared = {*start[:1]} if len(start) == 1 else set()
        self.ends = torch.tensor(sorted({*ends} - shared), device=uniform.device)
        self.done = 0  # tokens
        # How many of the start tokens stand at the end of each row, all if the document goes on.
        self.begun = torch.full((len(uniform),), len(start), device=uniform.device)
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (windows, vocabulary) of which only one in each row is finite.

        Raises:
            ValueError: the model's outputs are not finite.
        """
        cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"the model cannot write a text of its own ({OWN}): its outputs are not finite. "
                "Load it in another number type (float32), or check its weights"
            )
        below = self.uniform[:, self.done, None] * total
        token = torch.searchsorted(cumulative, below, right=True)[:, 0]
        begins = self.begun < len(self.start)
        following = self.start[self.begun.clamp(max=len(self.start) - 1)]
        token = torch.where(begins, following, token)
        ended = torch.isin(token, self.ends) & ~begins
        self.begun = torch.where(ended, 0, (self.begun + begins))
        self.done += 1
        self.bar.update(len(token))
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _check(model: PreTrainedModel, length: int) -> None:
    """Check that a model can write so many tokens, start included, before the first is written.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if model.training:
        raise ValueError("the model is in training mode, which enables dropout: call model.eval()")
    # Each token would read all blocks.
    check_in_memory(model, f"writing a text of the model's own ({OWN})")
    context = context_of(model)
    if context is not None and length - 1 > context:  # nothing is written after the last token
        raise ValueError(
            f"the model cannot write {length} tokens, its start token included: its context is "
            f"{context}. Use a smaller length"
        )
    tokens = torch.arange(16).remainder(model.config.get_text_config(decoder=True).vocab_size)
    found = dependences(model, TokenWindows(tokens.view(2, 8), OWN, None, 0, "never"))
    if found:
        raise ValueError(
            f"the model cannot write a text of its own ({OWN}): its outputs at a token depend "
            f"{' and '.join(found)}. Give another text, or a causal language model"
        )


def _at_once(model: PreTrainedModel, windows: int, length: int) -> int:
    """Return how many windows to write at once, by the size of the cache of attention."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    window = 2 * config.num_hidden_layers * width * length * model.dtype.itemsize
    most: int = max(1, max(CACHE, weight_bytes(model)) // window)
    rounds = math.ceil(windows / most)
    return math.ceil(windows / rounds)

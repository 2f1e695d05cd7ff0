"""How much a model repeats itself where it goes on with a text, always with the most likely token."""

import dataclasses

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from entangle.model import ranks
from entangle.model.divergence import Floats, mean_over_windows
from entangle.model.generating import default_settings
from entangle.model.limits import context_of
from entangle.model.placing import input_device
from entangle.model.progress import progress_bar
from entangle.model.text import TokenWindows, check_evaluation, evenly_spaced
from entangle.numerics.torch_settings import with_torch_defaults

PROMPTS, PROMPT, TOKENS = 20, 64, 128
LONGEST = 4  # n-grams
NEAR = 32  # tokens before a token in which its repetition is looked for
NAMES = (*(f"distinct_{n}" for n in range(1, LONGEST + 1)), "repetition")


@dataclasses.dataclass(frozen=True, eq=False)
class Repetition:
    """How much a model repeated itself after each of several prompts.

    ``distinct_N`` is the share of the continuation's N-grams that are distinct (1 less it is seq-rep-N of
    arXiv 1908.04319). ``repetition`` is the share of its tokens that are among the 32 tokens before
    them, prompt included.
    """

    shares: dict[str, Floats]  # (prompts,), by name
    prompt_tokens: int
    tokens: int  # generated after each prompt

    def columns(self) -> dict[str, float]:
        """Return the means over prompts and their standard errors, NaN for one prompt."""
        found = {}
        for name, values in self.shares.items():
            found[name], found[f"{name}_error"] = mean_over_windows(values)
        return found


@with_torch_defaults
def repetition(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT,
    tokens: int = TOKENS,
    batch_size: int = 4,
    progress: bool | None = None,
) -> Repetition:
    """Generate ``tokens`` tokens after each of some prompts, and count what repeats.

    The prompts are the first ``prompt_tokens`` tokens of evenly spaced windows, or of all if there are
    fewer; windows that begin alike are one. An end of sequence does not stop the model, so that all continuations are equally long.
    Under torchrun each process generates its share of the batches, and all return the same.

    Raises:
        ValueError: as `check_prompts`.
    """
    check_prompts(model, windows, prompts=prompts, prompt_tokens=prompt_tokens, tokens=tokens)
    begins = [tuple(row) for row in windows.tokens[:, :prompt_tokens].tolist()]
    first = torch.tensor(sorted({row: n for n, row in reversed([*enumerate(begins)])}.values()))
    chosen = evenly_spaced(windows.chosen(first), prompts).tokens[:, :prompt_tokens]
    batches = torch.split(chosen, batch_size)
    found = torch.zeros(len(NAMES), len(chosen), dtype=torch.float64)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with (
        torch.inference_mode(),
        default_settings(model),
        progress_bar(total=len(chosen), unit="prompt", shown=progress) as bar,
    ):
        for number in ranks.shard().batches(len(batches)):
            batch = batches[number].to(input_device(model))
            written = model.generate(  # type: ignore[operator]
                batch, attention_mask=torch.ones_like(batch), generation_config=settings
            )
            for place, row in enumerate(written.tolist()):
                shares = repeated(row, prompt_tokens)
                found[:, number * batch_size + place] = torch.tensor(shares)
            bar.update(len(batch))
    ranks.all_reduce_sum_(found)
    return Repetition(dict(zip(NAMES, found.numpy(), strict=True)), prompt_tokens, tokens)


def check_prompts(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT,
    tokens: int = TOKENS,
) -> None:
    """Check that a model can go on after prompts from windows, as `repetition` has it.

    Raises:
        ValueError: the windows are shorter than a prompt or were written by a model; a number is too
            small; or the prompt and the tokens exceed the model's context.
    """
    check_evaluation(windows)
    if prompts < 1 or prompt_tokens < 1 or tokens < LONGEST:
        raise ValueError(
            f"expected at least 1 prompt of at least 1 token, and at least {LONGEST} tokens to generate, "
            f"got {prompts} prompts of {prompt_tokens} tokens and {tokens} tokens"
        )
    if windows.length < prompt_tokens:
        raise ValueError(
            f"prompts of {prompt_tokens} tokens cannot be cut from windows of {windows.length}: use a "
            "larger length"
        )
    context = context_of(model)
    if context is not None and prompt_tokens + tokens > context:
        raise ValueError(
            f"prompts of {prompt_tokens} tokens and {tokens} generated tokens exceed the context of "
            f"{model.name_or_path or type(model).__name__}, which is {context} tokens"
        )


def repeated(row: list[int], prompt_tokens: int) -> list[float]:
    """Return the shares of `Repetition` of one row of tokens: a prompt and its continuation."""
    new = row[prompt_tokens:]
    shares = []
    for n in range(1, LONGEST + 1):
        grams = list(zip(*(new[first:] for first in range(n)), strict=False))
        shares.append(len({*grams}) / len(grams))
    places = range(prompt_tokens, len(row))
    near = [row[place] in row[max(place - NEAR, 0) : place] for place in places]
    return [*shares, float(np.mean(near))]

"""The model ``entangle`` of lm-eval, EleutherAI's harness: its tasks on any model that we load.

``python -m entangle.lm_eval`` is lm-eval's own command line, which then knows this model:

    python -m entangle.lm_eval run --model entangle --model_args pretrained=FOLDER --tasks TASK
"""

import inspect
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from entangle.model.limits import context_of
from entangle.model.loading import load_model, load_tokenizer
from entangle.model.placing import input_device

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
except ModuleNotFoundError as missing:
    _ABSENT = (
        f"{missing}: entangle.lm_eval needs the extra 'lm-eval': pip install 'entangle[lm-eval]'"
    )
    if __name__ == "__main__":
        sys.exit(_ABSENT)
    raise ModuleNotFoundError(_ABSENT) from missing


@register_model("entangle")
class EntangleLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's ``hf`` on a model that `load_model` loads: plain, pruned, expanded or packed.

    Only the loading is ours. So a folder that both can load has the same scores with ``entangle``
    and with ``hf``. No padding reaches a score: lm-eval pads texts on the right and scores none of
    the padding, and our experts see one token at a time.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        offload: str | None = None,
        packed: bool = False,
        verify: bool = False,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **unknown: object,
    ) -> None:
        """Load a model and its tokenizer; the arguments are lm-eval's ``--model_args``.

        Those up to ``trust_remote_code`` are arguments of `load_model`, and the others are those of
        ``hf``. Texts longer than ``max_length`` tokens (by default the model's context) lose their
        beginning. ``batch_size`` is a number or, on a GPU, ``auto``.

        Raises:
            FileNotFoundError: the path does not exist, or the folder holds no model or no tokenizer.
            ValueError: an argument is unknown or has no meaning, the model cannot be loaded (see
                `load_model`), or several processes were started.
        """
        if unknown:
            known = [*inspect.signature(EntangleLM).parameters][:-1]
            raise ValueError(
                f"the model entangle has no argument {', '.join(unknown)}: expected some of "
                f"{', '.join(known)}"
            )
        texts = {"pretrained": pretrained, "revision": revision, "dtype": dtype, "device": device}
        texts |= {"device_map": device_map, "offload": offload}
        _check("text (digits in quotes)", lambda value: isinstance(value, str), texts)
        flags = {"packed": packed, "verify": verify, "add_bos_token": add_bos_token}
        flags |= {"trust_remote_code": trust_remote_code}
        _check("true or false", lambda value: isinstance(value, bool), flags)
        sizes = {"max_batch_size": max_batch_size, "max_length": max_length}
        _check("a whole number above 0", lambda value: type(value) is int and value > 0, sizes)
        token = {"prefix_token_id": prefix_token_id}
        _check("the number of a token", lambda value: type(value) is int and value >= 0, token)
        size = _batch_size(batch_size, device)
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise ValueError(
                f"the model entangle runs in one process, but WORLD_SIZE is {processes}: start it "
                "without torchrun and without accelerate launch"
            )
        model = load_model(
            pretrained,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            offload=offload,
            packed=packed,
            verify=verify,
            trust_remote_code=trust_remote_code,
        )
        longest = context_of(model)
        if max_length is not None and longest is not None and max_length > longest:
            raise ValueError(
                f"max_length is {max_length}, but {pretrained} has a context of {longest} tokens: "
                "give at most that"
            )
        tokenizer: Any = load_tokenizer(
            pretrained, revision=revision, trust_remote_code=trust_remote_code
        )
        if add_bos_token is not None:  # as hf, which loads the tokenizer with it
            tokenizer.add_bos_token = add_bos_token
        with _without_warnings():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                revision=revision or "main",
                batch_size=size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
            )
        self._device = input_device(model)  # an offloaded model has no device of its own
        if self.prefix_token_id is None:
            raise ValueError(
                f"the tokenizer of {pretrained} has neither a beginning nor an end of sequence, and "
                "a text without a context needs a token before it: give prefix_token_id"
            )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, of which lm-eval only asserts that they have a fitting length.

        Raises:
            ValueError: a continuation has no tokens, or more than ``max_length``.
        """
        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                text = textwrap.shorten(str(texts[-1]), 60, placeholder=" ...") if texts else ""
                raise ValueError(
                    f"the continuation {text!r} has {len(continuation)} tokens: it needs at least "
                    f"one, and at most max_length, which is {self.max_length}"
                )
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return found

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "EntangleLM":
        """Make the model from ``--model_args`` as text, see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "EntangleLM":
        """Make the model from ``--model_args`` and from flags such as ``--batch_size``.

        Of an argument in both, that of ``--model_args`` counts: lm-eval always gives flags for the
        size of a batch and for the device.

        Raises:
            ValueError: ``pretrained`` is missing, or as for the class.
        """
        flags = dict(additional_config or {})
        if flags.get("device") == "cuda:0":  # lm-eval's default, on a machine without a GPU too
            del flags["device"]
        both = {**flags, **arg_dict}
        given = {name: value for name, value in both.items() if value is not None}
        if "pretrained" not in given:
            raise ValueError(
                "the model entangle needs the argument pretrained: a folder, a .gguf file or a hub "
                "id, as in --model_args pretrained=FOLDER"
            )
        return cls(**given)


def _check(expected: str, fits: Callable[[object], bool], values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if value is not None and not fits(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")


def _batch_size(given: object, device: str) -> int | str:
    """Return the size of a batch, or ``auto``, ``auto:N`` if the model will be on a GPU.

    Raises:
        ValueError: it is neither, or ``auto`` on a CPU.
    """
    if re.fullmatch(r"auto(:\d+)?", str(given)):
        if device.startswith("cpu") or not torch.cuda.is_available():
            raise ValueError(
                f"batch_size {given} tries batches until a GPU's memory is full, and a CPU would use "
                "up the machine's: give a number"
            )
        return str(given)
    if not re.fullmatch(r"0*[1-9]\d*", str(given)):
        raise ValueError(f"batch_size must be a whole number of at least 1, or auto, got {given!r}")
    return int(str(given))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what ``hf`` logs about a loaded model: which of its own arguments have no effect."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main() -> int:
    """Run lm-eval's command line on ``sys.argv``; return the exit code: 0, or 2 for bad input.

    With LMEVAL_LOG_LEVEL=DEBUG an error also has its traceback.
    """
    try:
        cli_evaluate()
    except (ValueError, LookupError, OSError, AssertionError) as error:
        logging.getLogger("lm_eval").debug("the error is from here:", exc_info=True)
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.stderr.write(f"entangle.lm_eval: {message or type(error).__name__}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A model and its tokenizer from a hub id, a folder or a GGUF file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode from a hub id, a folder or a ``.gguf`` file.

    ``dtype`` is ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``; ``device`` is
    ``auto`` (CUDA if there is one) or as in torch. Nothing loaded runs code of its own unless
    ``trust_remote_code``.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without a model.
        ValueError: a model that cannot be loaded, with what transformers says of it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    source, options = _source(name, revision, trust_remote_code)
    with _explained(name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], **options
        )
    model.to(target)  # type: ignore[arg-type]  # a device is right; the stub is not
    model.eval()
    return model


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, from the same name.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without a model.
        ValueError: a tokenizer that cannot be loaded, with what transformers says of it.
    """
    source, options = _source(name, revision, trust_remote_code)
    with _explained(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    return tokenizer


def _source(
    name: str | Path, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Return what to give to ``from_pretrained``: the name or folder, and options."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {path}")
        return str(path.parent), options | {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"the folder {path} holds no model: it has no config.json")
        return str(path), options
    # A hub id is NAME or OWNER/NAME; anything else can only be meant as a path.
    if len(path.parts) > 2 or path.is_absolute() or str(name).startswith((".", "~")):
        raise FileNotFoundError(f"there is no model at {path}: expected a folder or a .gguf file")
    return str(name), options | ({"revision": revision} if revision else {})


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Say in one message why transformers could not load a model."""
    try:
        yield
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n\n")[0]
        raise ValueError(
            f"cannot load {name}: it is no folder here, and transformers says: {reason}"
            if not Path(name).exists()
            else f"cannot load {name}: transformers says: {reason}"
        ) from error


def weights_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 of all parameters' names, dtypes, shapes and bytes; tied ones once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

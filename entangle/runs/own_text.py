"""The text that a model writes itself (``self:``), kept beside run.json.

The tokens are the truth, in self.npy: the text that they make may have other tokens. A resumed
command, and `contexts`, read them again. self.txt is the text, to read it or to give it to another
model.
"""

import shutil
import time
import tokenize
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model import folders, ranks
from entangle.model.documents import BLANK
from entangle.model.hashing import kind_of, weights_hash
from entangle.model.text import OWN, Bos, TokenWindows, start_tokens
from entangle.model.writing import document_ends, text_of, write_windows
from entangle.runs import store

TOKENS, TEXT = "self.npy", "self.txt"
# What NumPy raises of a damaged file, whose header it parses as Python or as the archive of a zip.
_DAMAGED = (
    *(OSError, ValueError, EOFError, SyntaxError, AttributeError, TypeError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile),
)


def own_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int = 128,
    length: int = 512,
    seed: int = 0,
    bos: Bos = "auto",
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> TokenWindows:
    """Return windows that the model writes itself, at temperature 1 (see `write_windows`).

    If ``folder`` holds the run, finished or not, of a command that had this model write the same
    windows, they are read there. Their ``seconds`` are then 0. Under torchrun rank 0 writes.

    Raises:
        ValueError: the model cannot write them (see `write_windows`).
    """
    options: dict[str, Any] = {"windows": windows, "length": length, "seed": seed, "bos": bos}
    tokens: torch.Tensor | None = None
    seconds = 0.0
    if ranks.rank() == 0:
        with ranks.rank_zero_runs(options):
            tokens = None if folder is None else _kept(Path(folder), model, **options)
            if tokens is None:
                begin = time.perf_counter()
                tokens = write_windows(model, tokenizer, **options, progress=progress)
                seconds = time.perf_counter() - begin
    else:
        ranks.wait_for_rank_zero(options)
    tokens, seconds = ranks.from_rank(0, (tokens, seconds))
    assert tokens is not None
    ends = document_ends(model, tokenizer)
    return TokenWindows(
        tokens,
        OWN,
        None,
        seed,
        bos,
        len(start_tokens(tokenizer, bos)),
        decode=lambda row: text_of(row, tokenizer, ends),
        seconds=seconds,
    )


def _kept(
    folder: Path, model: PreTrainedModel, *, windows: int, length: int, seed: int, bos: Bos
) -> torch.Tensor | None:
    """Return the tokens that a command kept in a folder, if it is certain that they are the same."""
    found = _intact(folder)
    if found is None:  # none, or damaged: they are written anew
        return None
    about, tokens = found
    known = (about.get("length"), about.get("seed"), about.get("bos"))
    if known != (length, seed, bos) or tokens.shape != (windows, length):
        return None
    weights = str(about.get("weights"))
    return tokens if weights_hash(model, kind_of(weights)) == weights else None


def _intact(folder: Path) -> tuple[dict[str, Any], torch.Tensor] | None:
    """Return a folder's run.json and the tokens kept beside it, if they are those that it names."""
    try:
        about = store.read_json(folder / "run.json")
        array = np.load(folder / TOKENS, allow_pickle=False)
        tokens = torch.from_numpy(array.astype(np.int64))
    except _DAMAGED:
        return None
    drawn = about.get("texts", {about.get("text"): about}).get(OWN, {})
    found = TokenWindows(tokens, OWN, None, 0, "auto").fingerprint
    return (about, tokens) if drawn.get("fingerprint") == found else None


def keep(folder: Path, windows: TokenWindows | None) -> None:
    """Write what the model wrote itself among the windows, if anything, into a run's folder."""
    own = [one for one in (windows.by_text() if windows is not None else ()) if one.decode]
    for one in own:
        assert one.decode is not None
        rows = one.tokens.tolist()
        store.save_text(BLANK.join(map(one.decode, rows)) + "\n", folder / TEXT)
        with folders.new_file(folder / TOKENS) as partial:
            np.save(partial, one.tokens.numpy().astype(np.int32))


def copy(runs: Iterable[Path], folder: Path) -> None:
    """Copy what the model wrote itself from the first of some runs that has it undamaged, if any."""
    run = next((run for run in runs if _intact(run) is not None), None)
    for name in (TEXT, TOKENS):
        if run is not None and (run / name).is_file():
            with folders.new_file(folder / name) as partial:
                shutil.copyfile(run / name, partial)

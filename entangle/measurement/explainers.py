"""The ends of neurons' distributions, in the form that the automated explainer delphi reads.

The form is that of the cache of EleutherAI's delphi (eai-delphi 0.1.3, `LatentDataset`): a folder
for each module, with a file of tokens, of the places of activations in them, and of the
activations, and with a config.json. delphi explains latents that are zero on most tokens. A neuron
is not, so its two ends are two latents of two modules, LAYER.high and LAYER.low, with the neuron's
index: on the 5% of the tokens with the largest or smallest outputs the activation is the distance
to the quantile, and elsewhere zero.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from entangle.model.packing import save_tensors
from entangle.model.text import TokenWindows
from entangle.runs import store

SHARE = 0.05  # of the tokens, at either end
_EXAMPLE = 32  # tokens of delphi's examples, by default


def check_examples(folder: str | Path, windows: TokenWindows) -> None:
    """Check that examples of these windows can be written into a folder.

    Raises:
        FileExistsError: the folder has files, and delphi would read these too.
        ValueError: the windows cannot be cut into delphi's examples.
    """
    if windows.length % _EXAMPLE:
        raise ValueError(
            f"delphi cuts windows into examples of {_EXAMPLE} tokens, and the run's have {windows.length}: "
            f"measure with a length that is a multiple of {_EXAMPLE}"
        )
    if Path(folder).is_file() or (Path(folder).exists() and any(Path(folder).iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: name a new folder for delphi's files"
        )


@dataclasses.dataclass(eq=False)
class Examples:
    """The activations of neurons' ends, by module; `write` writes them into a folder."""

    windows: TokenWindows
    skip_first: int
    found: dict[str, list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]]] = (
        dataclasses.field(default_factory=dict)
    )  # by module: a neuron's index, and the rows and activations of tokens at its end

    def add(self, neuron: str, outputs: npt.NDArray[np.float32]) -> None:
        """Add a neuron, LAYER:INDEX or LAYER:input:INDEX, by its outputs (tokens,); NaN for no output."""
        layer, _, index = neuron.rpartition(":")
        for end, values in (("high", outputs), ("low", -outputs)):
            beyond = values - np.nanquantile(values, 1 - SHARE).astype(values.dtype)
            rows = np.flatnonzero(beyond > 0)
            if not len(rows):  # all of an end are equal
                continue
            part = int(index), rows, beyond[rows]
            self.found.setdefault(f"{layer.replace(':', '.')}.{end}", []).append(part)

    def write(self, folder: str | Path, model: str) -> None:
        """Write a folder for each module; ``model`` names the model, whose tokenizer delphi loads.

        Raises:
            OSError: a file cannot be written.
        """
        tokens, length = self.windows.tokens, self.windows.length
        about = {
            "model_name": model,
            "dataset_repo": self.windows.text,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": 1,
            "ctx_len": length,
            "cache_ctx_len": length,
            "n_tokens": tokens.numel(),
            "n_splits": 1,
        }
        for module, parts in self.found.items():
            first, last = (f([index for index, *_ in parts]) for f in (min, max))
            tensors = {
                "locations": torch.cat([*self._locations(module, first)]),
                "activations": torch.cat([torch.from_numpy(values) for *_, values in parts]),
                "tokens": tokens.int(),
            }
            save_tensors(Path(folder) / module / f"{first}_{last}.safetensors", tensors)
            store.write_json(Path(folder) / module / "config.json", about)

    def _locations(self, module: str, first: int) -> Iterator[torch.Tensor]:
        """Yield the window, position and index after ``first`` of each activation (activations, 3)."""
        counted = self.windows.length - self.skip_first
        for index, rows, _ in self.found[module]:
            places = (
                rows // counted,
                rows % counted + self.skip_first,
                np.full_like(rows, index - first),
            )
            yield torch.from_numpy(np.stack(places, axis=1)).int()

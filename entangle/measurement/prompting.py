"""A text of one's own: a neuron's value at each token, and its place in the neuron's distribution."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.measurement.rerunning import layers_of, neuron_outputs
from entangle.model.pieces import pieces_of
from entangle.model.text import TokenWindows, check_windows, start_tokens
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs.dataset import about, check_neuron, dataset_of
from entangle.runs.setup import Setup
from entangle.runs.shapes import distribution_of

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenValues:
    """A neuron's value at each token of a text."""

    neuron: str
    side: str  # output, or input
    tokens: list[str]
    values: npt.NDArray[np.float32]  # (tokens,)
    quantiles: Array  # (tokens,) share of the run's tokens below the value, from 0 to 1
    errors: Array  # (tokens,) bounds of the errors of the quantiles: see `Distribution.places`
    shades: Array  # (tokens,) from -1 to 1: the distance to the median, full for the farthest 1%

    @property
    def table(self) -> pd.DataFrame:
        """A row per token: token, output (or input), quantile and quantile_error."""
        return pd.DataFrame(
            {
                "token": self.tokens,
                self.side: self.values,
                "quantile": self.quantiles,
                "quantile_error": self.errors,
            }
        )

    def told(self) -> dict[str, Any]:
        """Return it as plain lists and text."""
        return {
            "neuron": self.neuron,
            "side": self.side,
            "tokens": self.tokens,
            "values": self.values.tolist(),
            "quantiles": self.quantiles.tolist(),
            "quantile_errors": self.errors.tolist(),
            "shades": self.shades.tolist(),
        }


@with_torch_defaults
def values_on(
    model: PreTrainedModel,
    text: str,
    *,
    run: xr.DataTree,
    neurons: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenValues]:
    """Return the values of ``neurons``, LAYER:INDEX, at each token of a text, in this order.

    The text begins with the tokens that the run's windows begin with. The places of the values are
    those in the run's finest histograms; a value beyond all outputs of the run has the place 0 or
    1. Tokens that the run left out (``skip_first``), or that a trained expert does not have, have
    no place.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: the run was measured on other weights or has no histograms, the text has no
            tokens or more than the model's context, or the model is in training mode.
    """
    neurons = [neurons] if isinstance(neurons, str) else list(dict.fromkeys(neurons))
    data = dataset_of(run)
    for name in neurons:
        check_neuron(data, name)
    if "histogram" not in run.children:
        raise ValueError(
            "this run has no histograms, only a dataset: read its folder with open_run"
        )
    distributions = {name: distribution_of(run, name) for name in neurons}
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens: give a longer text")
    bos: Any = about(run).get("bos", "auto")
    tokens = torch.tensor([[*start_tokens(tokenizer, bos), *ids]])
    check_windows(model, TokenWindows(tokens, "the given text", 1, 0, bos))
    setup = Setup.of(model, None, run=run, **layers_of(data, neurons))
    outputs = neuron_outputs(setup, neurons, [tokens])
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces = pieces_of(tokens[0].tolist(), decode)
    uncounted = slice(int(data.attrs.get("skip_first", 0)))  # tokens that the run left out
    found = []
    for name, values in zip(neurons, outputs.T, strict=True):
        distribution = distributions[name]
        places, errors = distribution.places(values)
        side = str(data["side"].sel(neuron=name).item())
        shades = distribution.scale.shades(values)
        for told in (places, errors, shades):
            told[uncounted] = np.nan
        found.append(TokenValues(name, side, pieces, values, places, errors, shades))
    return found

"""A hidden unit of a gated MLP: how often gate and up have which signs, and what they make of it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from entangle.model.gating import GatedLayers
from entangle.numerics.gaussian import from_samples

Floats = npt.NDArray[np.float32]

EXAMPLES = 4  # tokens of a case
_SIGNS = ("+", "-")  # a zero counts as +


@dataclasses.dataclass(frozen=True)
class Example:
    """A token in its text, and a hidden unit's values at it."""

    window: int  # index
    position: int  # in the window
    before: str
    token: str
    after: str
    gate: float  # output of the gate's neuron, before the activation
    up: float  # output of the other neuron
    product: float  # act(gate) · up


@dataclasses.dataclass(frozen=True)
class SignCase:
    """The tokens at which gate and up have certain signs."""

    gate: str  # + or -; a zero counts as +
    up: str
    tokens: int
    share: float  # of all tokens, from 0 to 1
    mean: float  # product; NaN without tokens
    examples: list[Example]  # with the largest products, by size


@dataclasses.dataclass(frozen=True)
class HiddenUnit:
    """A hidden unit of a gated MLP: two neurons, and the input channel that is their product."""

    gate: str  # the neuron whose output goes through the activation
    up: str  # the neuron by whose output it is multiplied
    product: str  # the input channel
    wasserstein: dict[
        str, float
    ]  # of gate, up and product: exact, computed from the outputs, in std
    cases: list[SignCase]  # ++, +-, -+, --


def units_of(gated: list[GatedLayers]) -> Callable[[str], dict[str, str]]:
    """Return a function of a neuron's name: the names of its hidden unit's parts, or nothing."""
    layers = {
        part: {"gate": one.gate.name, "up": one.up.name, "product": one.products.name}
        for one in gated
        for part in (one.gate.name, one.up.name, one.products.name)
    }

    def parts(neuron: str) -> dict[str, str]:
        layer, _, index = neuron.rpartition(":")
        return {part: f"{name}:{index}" for part, name in layers.get(layer, {}).items()}

    return parts


def hidden_unit(
    names: Mapping[str, str],
    values: Mapping[str, Floats],
    text_of: Callable[[int], Mapping[str, int | str]],
) -> HiddenUnit:
    """Return the four sign cases of a hidden unit.

    ``values`` are those of gate, up and product (tokens,), and ``names`` their names. ``text_of``
    returns the window, position, before, token and after of a token.
    """
    gate, up, product = (values[part] for part in ("gate", "up", "product"))
    cases = []
    for one, other in itertools.product(_SIGNS, repeat=2):
        rows = np.flatnonzero(((gate >= 0) == (one == "+")) & ((up >= 0) == (other == "+")))
        largest = rows[np.argsort(-np.abs(product[rows]), kind="stable")[:EXAMPLES]]
        examples = [
            Example(
                **text_of(int(row)),  # type: ignore[arg-type]
                gate=float(gate[row]),
                up=float(up[row]),
                product=float(product[row]),
            )
            for row in largest
        ]
        mean = float(product[rows].mean(dtype=np.float64)) if len(rows) else math.nan
        cases.append(SignCase(one, other, len(rows), len(rows) / len(gate), mean, examples))
    distances = {part: float(from_samples(one[:, None])[0]) for part, one in values.items()}
    return HiddenUnit(**names, wasserstein=distances, cases=cases)

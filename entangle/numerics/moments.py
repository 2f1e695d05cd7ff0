"""The moments of a layer's inputs: all that pruning wants to know of the data, and no weights.

One Gram serves every method, sparsity and subset of rows, and its inverse factor every neuron.
A leading dimension, where there is one, is that of experts: each has inputs of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch

_PANEL = 256  # columns of a Gram that are summed together
_LADDER = (0.01, 0.1, 1.0)  # damping, times the Gram's mean diagonal: as published, and then more


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """The Gram of a layer's inputs, XᵀX over tokens, and their number."""

    lower: torch.Tensor  # ([experts,] inputs, inputs) float32; what is above the diagonal is void
    count: torch.Tensor  # ([experts]) int64: tokens

    @classmethod
    def zeros(cls, inputs: int, *, device: torch.device | str = "cpu") -> Self:
        """Return the moments of no tokens."""
        lower = torch.zeros(inputs, inputs, device=device)
        return cls(lower, torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def stack(cls, experts: Sequence[Self]) -> Self:
        """Return the moments of several experts as one."""
        lower = torch.stack([moments.lower for moments in experts])
        return cls(lower, torch.stack([moments.count for moments in experts]))

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return self.lower.shape[-1]

    @property
    def gram(self) -> torch.Tensor:
        """The whole Gram ([experts,] inputs, inputs)."""
        return self.lower.tril() + self.lower.tril(-1).mT

    @property
    def squares(self) -> torch.Tensor:
        """Each input's sum of squares ([experts,] inputs), the Gram's diagonal."""
        return self.lower.diagonal(dim1=-2, dim2=-1)

    def add(self, rows: torch.Tensor) -> None:
        """Add input rows (tokens, inputs) of any floating dtype to the moments of one expert."""
        rows = rows.detach().float()
        for first in range(0, self.inputs, _PANEL):  # half of a symmetric product is enough
            end = min(first + _PANEL, self.inputs)
            self.lower[first:end, :end].addmm_(rows[:, first:end].T, rows[:, :end])
        self.count.add_(len(rows))

    def merged(self, other: Self) -> Self:
        """Return the moments of both sets of rows together."""
        return type(self)(self.lower + other.lower, self.count + other.count)


def output_energy(weight: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """Return each neuron's ‖wX‖² over the tokens of the moments ([experts,] neurons), in float64.

    Of a difference of weights it is what pruning lost. Float64, since a good pruning leaves a
    difference that is all but orthogonal to the inputs, and most of the sum cancels.
    """
    weight = weight.double()
    return ((weight @ moments.gram.double()) * weight).sum(dim=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class InverseFactor:
    """The upper U with UᵀU = H⁻¹, H a damped Gram, held as R = U⁻¹ with RRᵀ = H."""

    root: torch.Tensor  # R (inputs, inputs) float32
    dead: torch.Tensor  # (inputs) bool: the input is always zero, and U_jj is said to be infinite
    damping: float  # times the Gram's mean diagonal; 0.01 unless that Gram was singular

    @property
    def upper(self) -> torch.Tensor:
        """The whole of U (inputs, inputs)."""
        return self.square(0, len(self.root))

    def square(self, first: int, end: int) -> torch.Tensor:
        """Return U[first:end, first:end], which R's own square there determines."""
        square = self.root[first:end, first:end]
        identity = torch.eye(end - first, device=square.device)
        inverse: torch.Tensor = torch.linalg.solve_triangular(square, identity, upper=True)
        # Such an input goes first and changes no other: w / U_jj is 0.
        inverse.diagonal()[self.dead[first:end]] = torch.inf
        return inverse


def inverse_factor(gram: torch.Tensor) -> InverseFactor:
    """Return the inverse factor of a Gram (inputs, inputs), damped no more than it needs.

    Only the lower triangle is read. With the order of the inputs reversed, H = LLᵀ turns into
    H = RRᵀ with R upper: one Cholesky, and nothing is inverted.

    Raises:
        ValueError: no damping of the ladder (0.01, 0.1, 1) makes the Gram regular.
    """
    mean = float(gram.diagonal().double().mean())
    if mean > 0:
        for dtype, damping in [(torch.float32, _LADDER[0]), *((torch.float64, d) for d in _LADDER)]:
            damped = gram.flip(0, 1).to(dtype)  # of which Cholesky reads the upper triangle
            damped.diagonal().add_(damping * mean)
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            root = upper.mT.flip(0, 1).float()
            if not int(failed) and bool(root.sum().isfinite()):
                return InverseFactor(root, gram.diagonal() == 0, damping)
    raise ValueError(
        f"the Gram of {len(gram)} inputs is singular, damped by up to {_LADDER[-1]:g} times its mean "
        f"diagonal ({mean:.3g}): did any token reach this layer?"
    )

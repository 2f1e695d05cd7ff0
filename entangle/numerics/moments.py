"""Second moments of a layer's inputs: the Gram XᵀX, which is SparseGPT's Hessian.

The moments do not depend on the weights. One Gram serves every method, sparsity and subset of rows,
and its inverse factor serves every neuron. With several experts the first dimension is the expert,
and each expert has the moments of its own inputs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Self

import torch

_PANEL = 256  # rows of a Gram that are computed together
_BUFFERED = 4096  # rows that `ExpertMoments` buffers
_DAMPING = (0.01, 0.1, 1.0)  # damping, times the Gram's mean diagonal; first as published


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """The Gram XᵀX of a layer's inputs X (tokens, inputs), and the number of tokens."""

    lower: (
        torch.Tensor
    )  # ([experts,] inputs, inputs) float32; entries above the diagonal are unused
    count: torch.Tensor  # ([experts]) int64: number of tokens

    @classmethod
    def zeros(
        cls, inputs: int, *, experts: int | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Return the moments of no tokens."""
        shape = () if experts is None else (experts,)
        with torch.inference_mode(False):  # they are changed outside this mode too
            lower = torch.zeros(*shape, inputs, inputs, device=device)
            return cls(lower, torch.zeros(shape, dtype=torch.int64, device=device))

    @classmethod
    def stack(cls, experts: Sequence[Self]) -> Self:
        """Return the moments of several experts as one."""
        lower = torch.stack([moments.lower for moments in experts])
        return cls(lower, torch.stack([moments.count for moments in experts]))

    @property
    def inputs(self) -> int:
        """Return the number of inputs."""
        return self.lower.shape[-1]

    @property
    def gram(self) -> torch.Tensor:
        """Return the whole Gram ([experts,] inputs, inputs)."""
        return self.lower.tril() + self.lower.tril(-1).mT

    @property
    def squares(self) -> torch.Tensor:
        """Return each input's sum of squares ([experts,] inputs), the Gram's diagonal."""
        return self.lower.diagonal(dim1=-2, dim2=-1)

    def add(self, rows: torch.Tensor) -> None:
        """Add input rows (tokens, inputs) of any floating dtype to the moments of one expert."""
        rows = rows.detach().float()
        for first in range(0, self.inputs, _PANEL):  # symmetric: compute the lower half only
            end = min(first + _PANEL, self.inputs)
            self.lower[first:end, :end].addmm_(rows[:, first:end].T, rows[:, :end])
        self.count.add_(len(rows))

    def expert(self, index: int) -> Self:
        """Return the moments of one expert, as a view: adding to it adds to these moments."""
        return type(self)(self.lower[index], self.count[index])

    def of_experts(self, experts: Sequence[int]) -> Self:
        """Return a copy of the moments of some experts."""
        return type(self)(self.lower[list(experts)], self.count[list(experts)])

    def merged(self, other: Self) -> Self:
        """Return the moments of the rows of both."""
        return type(self)(self.lower + other.lower, self.count + other.count)

    def pooled(self) -> Self:
        """Return the pooled moments: those of the rows of all experts."""
        return type(self)(self.lower.sum(dim=0), self.count.sum())

    def shrunk(self, shrinkage: float, pooled: Self | None = None) -> Self:
        """Return each expert's moments, shrunk towards the pooled moments.

        ``pooled`` is given if these are only some of the experts.

        Each expert gains ``shrinkage · inputs`` average tokens of the pooled moments. A cluster has
        too few tokens for a Gram of its width, and the other clusters supply the directions that it
        lacks. An expert without tokens gains at least one average token, whatever the shrinkage.
        """
        pooled, tokens = pooled or self.pooled(), shrinkage * self.inputs
        joined = torch.full_like(self.count, tokens, dtype=torch.float64)
        joined[self.count == 0] = max(tokens, 1.0)
        shares = (joined / float(pooled.count)).float()[:, None, None]
        lower = self.lower + pooled.lower * shares
        return type(self)(lower, self.count + round(tokens))


class ExpertMoments:
    """Moments of several experts, accumulated from rows of their inputs.

    Rows are buffered, since each addition costs a pass over an expert's whole Gram, and one batch
    has only a few rows for an expert.
    """

    def __init__(
        self, moments: InputMoments, router: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Take empty moments, and a router that returns the expert of each row (tokens, inputs)."""
        self._moments = moments
        self._assign = router
        self._buffer: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Add input rows (tokens, inputs) of any floating dtype to the moments of their experts."""
        self._buffer.append(rows.detach().to(torch.float32, copy=True))
        if sum(map(len, self._buffer)) >= _BUFFERED:
            self._flush()

    def moments(self) -> InputMoments:
        """Return the moments of all rows so far."""
        self._flush()
        return self._moments

    def _flush(self) -> None:
        if not self._buffer:
            return
        rows = torch.cat(self._buffer)
        self._buffer.clear()
        chosen = self._assign(rows)
        # Sorted, so that a GPU waits for the host once and not for each expert.
        counts = chosen.bincount(minlength=len(self._moments.count)).tolist()
        of_experts = rows[chosen.argsort(stable=True)].split(counts)
        for index, own in enumerate(of_experts):
            self._moments.expert(index).add(own)


def output_energy(weight: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """Return each neuron's ‖wX‖² over the tokens of the moments ([experts,] neurons), in float64.

    For the difference of dense and pruned weights this is the error of pruning. The computation is
    in float64: after good pruning the difference is nearly orthogonal to the inputs, so most of the
    sum cancels.
    """
    weight = weight.double()
    energy = weight.new_zeros(())
    for first in range(0, moments.inputs, _PANEL):  # symmetric: read the lower half only
        end = min(first + _PANEL, moments.inputs)
        panel = 2 * moments.lower[..., first:end, :end].double().tril(first)
        panel.diagonal(first, dim1=-2, dim2=-1).div_(2)
        energy = energy + ((weight[..., :end] @ panel.mT) * weight[..., first:end]).sum(dim=-1)
    return energy


@dataclasses.dataclass(frozen=True, eq=False)
class InverseFactor:
    """The upper U with UᵀU = H⁻¹, where H is a damped Gram; stored as R = U⁻¹ with RRᵀ = H."""

    root: torch.Tensor  # R (inputs, inputs) float32
    dead: torch.Tensor  # (inputs) bool: the input is always zero; U_jj is then set to infinity
    damping: float  # times the Gram's mean diagonal; 0.01 unless that Gram was singular

    @property
    def upper(self) -> torch.Tensor:
        """Return the whole U (inputs, inputs)."""
        return self.squares([(0, len(self.root))])[0]

    def squares(self, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Return U[first:end, first:end] of spans that follow each other: the inverse of R's square.

        Spans of the same size are inverted together, since a GPU takes as long for one.
        """
        found: list[torch.Tensor] = []
        down, right = self.root.stride()
        for size, spans_of_size in itertools.groupby(spans, lambda span: span[1] - span[0]):
            own = list(spans_of_size)
            strides = (size * (down + right), down, right)  # along the diagonal, without a copy
            start = self.root.storage_offset() + own[0][0] * (down + right)
            roots = self.root.as_strided((len(own), size, size), strides, start)
            identity = torch.eye(size, device=roots.device).expand_as(roots)
            inverse: torch.Tensor = torch.linalg.solve_triangular(roots, identity, upper=True)
            # The score w / U_jj of a dead input is 0, so it is pruned first and changes no other.
            dead = torch.stack([self.dead[first:end] for first, end in own])
            inverse.diagonal(dim1=1, dim2=2).masked_fill_(dead, torch.inf)
            found += inverse
        return found


def inverse_factor(gram: torch.Tensor) -> InverseFactor:
    """Return the inverse factor of a Gram (inputs, inputs), with the least damping that suffices.

    Only the lower triangle is read. The order of the inputs is reversed, so that a Cholesky
    decomposition gives H = RRᵀ with R upper; no matrix is inverted.

    Raises:
        ValueError: the Gram stays singular with each damping (0.01, 0.1 and 1).
    """
    mean = float(gram.diagonal().double().mean())
    if mean > 0:
        for dtype, damping in [
            (torch.float32, _DAMPING[0]),
            *((torch.float64, d) for d in _DAMPING),
        ]:
            damped = gram.flip(0, 1).to(dtype)  # Cholesky reads its upper triangle
            damped.diagonal().add_(damping * mean)
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            del damped
            root = upper.mT.flip(0, 1).float()
            del upper
            if not int(failed) and bool(root.sum().isfinite()):
                return InverseFactor(root, gram.diagonal() == 0, damping)
    raise ValueError(
        f"the Gram of {len(gram)} inputs is singular, even with a damping of {_DAMPING[-1]:g} "
        f"times its mean diagonal ({mean:.3g}): leave the layer out with exclude"
    )

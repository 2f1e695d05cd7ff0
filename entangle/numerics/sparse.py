"""Sparse matrices as slices of eight rows side by side, and their products with tokens.

Decoding is bound by memory, and a sparse matrix has fewer bytes to read. Rows are sorted by their
number of nonzeros and cut into slices of eight. A slice stores the first nonzeros of its eight rows
side by side, then the second ones, and so on, so that eight sums run in parallel.

Source: SELL-C-sigma, Kreutzer et al., "A unified sparse matrix data format for efficient general
sparse matrix-vector multiplication on modern processors with wide SIMD units", arXiv 1307.6209,
with C = 8 and sigma = all rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics import threads
from entangle.numerics.kernels.sparse_cpu import (
    ROWS,
    WIDE,
    WIDTH,
    fill_dense,
    fill_slices,
    multiply_alone,
    multiply_tiles,
    multiply_tiles_together,
    multiply_together,
)

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
_NONE = np.empty((1, 0), np.float32)  # no router
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Sliced:
    """Matrices (experts, neurons, inputs) in slices; shorter rows of a slice are padded."""

    values: Array  # (entries,) float32, or the bits of bfloat16 as uint16
    columns: Array  # (entries,) uint16, or uint32 if there are more than 65,536 inputs
    starts: Array  # (experts, slices + 1) int64: where a slice starts, in units of eight entries
    order: Array  # (experts, slices * 8) int64: the row at each place; ``neurons``: padding
    neurons: int
    inputs: int
    packed: torch.dtype  # of the weight that was packed: float16 is stored as float32

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return sum(x.nbytes for x in (self.values, self.columns, self.starts, self.order))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the values."""
        return torch.bfloat16 if self.values.dtype == np.uint16 else torch.float32

    def is_faster(self, tokens: int, expert: int) -> bool:
        """Return whether `product` is faster than unpacking an expert and a dense product.

        Times were measured by ``benchmarks/decode.py``. Their unit is the time that a dense float32
        product takes for sixteen more tokens. `product` takes 1.2 · density once, and
        0.2 + 1.8 · density for every sixteen tokens. Unpacking and a dense product take 5 once and
        1 for every sixteen tokens in float32, and 2.8 and 0.17 in bfloat16.
        """
        if tokens == 1:
            return True
        tiles, density = -(-tokens // WIDTH), self.density(expert)
        once, each = (5, 1) if self.dtype == torch.float32 else (2.8, 0.17)
        return 1.2 * density + tiles * (0.2 + 1.8 * density - each) < once

    def density(self, expert: int) -> float:
        """Return the share of an expert's weights that is stored, padding included."""
        entries = (self.starts[expert, -1] - self.starts[expert, 0]) * ROWS
        return float(entries / (self.neurons * self.inputs))

    def one(
        self,
        inputs: torch.Tensor,
        expert: int | None,
        matrix: Array = _NONE,
        bias: Array = _NONE[0],
    ) -> tuple[torch.Tensor, int]:
        """Return `product` (..., neurons) for inputs (..., inputs) of one token, and the expert.

        If the expert is None, the router's matrix (inputs, experts) and bias (experts,) choose it.
        The same kernel call does both: decoding is bound by memory, which idles between kernels.

        Raises:
            ValueError: the inputs, the expert or the router do not fit these matrices.
        """
        experts = len(self.starts)
        self._check(inputs.numel(), [] if expert is None else [expert])
        fits = (matrix.shape, len(bias)) == ((self.inputs, experts), experts)
        if expert is None and not fits:
            found = f"a matrix {matrix.shape} and {len(bias)} biases" if matrix.size else "neither"
            raise ValueError(
                f"expected an expert, or a router with a matrix {(self.inputs, experts)} and "
                f"{experts} biases, got {found}"
            )
        outputs = torch.empty(*inputs.shape[:-1], self.neurons)
        row, out = inputs.detach().float().numpy().ravel(), outputs.numpy().ravel()
        weight = self.values, self.columns, self.starts, self.order
        router = -1 if expert is None else expert, matrix, bias
        if torch.get_num_threads() == 1:  # starting threads costs as much as a small product
            return outputs, int(multiply_alone(*weight, *router, row, out))
        with threads.TorchThreads() as count:
            return outputs, int(multiply_together(count, *weight, *router, row, out))

    def _check(self, inputs: int, experts: Sequence[int]) -> None:
        """Check the number of inputs and the experts: otherwise kernels would read out of bounds.

        Raises:
            ValueError: there are not as many inputs as in these matrices, or no such expert.
        """
        if inputs != self.inputs:
            raise ValueError(f"expected {self.inputs} inputs, got {inputs}")
        for expert in experts:
            if not 0 <= expert < len(self.starts):
                raise ValueError(
                    f"expected an expert from 0 to {len(self.starts) - 1}, got {expert}"
                )

    def product(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Return ``rows @ weight.T`` (tokens, neurons) float32 for rows (tokens, inputs).

        Sums are always float32, and there is no gradient.

        Raises:
            ValueError: the expert does not exist, or the rows have another width.
        """
        if len(rows) == 1:
            return self.one(rows, expert)[0]
        return self.products(rows, torch.arange(len(rows)), [(expert, 0, len(rows))])

    def products(
        self, rows: torch.Tensor, order: torch.Tensor, spans: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Return products (tokens, neurons) float32 of rows (tokens, inputs) with several experts.

        A span (expert, first, last) gives the rows ``order[first:last]`` to an expert. Rows in no
        span have undefined products, which the caller must fill in.

        Raises:
            ValueError: the expert does not exist, or the rows have another width.
        """
        self._check(rows.shape[1], [expert for expert, *_ in spans])
        tiles = np.array(
            [
                (expert, at, min(at + WIDE, last))
                for expert, first, last in spans
                for at in range(first, last, WIDE)
            ],
            np.int64,
        ).reshape(-1, 3)
        out = torch.empty(len(rows), self.neurons)
        weight = self.values, self.columns, self.starts, self.order
        tokens = rows.detach().float().contiguous().numpy(), order.numpy()
        if torch.get_num_threads() == 1:
            multiply_tiles(0, len(tiles), 1, tiles, *weight, *tokens, out.numpy())
        elif len(tiles):
            # Split each tile into parts, so that there is work for all threads.
            with threads.TorchThreads() as count:
                parts = -(-2 * count // len(tiles))
                multiply_tiles_together(parts, tiles, *weight, *tokens, out.numpy())
        return out

    def dense(self, expert: int) -> torch.Tensor:
        """Return an expert's weight (neurons, inputs) with its zeros."""
        weight = torch.empty(self.neurons, self.inputs, dtype=self.dtype)
        bits = weight.view(torch.uint16) if self.dtype == torch.bfloat16 else weight
        starts, order = self.starts[expert], self.order[expert]
        with threads.TorchThreads() as count:
            fill_dense(count, self.values, self.columns, starts, order, bits.numpy())
        return weight


def slice_rows(weight: torch.Tensor) -> Sliced:
    """Return the nonzeros of matrices (experts, neurons, inputs) in slices.

    float16 becomes float32.

    Raises:
        ValueError: the dtype is not float32, bfloat16 or float16.
    """
    if weight.dtype not in PACKABLE:
        raise ValueError(f"only float32, bfloat16 and float16 can be packed, got {weight.dtype}")
    weight = weight.detach().cpu().contiguous()
    dense = as_array(weight)
    experts, neurons, inputs = dense.shape
    counts = (weight != 0).sum(2).numpy()  # (experts, neurons)
    slices = -(-neurons // ROWS)
    order = np.full((experts, slices * ROWS), neurons)
    order[:, :neurons] = np.argsort(-counts, axis=1, kind="stable")
    # The first row of a slice is its longest.
    lengths = np.take_along_axis(counts, order[:, ::ROWS], axis=1)
    ends = lengths.cumsum().reshape(lengths.shape)
    starts = np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1)
    entries = int(ends[-1, -1]) * ROWS
    values = np.zeros(entries, dense.dtype)
    columns = np.zeros(entries, np.uint16 if inputs <= 1 << 16 else np.uint32)
    for expert in range(experts):
        fill_slices(dense[expert], starts[expert], order[expert], values, columns)
    return Sliced(values, columns, starts, order, neurons, inputs, weight.dtype)


def as_array(values: torch.Tensor) -> Array:
    """Return numbers of the CPU as float32, or as the bits of bfloat16."""
    bfloat16 = values.dtype == torch.bfloat16
    return values.view(torch.uint16).numpy() if bfloat16 else values.float().numpy()

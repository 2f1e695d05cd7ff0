"""Sparse matrices as slices of eight rows side by side, and their products with tokens.

Decoding is bound by memory: a matrix that is mostly zeros has fewer bytes to read. Rows are sorted
by their number of nonzeros and cut into slices of eight; of a slice the first nonzeros of all
eight rows lie side by side, then the second ones, and so on, so that eight sums run in parallel.

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
    """Matrices (experts, neurons, inputs) in slices; padded where a slice's rows differ in length."""

    values: Array  # (entries,) float32, or the bits of bfloat16 as uint16
    columns: Array  # (entries,) uint16, or uint32 where there are more inputs than that
    starts: Array  # (experts, slices + 1) int64: of each slice, in steps of eight entries
    order: Array  # (experts, slices * 8) int64: the row that lies there; past the last: none
    neurons: int
    inputs: int

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        return sum(x.nbytes for x in (self.values, self.columns, self.starts, self.order))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return torch.bfloat16 if self.values.dtype == np.uint16 else torch.float32

    def is_faster(self, tokens: int, expert: int) -> bool:
        """Tell whether `product` beats unpacking an expert and a dense product.

        Measured (``benchmarks/decode.py``) in units of a dense float32 product with sixteen more
        tokens: `product` takes 1.2 times the density and, for every sixteen tokens, 0.2 + 1.8 times
        the density; to unpack and multiply takes 5 and 1 for every sixteen in float32, 2.8 and 0.17
        in bfloat16.
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

        None is the nearest by a router's matrix (inputs, experts) and bias (experts,), found in the
        same call: outside of the kernels memory waits.

        Raises:
            ValueError: inputs, an expert or a router that are not of these matrices.
        """
        experts = len(self.starts)
        routed = expert is None and (matrix.shape, len(bias)) == ((self.inputs, experts), experts)
        known = expert is not None and 0 <= expert < experts
        if not (routed or known) or inputs.numel() != self.inputs:  # kernels would read beyond
            raise ValueError(
                f"expected {self.inputs} inputs and one of {experts} experts, got "
                f"{inputs.numel()} and {expert}, a router of {' x '.join(map(str, matrix.shape))}"
            )
        found = torch.empty(*inputs.shape[:-1], self.neurons)
        row, out = inputs.detach().float().numpy().ravel(), found.numpy().ravel()
        weight = self.values, self.columns, self.starts, self.order
        router = -1 if expert is None else expert, matrix, bias
        if torch.get_num_threads() == 1:  # to start threads costs as much as a small product
            return found, int(multiply_alone(*weight, *router, row, out))
        return found, int(multiply_together(threads.like_torch(), *weight, *router, row, out))

    def product(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Return ``rows @ weight.T`` (tokens, neurons) float32 for rows (tokens, inputs).

        Sums are float32 in any case, and no gradient goes back through them.

        Raises:
            ValueError: an expert that is none of these matrices', or rows of another width.
        """
        if len(rows) == 1:
            return self.one(rows, expert)[0]
        return self.products(rows, torch.arange(len(rows)), [(expert, 0, len(rows))])

    def products(
        self, rows: torch.Tensor, order: torch.Tensor, spans: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Return products (tokens, neurons) float32 of rows (tokens, inputs) with several experts.

        A span (expert, first, last) says whose are the rows ``order[first:last]``; the products of
        rows in no span are left to the caller to fill in.

        Raises:
            ValueError: an expert that is none of these matrices', or rows of another width.
        """
        experts = len(self.starts)
        wrong = next((expert for expert, *_ in spans if not 0 <= expert < experts), None)
        if wrong is not None or rows.shape[1] != self.inputs:  # kernels would read beyond
            raise ValueError(
                f"expected {self.inputs} inputs and one of {experts} experts, got "
                f"{rows.shape[1]} and {wrong}"
            )
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
            parts = -(-2 * threads.like_torch() // len(tiles))  # of a tile, where there are few
            multiply_tiles_together(parts, tiles, *weight, *tokens, out.numpy())
        return out

    def dense(self, expert: int) -> torch.Tensor:
        """Return an expert's weight (neurons, inputs) with its zeros."""
        weight = torch.empty(self.neurons, self.inputs, dtype=self.dtype)
        bits = weight.view(torch.uint16) if self.dtype == torch.bfloat16 else weight
        starts, order = self.starts[expert], self.order[expert]
        fill_dense(threads.like_torch(), self.values, self.columns, starts, order, bits.numpy())
        return weight


def slice_rows(weight: torch.Tensor) -> Sliced:
    """Return matrices (experts, neurons, inputs) in slices, all but zeros.

    Raises:
        ValueError: another dtype than float32, bfloat16 or float16, which becomes float32.
    """
    if weight.dtype not in PACKABLE:
        raise ValueError(f"only float32, bfloat16 and float16 can be packed, got {weight.dtype}")
    weight = weight.detach().cpu().contiguous()
    bfloat16 = weight.dtype == torch.bfloat16
    dense = weight.view(torch.uint16).numpy() if bfloat16 else weight.float().numpy()
    experts, neurons, inputs = dense.shape
    counts = (weight != 0).sum(2).numpy()  # (experts, neurons)
    slices = -(-neurons // ROWS)
    order = np.full((experts, slices * ROWS), neurons)
    order[:, :neurons] = np.argsort(-counts, axis=1, kind="stable")
    lengths = np.take_along_axis(counts, order[:, ::ROWS], axis=1)  # a slice's first is its longest
    ends = lengths.cumsum().reshape(lengths.shape)
    starts = np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1)
    entries = int(ends[-1, -1]) * ROWS
    values = np.zeros(entries, dense.dtype)
    columns = np.zeros(entries, np.uint16 if inputs <= 1 << 16 else np.uint32)
    for expert in range(experts):
        fill_slices(dense[expert], starts[expert], order[expert], values, columns)
    return Sliced(values, columns, starts, order, neurons, inputs)

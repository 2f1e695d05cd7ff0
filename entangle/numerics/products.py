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

import numba
import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics.lanes import as_float, lanes_add, lanes_store, lanes_zero, prefetch

ROWS = 8  # of a slice
WIDTH, WIDE = 16, 32  # tokens of a tile: what eight sums fill, and what two for each row do
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
_NEAR = 64  # inputs, or neurons: of these a tile changes its form in the nearest cache
_AHEAD = np.uint64(512)  # entries: far enough to hide memory's latency, near enough to stay cached

_NONE = np.empty((1, 0), np.float32)  # no router
_MOST = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

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
            return found, int(_multiply_alone(*weight, *router, row, out))
        return found, int(_multiply_together(_threads(), *weight, *router, row, out))

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
            _multiply_tiles(0, len(tiles), 1, tiles, *weight, *tokens, out.numpy())
        elif len(tiles):
            threads = _threads()
            parts = -(-2 * threads // len(tiles))  # of a tile, where there are few
            _multiply_tiles_together(parts, tiles, *weight, *tokens, out.numpy())
        return out

    def dense(self, expert: int) -> torch.Tensor:
        """Return an expert's weight (neurons, inputs) with its zeros."""
        weight = torch.empty(self.neurons, self.inputs, dtype=self.dtype)
        bits = weight.view(torch.uint16) if self.dtype == torch.bfloat16 else weight
        starts, order = self.starts[expert], self.order[expert]
        _fill_dense(_threads(), self.values, self.columns, starts, order, bits.numpy())
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
        _fill_slices(dense[expert], starts[expert], order[expert], values, columns)
    return Sliced(values, columns, starts, order, neurons, inputs)


def _threads() -> int:
    """Have as many threads as torch has: to wait for one more costs more than a product."""
    threads: int = min(torch.get_num_threads(), _MOST)
    numba.set_num_threads(threads)
    return threads


@numba.njit(parallel=True, nogil=True, cache=True)
def _fill_slices(dense, starts, order, values, columns):  # type: ignore[no-untyped-def]
    for place in numba.prange(len(order)):
        row = order[place]
        if row >= len(dense):
            continue
        entry = starts[place // ROWS] * ROWS + place % ROWS
        for column in range(dense.shape[1]):
            value = dense[row, column]
            if as_float(value) != 0:
                values[entry], columns[entry] = value, column
                entry += ROWS


@numba.njit(cache=True)
def _part(starts, part, parts):  # type: ignore[no-untyped-def]
    """Return the slices of a thread, so that each thread has as many entries to read."""
    first, last = starts[0], starts[-1]
    step = (last - first) / parts
    begin = np.searchsorted(starts, first + step * part) if part else 0
    end = (
        np.searchsorted(starts, first + step * (part + 1)) if part + 1 < parts else len(starts) - 1
    )
    return begin, end


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _multiply_part(begin, end, values, columns, starts, order, row, out):  # type: ignore[no-untyped-def]
    zero, one = np.float32(0), np.uint64(1)
    for piece in range(begin, end):
        a = b = c = d = e = f = g = h = zero
        i = np.uint64(starts[piece] * ROWS)
        for _ in range(starts[piece], starts[piece + 1]):
            prefetch(values, i + _AHEAD)
            prefetch(columns, i + _AHEAD)
            a += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            b += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            c += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            d += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            e += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            f += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            g += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
            h += as_float(values[i]) * row[np.uint64(columns[i])]
            i += one
        place = piece * ROWS
        for which, total in enumerate((a, b, c, d, e, f, g, h)):
            if order[place + which] < len(out):
                out[order[place + which]] = total


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _multiply_tile(  # type: ignore[no-untyped-def]
    zero, width, begin, end, values, columns, starts, order, rows, tokens, out
):
    """Multiply some slices with tokens that lie side by side, one in each lane of ``zero``."""
    one, wide = np.uint64(1), np.uint64(width)
    x = np.zeros(rows.shape[1] * width + 16, np.float32)
    x = x[-(x.ctypes.data // 4) % 16 :]  # to load from two cache lines takes twice as long
    for start in range(0, rows.shape[1], _NEAR):
        for lane, token in enumerate(tokens):
            row = rows[token, start : start + _NEAR]
            place = np.uint64(start * width + lane)
            for column in range(len(row)):
                x[place] = row[column]
                place += wide
    found, step = np.empty(_NEAR * width, np.float32), _NEAR // ROWS
    for shelf in range(begin, end, step):
        stop = min(shelf + step, end)
        for piece in range(shelf, stop):
            a = b = c = d = e = f = g = h = zero
            i = np.uint64(starts[piece] * ROWS)
            for _ in range(starts[piece], starts[piece + 1]):
                prefetch(values, i + _AHEAD)
                prefetch(columns, i + _AHEAD)
                a = lanes_add(a, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                b = lanes_add(b, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                c = lanes_add(c, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                d = lanes_add(d, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                e = lanes_add(e, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                f = lanes_add(f, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                g = lanes_add(g, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
                h = lanes_add(h, as_float(values[i]), x, np.uint64(columns[i]) * wide)
                i += one
            for which, total in enumerate((a, b, c, d, e, f, g, h)):
                lanes_store(found, np.uint64((piece - shelf) * ROWS + which) * wide, total)
        for lane, token in enumerate(tokens):
            line, place = out[token], np.uint64(lane)
            for neuron in order[shelf * ROWS : min(stop * ROWS, len(line))]:
                line[np.uint64(neuron)] = found[place]
                place += wide


@numba.njit(nogil=True, cache=True)
def _nearest(matrix, bias, row):  # type: ignore[no-untyped-def]
    scores, flat = bias.copy(), matrix.reshape(-1)
    for place in range(len(row)):
        prefetch(flat, np.uint64(place * len(scores)) + _AHEAD)
        for expert in range(len(scores)):
            scores[expert] += row[place] * matrix[place, expert]
    return scores.argmax()


@numba.njit(nogil=True, cache=True)
def _multiply_alone(values, columns, starts, order, expert, matrix, bias, row, out):  # type: ignore[no-untyped-def]
    expert = expert if expert >= 0 else _nearest(matrix, bias, row)
    starts, order = starts[expert], order[expert]
    _multiply_part(0, len(starts) - 1, values, columns, starts, order, row, out)
    return expert


@numba.njit(parallel=True, nogil=True, cache=True)
def _multiply_together(  # type: ignore[no-untyped-def]
    threads, values, columns, starts, order, expert, matrix, bias, row, out
):
    expert = expert if expert >= 0 else _nearest(matrix, bias, row)
    starts, order = starts[expert], order[expert]
    for part in numba.prange(threads):
        begin, end = _part(starts, part, threads)
        _multiply_part(begin, end, values, columns, starts, order, row, out)
    return expert


@numba.njit(nogil=True, cache=True)
def _multiply_tiles(  # type: ignore[no-untyped-def]
    start, stop, parts, tiles, values, columns, starts, order, rows, tokens, out
):
    for item in range(start, stop):
        expert, first, last = tiles[item // parts]
        begin, end = _part(starts[expert], item % parts, parts)
        weight = values, columns, starts[expert], order[expert]
        if last - first > WIDTH:
            zero = lanes_zero(WIDE)
            _multiply_tile(zero, WIDE, begin, end, *weight, rows, tokens[first:last], out)
        else:
            zero = lanes_zero(WIDTH)
            _multiply_tile(zero, WIDTH, begin, end, *weight, rows, tokens[first:last], out)


@numba.njit(parallel=True, nogil=True, cache=True)
def _multiply_tiles_together(  # type: ignore[no-untyped-def]
    parts, tiles, values, columns, starts, order, rows, tokens, out
):
    for item in numba.prange(len(tiles) * parts):
        _multiply_tiles(
            item, item + 1, parts, tiles, values, columns, starts, order, rows, tokens, out
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def _fill_dense(threads, values, columns, starts, order, weight):  # type: ignore[no-untyped-def]
    for part in numba.prange(threads):
        begin, end = _part(starts, part, threads)
        for place in range(begin * ROWS, end * ROWS):
            row = order[place]
            if row < len(weight):
                line = weight[row]
                line[:] = 0
                i = np.uint64(starts[place // ROWS] * ROWS + place % ROWS)
                for _ in range(starts[place // ROWS], starts[place // ROWS + 1]):
                    if as_float(values[i]) != 0:
                        line[np.uint64(columns[i])] = values[i]
                    i += np.uint64(ROWS)

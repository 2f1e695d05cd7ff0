"""CPU kernels for products of sparse matrices, stored in slices of eight rows, with tokens."""

import numba
import numpy as np

from entangle.numerics.kernels.simd import as_float, lanes_add, lanes_store, lanes_zero, prefetch

ROWS = 8  # rows of a slice
WIDTH, WIDE = 16, 32  # tokens of a tile: one AVX-512 register of sums for each row, or two
_NEAR = 64  # inputs or neurons that are transposed at a time, within the L1 cache
_AHEAD = np.uint64(512)  # entries to prefetch: enough to hide latency, few enough to stay cached


@numba.njit(parallel=True, nogil=True, cache=True)
def fill_slices(dense, starts, order, values, columns):  # type: ignore[no-untyped-def]
    """Fill the slices with the nonzeros of a matrix (neurons, inputs)."""
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
    """Return the first and end slice of a part; all parts have about as many entries."""
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
    """Multiply some slices with a tile of tokens, one token in each lane of the vector ``zero``."""
    one, wide = np.uint64(1), np.uint64(width)
    x = np.zeros(rows.shape[1] * width + 16, np.float32)
    x = x[-(x.ctypes.data // 4) % 16 :]  # align: a load across two cache lines takes twice as long
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
    """Return the expert with the highest score of a row (inputs,)."""
    scores, flat = bias.copy(), matrix.reshape(-1)
    for place in range(len(row)):
        prefetch(flat, np.uint64(place * len(scores)) + _AHEAD)
        for expert in range(len(scores)):
            scores[expert] += row[place] * matrix[place, expert]
    return scores.argmax()


@numba.njit(nogil=True, cache=True)
def multiply_alone(values, columns, starts, order, expert, matrix, bias, row, out):  # type: ignore[no-untyped-def]
    """Multiply one row (inputs,) with an expert and return its index; -1 is the router's choice."""
    expert = expert if expert >= 0 else _nearest(matrix, bias, row)
    starts, order = starts[expert], order[expert]
    _multiply_part(0, len(starts) - 1, values, columns, starts, order, row, out)
    return expert


@numba.njit(parallel=True, nogil=True, cache=True)
def multiply_together(  # type: ignore[no-untyped-def]
    threads, values, columns, starts, order, expert, matrix, bias, row, out
):
    """Do the same as `multiply_alone`, with several threads."""
    expert = expert if expert >= 0 else _nearest(matrix, bias, row)
    starts, order = starts[expert], order[expert]
    for part in numba.prange(threads):
        begin, end = _part(starts, part, threads)
        _multiply_part(begin, end, values, columns, starts, order, row, out)
    return expert


@numba.njit(nogil=True, cache=True)
def multiply_tiles(  # type: ignore[no-untyped-def]
    start, stop, parts, tiles, values, columns, starts, order, rows, tokens, out
):
    """Multiply the items from ``start`` to ``stop``; each tile of tokens has ``parts`` items."""
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
def multiply_tiles_together(  # type: ignore[no-untyped-def]
    parts, tiles, values, columns, starts, order, rows, tokens, out
):
    """Do the same as `multiply_tiles` for all items, with several threads."""
    for item in numba.prange(len(tiles) * parts):
        multiply_tiles(
            item, item + 1, parts, tiles, values, columns, starts, order, rows, tokens, out
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def fill_dense(threads, values, columns, starts, order, weight):  # type: ignore[no-untyped-def]
    """Fill a matrix (neurons, inputs) from an expert's slices, zeros included."""
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

"""GPU kernel that counts rows into histograms.

A program counts all rows of 1 to 8 neurons. No other program touches the state of these neurons, so
no sum depends on the order in which programs run, and the same batches give the same bits. These
rules exclude races. A comment at each store names the one that holds:

* owned: only this program writes there, and it stores each place once between two barriers.
* atomic: several threads of this program add integers to one place, in any order.
"""

import torch
import triton
import triton.language as tl

from entangle.numerics.kernels.bins import HALF_RANGE, MAX_EXCESS, MAX_SQUARES, STEPS

_STEPS = tl.constexpr(STEPS)
_WIDTHS = tl.constexpr(2 * HALF_RANGE)  # the bins' range in scales
_FARTHEST = tl.constexpr(float(MAX_EXCESS * STEPS))
_FULL = tl.constexpr(MAX_SQUARES)
_WHOLE = tl.constexpr(2.0**52)  # from here on every float64 is a whole number

# From Triton 3.9 on `tl.histogram` adds in shared memory. Before, it compares each value with all bins.
_SHARED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
_TILES = {False: (2048, 2, 8), True: (8192, 4, 16)}  # values at once, their parts, warps
_PROGRAMS = (
    256  # a layer has at least as many programs if it has as many neurons: two for each core
)


def add_rows(
    rows: torch.Tensor, places: torch.Tensor | None, *state: torch.Tensor, shared: bool = _SHARED
) -> None:
    """Add rows (tokens, neurons) to the state in place, without a copy and without waiting.

    ``rows`` are bfloat16, float16 or float32 of any strides (others are copied to float32), and at
    most 2^18 of them count. ``places`` (counted,) int64 are the rows that count; None counts all.
    ``state`` has the tensors of `Histograms` in their order. With ``shared`` values are counted in
    shared memory, else in the state itself.
    """
    tokens = len(rows) if places is None else len(places)
    neurons, bins = rows.shape[1], state[2].shape[1]
    if rows.dtype not in (torch.bfloat16, torch.float16):
        rows = rows.float()
    if tokens == 0 or neurons == 0:
        return
    columns = 1 << min(3, (neurons // _PROGRAMS | 1).bit_length() - 1)
    shared = shared and bins.bit_count() == 1  # a shape in Triton is a power of two
    values, parts, warps = _TILES[shared]
    with torch.cuda.device_of(rows):
        _add_rows[(triton.cdiv(neurons, columns),)](
            rows,
            places,
            tokens,
            neurons,
            *rows.stride(),
            *state,
            bins=bins,
            columns=columns,
            block=values // columns,
            parts=parts,
            few=32 * warps // columns,
            shared=shared,
            num_warps=warps,
            enable_fp_fusion=False,  # the square of a tail is rounded before it is made whole
        )


@triton.jit(do_not_specialize=["tokens"])
def _add_rows(  # type: ignore[no-untyped-def]
    rows,
    places,
    tokens,
    neurons,
    row_stride,
    column_stride,
    center,
    scale,
    counts,
    count,
    steps,
    powers,
    tail_count,
    tail_excess,
    tail_square,
    minimum,
    maximum,
    nonfinite,
    beyond,
    bins: tl.constexpr,  # of a neuron
    columns: tl.constexpr,  # neurons of a program
    block: tl.constexpr,  # tokens at once
    parts: tl.constexpr,  # of these tokens, which are summed before they are added to the sums
    few: tl.constexpr,  # tokens at once where there are tails
    shared: tl.constexpr,
):
    edge: tl.constexpr = _STEPS // 2 * bins
    slots: tl.constexpr = block // parts
    wide: tl.constexpr = columns if columns < 4 else 4  # of a thread: 8 have too many sums
    n = (tl.program_id(0) * columns + tl.arange(0, columns)).to(tl.int64)
    ok = n < neurons
    c = tl.load(center + n, mask=ok, other=0.0).to(tl.float32)
    width = tl.load(scale + n, mask=ok, other=1.0) * (_WIDTHS / bins)
    v = (1.0 / width * _STEPS).to(tl.float32)  # exactly 64 / width: 64 is a power of two
    base = rows + tl.max_contiguous(n, wide) * column_stride
    counts += tl.program_id(0).to(tl.int64) * (columns * bins)

    # With h = q(q + 1) / 2 all sums of powers of q + 1/2 are sums of q, h, qh and h², which are
    # integers. A product of h < 2^31 and its upper or lower 16 bits leaves room for 2^16 values.
    sum_q = tl.zeros([slots, columns], tl.int32)
    sum_h = tl.zeros([slots, columns], tl.int64)
    sum_qh = tl.zeros([slots, columns], tl.int64)
    sum_upper = tl.zeros([slots, columns], tl.int64)
    sum_lower = tl.zeros([slots, columns], tl.int64)
    least = tl.full([slots, columns], float("inf"), tl.float32)
    most = tl.full([slots, columns], float("-inf"), tl.float32)
    if shared:
        counted = tl.zeros([columns * bins], tl.int32)
    marks = tl.full([], 0, tl.int64)  # bit i: the i-th tokens of 64 have values outside of the bins
    for first in range(0, tokens, block):
        real, x = _values(base, places, first, tokens, row_stride, ok, block)
        y = (x - c[None, :]) * v[None, :]
        inside = (y >= -edge) & (y < edge)  # false for NaN, and so for what is not real
        y = tl.where(inside, y, 0.0)
        q = y.to(tl.int32)
        q -= (q.to(tl.float32) > y).to(tl.int32)  # tl.floor takes -1e-40 for 0 on a GPU
        cells = (q + edge) // _STEPS + (tl.arange(0, columns) * bins)[None, :]
        # The lanes of a warp take tokens of one neuron, since some of these share a cache line.
        cells = tl.reshape(tl.trans(tl.where(inside, cells, -1)), [block * columns])
        if shared:
            counted += tl.histogram(cells, columns * bins, mask=cells >= 0)
        else:
            tl.atomic_add(counts + cells, 1, mask=cells >= 0, sem="relaxed")  # atomic
        u = q.to(tl.uint32, bitcast=True)
        h = (u * (u + 1)) >> 1  # below 2^31, also where the product wraps
        sum_q += tl.sum(tl.reshape(q, [parts, slots, columns]), 0)
        sum_h += _sum_of_parts(h, 1, parts)
        sum_upper += _sum_of_parts(h, h >> 16, parts)
        sum_lower += _sum_of_parts(h, h & 0xFFFF, parts)
        sum_qh += _sum_of_parts(q, h.to(tl.int32, bitcast=True), parts)
        x = tl.reshape(x, [parts, slots, columns])
        least = tl.minimum(least, tl.min(tl.where(x == x, x, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(x == x, x, float("-inf")), 0))
        outside = tl.max(tl.max((real & ~inside).to(tl.int32), 1), 0)
        marks |= outside.to(tl.int64) << (first // block % 64)

    if shared:
        at = counts + tl.arange(0, columns * bins)
        filled = counted > 0  # false for bins of no neuron
        tl.store(at, tl.load(at, mask=filled, other=0) + counted, mask=filled)  # owned
    first_sum = tl.sum(sum_q.to(tl.int64), 0)
    h_sum = tl.sum(sum_h, 0)
    squares = 65536.0 * tl.sum(sum_upper.to(tl.float64), 0) + tl.sum(sum_lower.to(tl.float64), 0)
    third = (
        2.0 * tl.sum(sum_qh.to(tl.float64), 0)
        + h_sum
        + first_sum.to(tl.float64) * 0.25
        + tokens * 0.125
    )
    _increase(count + n, tokens, ok)
    _increase(steps + 2 * n, first_sum, ok)
    _increase(steps + 2 * n + 1, 2 * h_sum, ok)
    _increase(powers + 2 * n, third, ok)
    _increase(powers + 2 * n + 1, 4.0 * squares + h_sum + tokens * 0.0625, ok)
    before = tl.load(minimum + n, mask=ok, other=0.0)
    now = tl.min(least, 0)
    tl.store(minimum + n, tl.where(now < before, now, before), mask=ok)  # owned; NaN stays
    before = tl.load(maximum + n, mask=ok, other=0.0)
    now = tl.max(most, 0)
    tl.store(maximum + n, tl.where(now > before, now, before), mask=ok)  # owned; NaN stays

    # Apart from the loop above, whose sums fill the registers.
    if marks != 0:
        for first in range(0, tokens, block):
            if (marks >> (first // block % 64)) & 1 != 0:
                for start in range(first, tl.minimum(first + block, tokens), few):
                    tl.debug_barrier()  # what was stored before is seen by all threads
                    real, x = _values(base, places, start, tokens, row_stride, ok, few)
                    y = (x - c[None, :]) * v[None, :]
                    outside = real & ~((y >= -edge) & (y < edge))
                    finite = outside & (tl.abs(x) < float("inf"))
                    y = (x.to(tl.float64) - c[None, :]) * v[None, :]
                    y = tl.where(finite, y, 0.0)
                    excess = tl.maximum(tl.floor(tl.abs(y)) - edge, 0.0)
                    far = finite & (excess > _FARTHEST)
                    invalid = tl.sum((outside & ~finite).to(tl.int64), 0)
                    _increase(nonfinite + n, invalid, ok)
                    _increase(beyond + n, tl.sum(far.to(tl.int64), 0), ok)
                    tl.store(minimum + n, float("nan"), mask=ok & (invalid > 0))  # owned
                    tl.store(maximum + n, float("nan"), mask=ok & (invalid > 0))  # owned
                    # The sums above took these values for q = 0.
                    third = tl.sum(outside.to(tl.float64), 0) * -0.125
                    fourth = third * 0.5
                    for side in tl.static_range(2):
                        tail = finite & ~far & ((y >= 0) == (side == 1))
                        e = tl.where(tail, excess, 0.0)
                        _increase(tail_count + 2 * n + side, tl.sum(tail.to(tl.int64), 0), ok)
                        _increase(tail_excess + 2 * n + side, tl.sum(e.to(tl.int64), 0), ok)
                        _increase_squares(tail_square + 2 * n + side, e, tail, ok)
                        d = tl.where(tail, e + (edge + 0.5), 0.0)
                        third += tl.sum(d * d * d, 0) * (2 * side - 1)
                        fourth += tl.sum(d * d * d * d, 0)
                    _increase(powers + 2 * n, third, ok)
                    _increase(powers + 2 * n + 1, fourth, ok)


@triton.jit
def _values(base, places, first, tokens, row_stride, ok, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which of block tokens are real, and their values (block, columns); the others are NaN."""
    t = first + tl.arange(0, block)
    here = t < tokens
    if places is not None:
        t = tl.load(places + t, mask=here, other=0)
    real = here[:, None] & ok[None, :]
    at = base[None, :] + (t.to(tl.int64) * row_stride)[:, None]
    return real, tl.load(at, mask=real, other=float("nan")).to(tl.float32)


@triton.jit
def _sum_of_parts(a, b, parts: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums (slots, columns) of the exact products of a and b, of 32 bits both."""
    if a.dtype.is_int_unsigned():
        product = (a.to(tl.uint64) * tl.cast(b, tl.uint64)).to(tl.int64)
    else:
        product = a.to(tl.int64) * b.to(tl.int64)
    return tl.sum(tl.reshape(product, [parts, a.shape[0] // parts, a.shape[1]]), 0)


@triton.jit
def _increase(at, by, ok):  # type: ignore[no-untyped-def]
    tl.store(at, tl.load(at, mask=ok, other=0) + by, mask=ok)  # owned


@triton.jit
def _increase_squares(at, e, tail, ok):  # type: ignore[no-untyped-def]
    """Add the squares of an excess in whole bins, at most up to `MAX_SQUARES`."""
    square = (e + 0.5) / _STEPS
    square = square * square
    # Adding 2^52 rounds to the nearest whole number, and half to the even one.
    square = tl.where(square < _WHOLE, (square + _WHOLE) - _WHOLE, square)
    square = tl.where(tail, square, 0.0).to(tl.int64)
    upper, lower = tl.sum(square >> 32, 0), tl.sum(square & 0xFFFFFFFF, 0)  # these do not overflow
    upper += lower >> 32
    total = (tl.minimum(upper, _FULL >> 32) << 32) | (lower & 0xFFFFFFFF)
    before = tl.load(at, mask=ok, other=0)
    tl.store(at, tl.where(total >= -before + _FULL, _FULL, before + total), mask=ok)  # owned

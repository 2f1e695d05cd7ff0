"""Triton kernels for GPUs that multiply tokens with experts, sparse or dense, each with its own.

The experts of the tokens are read from the device's memory, so nothing waits for the host, and a
CUDA graph can record the calls. Sums are of float32. Sparse weights are in slices of eight rows
(`entangle.numerics.sparse`): eight numbers of 16 bits are what a thread loads at once, and the
threads of a warp read neighbouring nonzeros of the same rows, whose inputs share cache lines.

`TRITON_INTERPRET=1` runs the kernels on tensors of the CPU, one program after the other. It sees no
races, so a comment at each store says why there is none.
"""

import torch
import triton
import triton.language as tl

from entangle.numerics.kernels.sparse_cpu import ROWS

_ROWS = tl.constexpr(ROWS)  # of a slice
_LONGEST = 512  # entries of a row that a program reads at once
_ROUTING = 264  # programs where each one routes first: two for each multiprocessor of an H100
_ROUTED = 4096  # weights of the router that a program reads at once
_ZEROS = 512  # columns that a program clears at once
# The most tokens of a tile, its neurons (twice as many with 128 tokens) and its inputs, by the bytes
# of a number: as many sums as registers hold.
_TILES = {2: (128, 128, 64), 4: (64, 64, 32)}


def multiply(
    rows: torch.Tensor,
    chosen: torch.Tensor | None,
    weight: tuple[torch.Tensor, ...],
    neurons: int,
    bias: torch.Tensor | None,
    router: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the products (tokens, neurons) of few rows (tokens, inputs), each with its expert.

    ``weight`` has the values, columns, starts and order of slices, or only the weights
    (experts, neurons, inputs). ``chosen`` (tokens,) int64 are the experts; None is expert 0. With a
    router, a matrix (inputs, experts) and a bias (experts,), the call chooses them and writes them
    into ``chosen``. Each program then routes its token, so this is for one token. All tensors are
    contiguous.
    """
    values, columns, starts, order = weight if len(weight) > 1 else (weight[0], None, None, None)
    tokens, inputs = rows.shape
    matrix, scores = router or (None, None)
    experts = 1 if matrix is None else matrix.shape[1]
    slices = triton.cdiv(neurons, ROWS)
    length = inputs if starts is None else len(values) // (starts.shape[0] * slices * ROWS)
    deep = min(max(triton.next_power_of_2(length), 16), _LONGEST)
    wide = triton.next_power_of_2(experts)
    out = torch.empty(tokens, neurons, dtype=rows.dtype, device=rows.device)
    with torch.cuda.device_of(rows):  # Triton launches on the current GPU
        _multiply[(tokens, slices if matrix is None else min(slices, _ROUTING))](
            rows,
            values,
            columns,
            starts,
            order,
            chosen,
            matrix,
            scores,
            bias,
            out,
            neurons,
            inputs,
            experts,
            slices,
            DEEP=deep,
            EXPERTS=wide,
            ROUTED=max(_ROUTED // wide, 1),
            num_warps=max(4, deep // 64),
        )
    return out


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    rows,
    values,
    columns,
    starts,
    order,
    chosen,
    matrix,
    scores,
    bias,
    out,
    neurons,
    inputs,
    experts,
    slices,
    DEEP: tl.constexpr,  # entries of a row at once
    EXPERTS: tl.constexpr,
    ROUTED: tl.constexpr,  # inputs that the router reads at once
):
    token = tl.program_id(0).to(tl.int64)
    rows += token * inputs
    expert = tl.full([], 0, tl.int64)
    if matrix is not None:
        expert = _route(rows, matrix, scores, inputs, experts, EXPERTS, ROUTED).to(tl.int64)
        # Of the programs of a token one stores, and none reads.
        tl.store(chosen + token, expert, mask=tl.program_id(1) == 0)
    elif chosen is not None:
        expert = tl.load(chosen + token)
    h = tl.arange(0, _ROWS)
    for piece in range(tl.program_id(1), slices, tl.num_programs(1)):
        if columns is None:
            length = inputs
            row = piece * _ROWS + h
            real = row < neurons
            base = values + (expert * neurons + row) * inputs
        else:
            start = tl.load(starts + expert * (slices + 1) + piece)
            length = (tl.load(starts + expert * (slices + 1) + piece + 1) - start).to(tl.int32)
            row = tl.load(order + (expert * slices + piece) * _ROWS + h)
            real = row < neurons
            base = values + start * _ROWS + h
        total = tl.zeros([DEEP, _ROWS], tl.float32)
        for first in range(0, length, DEEP):
            k = first + tl.arange(0, DEEP)
            if columns is None:
                x = tl.load(rows + k, mask=k < length, other=0.0).to(tl.float32)[:, None]
                inside = (k < length)[:, None] & real[None, :]
                w = tl.load(base[None, :] + k[:, None], mask=inside, other=0.0)
            else:
                inside = (k < length)[:, None]
                at = columns + start * _ROWS + k[:, None] * _ROWS + h[None, :]
                column = tl.load(at, mask=inside, other=0).to(tl.int32)
                x = tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
                w = tl.load(base[None, :] + k[:, None] * _ROWS, mask=inside, other=0.0)
            total += w.to(tl.float32) * x
        found = tl.sum(total, axis=0)
        if bias is not None:
            found += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)
        # A row is in one slice, and a slice of a token is one program's.
        tl.store(out + token * neurons + row, found.to(out.dtype.element_ty), mask=real)


@triton.jit
def _route(row, matrix, scores, inputs, experts, EXPERTS: tl.constexpr, ROUTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the expert with the highest score; of equal ones the first."""
    e = tl.arange(0, EXPERTS)
    total = tl.zeros([ROUTED, EXPERTS], tl.float32)
    for first in range(0, inputs, ROUTED):
        i = first + tl.arange(0, ROUTED)
        x = tl.load(row + i, mask=i < inputs, other=0.0).to(tl.float32)
        inside = (i < inputs)[:, None] & (e < experts)[None, :]
        at = matrix + i[:, None] * experts + e[None, :]
        total += x[:, None] * tl.load(at, mask=inside, other=0.0)
    found = tl.sum(total, axis=0) + tl.load(scores + e, mask=e < experts, other=float("-inf"))
    return tl.minimum(tl.argmax(found, axis=0), experts - 1)  # NaN: some expert that exists


def unpack(
    values: torch.Tensor,
    columns: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill ``out`` (experts, neurons, inputs) from slices, of as many experts, zeros included."""
    experts, neurons, inputs = out.shape
    slices = triton.cdiv(neurons, ROWS)
    bits = torch.int16 if out.element_size() == 2 else torch.int32  # a float may count as a zero
    length = max(len(values) // (starts.shape[0] * slices * ROWS), 16)
    with torch.cuda.device_of(out):
        _unpack[(slices, experts)](
            values.view(bits),
            columns,
            starts,
            order,
            out.view(bits),
            neurons,
            inputs,
            slices,
            DEEP=min(triton.next_power_of_2(length), _LONGEST // 2),
            ZEROS=min(triton.next_power_of_2(inputs), _ZEROS),
            num_warps=4,
        )


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    values,
    columns,
    starts,
    order,
    out,
    neurons,
    inputs,
    slices,
    DEEP: tl.constexpr,
    ZEROS: tl.constexpr,
):
    piece = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    h = tl.arange(0, _ROWS)
    row = tl.load(order + (expert * slices + piece) * _ROWS + h)
    real = row < neurons
    base = out + (expert * neurons + row) * inputs
    for first in range(0, inputs, ZEROS):
        c = first + tl.arange(0, ZEROS)
        zeros = tl.zeros([_ROWS, ZEROS], out.dtype.element_ty)
        inside = real[:, None] & (c < inputs)[None, :]
        tl.store(base[:, None] + c[None, :], zeros, mask=inside)  # a row is one program's
    tl.debug_barrier()  # zeros of all threads are stored before the values
    start = tl.load(starts + expert * (slices + 1) + piece)
    length = (tl.load(starts + expert * (slices + 1) + piece + 1) - start).to(tl.int32)
    for first in range(0, length, DEEP):
        k = first + tl.arange(0, DEEP)
        inside = (k < length)[:, None]
        at = start * _ROWS + k[:, None] * _ROWS + h[None, :]
        value = tl.load(values + at, mask=inside, other=0)
        column = tl.load(columns + at, mask=inside, other=0).to(tl.int64)
        # A row is one program's, and has a column once; what is zero is padding.
        tl.store(base[None, :] + column, value, mask=value != 0)


def multiply_groups(
    rows: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    first: int = 0,
) -> None:
    """Fill ``out`` (tokens, neurons) with the products of rows (tokens, inputs) with their experts.

    An expert e has the rows ``order[offsets[e] : offsets[e + 1]]``. ``weight`` has the dense weights
    (some, neurons, inputs) of the experts from ``first`` on, in the rows' dtype; the products of
    other experts are left as they are. The host does not know how many rows an expert has: there are
    as many programs as could be needed. All tensors are contiguous.
    """
    some, neurons, inputs = weight.shape
    tokens = len(rows)
    half = tokens // (2 * (len(offsets) - 1))  # of an expert's tokens: the last tile is half full
    highest, wide, deep = _TILES[weight.element_size()]
    high = min(max(1 << max(half.bit_length() - 1, 0), 16), highest)
    if inputs % 16:  # then each number is loaded by itself, with its address in registers
        high, deep = min(high, 32), 16
    wide = 2 * wide if high == 128 else wide
    with torch.cuda.device_of(rows):
        # Each expert may have one tile that is not full.
        _multiply_groups[(tokens // high + some, triton.cdiv(neurons, wide))](
            rows,
            order,
            offsets[first:],
            weight,
            bias,
            out,
            neurons,
            inputs,
            some,
            HIGH=high,
            WIDE=wide,
            DEEP=deep,
            EXPERTS=triton.next_power_of_2(some),
            num_warps=8 if high == 128 else 4,
            num_stages=2 if torch.version.hip else 3,  # an MI300 has 64 KiB of shared memory
        )


@triton.jit
def _multiply_groups(  # type: ignore[no-untyped-def]
    rows,
    order,
    offsets,
    weight,
    bias,
    out,
    neurons,
    inputs,
    experts,
    HIGH: tl.constexpr,  # tokens of a tile
    WIDE: tl.constexpr,  # neurons of a tile
    DEEP: tl.constexpr,  # inputs at once
    EXPERTS: tl.constexpr,
):
    e = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + e, mask=e < experts, other=0)
    ends = tl.load(offsets + e + 1, mask=e < experts, other=0)
    tiles = ((ends - begins + HIGH - 1) // HIGH).to(tl.int32)
    last = tl.cumsum(tiles, axis=0)  # where the tiles of an expert end
    tile = tl.program_id(0)
    expert = tl.sum((last <= tile).to(tl.int32), axis=0)
    if expert < experts:
        mine = e == expert
        begin = tl.sum(tl.where(mine, begins, 0), axis=0)
        end = tl.sum(tl.where(mine, ends, 0), axis=0)
        tile -= tl.sum(tl.where(mine, last - tiles, 0), axis=0)
        t = begin + tile * HIGH + tl.arange(0, HIGH)
        real = t < end
        token = tl.load(order + t, mask=real, other=0)
        n = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        k = tl.arange(0, DEEP)
        left = rows + token[:, None] * inputs + k[None, :]
        right = weight + (expert.to(tl.int64) * neurons + n)[None, :] * inputs + k[:, None]
        total = tl.zeros([HIGH, WIDE], tl.float32)
        for first in range(0, inputs, DEEP):
            inside = k < inputs - first
            a = tl.load(left + first, mask=real[:, None] & inside[None, :], other=0.0)
            b = tl.load(right + first, mask=inside[:, None] & (n < neurons)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if bias is not None:
            total += tl.load(bias + n, mask=n < neurons, other=0.0).to(tl.float32)[None, :]
        inside = real[:, None] & (n < neurons)[None, :]
        # A token has one expert, so one tile, and a tile's neurons are one program's.
        places = out + token[:, None] * neurons + n[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=inside)

"""Triton kernels for GPUs that do what those of `masks_cpu` do, and a product with fixed sums.

Every sum has an order that does not depend on the number of rows or experts. So a row's result has
the same bits whatever rows and experts are beside it. All products are of float32.

`solve_block` and `mark_lowest` give the bits of `masks_cpu` for the same numbers: they divide by IEEE
754 and round each product before they subtract it. (On a GPU, Triton before 3.6 divides with 0 in
place of numbers below 1.2e-38.) `TRITON_INTERPRET=1` runs them on tensors of the
CPU.
"""

import torch
import triton
import triton.language as tl

_ROWS = 8  # of a tile that one warp solves: 32 bytes of each column
_TILE = 1024  # values of a tile for each warp, so that a thread holds 32 of them in registers
_WARPS = 16  # of a program at most: 1,024 threads where a warp has 64, as on some cards of AMD
_LONGEST = 32_768  # a row of scores that one program holds in registers
_CHUNK = 4096  # scores of a longer row that one program reads
_DIGITS = tl.constexpr(2048)  # of the bits of a score: three digits of 11, 10 and 10 bits
_OUT, _ROW_TILE, _DEPTH = 64, 128, 16  # of the tile of a product that one program computes


def solve_block(
    block: torch.Tensor,
    pruned: torch.Tensor,
    square: torch.Tensor,
    counts: torch.Tensor,
    kept: int,
    group: int,
) -> None:
    """Solve a block (experts, columns, rows) in place; rows are a multiple of 64.

    A row's ``counts`` (rows,) lowest weights are chosen at the start; with n:m, those of a group
    are chosen at its first column. ``pruned`` has the weights that are chosen already, in rows whose
    count is 0. All tensors are contiguous.
    """
    experts, columns, rows = block.shape
    width = triton.next_power_of_2(columns)
    height = max(min(_ROWS, _TILE // width), 1)
    with torch.cuda.device_of(block):  # Triton launches on the current GPU
        _solve[(rows // height, experts)](
            block,
            pruned.view(torch.int8),
            square,
            counts,
            rows,
            columns,
            group or columns,
            group - kept,
            GROUPED=group > 0,
            R=height,
            C=width,
            num_warps=min(max(height * width // _TILE, 1), _WARPS),
            enable_fp_fusion=False,  # the CPU rounds a product before it subtracts it
        )


@triton.jit
def _solve(  # type: ignore[no-untyped-def]
    block,
    pruned,
    square,
    counts,
    rows,
    columns,
    group,
    lowest,
    GROUPED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    real = (c < columns)[None, :]
    places = expert * columns * rows + c[None, :].to(tl.int64) * rows + r[:, None]
    square += expert * columns * columns
    w = tl.load(block + places, mask=real, other=0.0)
    p = tl.load(pruned + places, mask=real, other=0) != 0
    diagonal = tl.load(square + c * columns + c, mask=c < columns, other=1.0)
    if not GROUPED:
        count = tl.load(counts + r).to(tl.int32)
        p = p | _lowest(_bits(w, diagonal, real), count)
    for first in range(0, columns, group):
        if GROUPED:
            bits = _bits(w, diagonal, real)
            inside = (c >= first) & (c < first + group)
            lower = tl.zeros([R, C], tl.int32)  # scores of the group that are lower than this one
            for i in range(first, first + group):
                one = tl.sum(tl.where((c == i)[None, :], bits, 0), axis=1)[:, None]
                lower += ((one < bits) | ((one == bits) & (i < c)[None, :])).to(tl.int32)
            p = p | (inside[None, :] & (lower < lowest))
        for j in range(first, first + group):
            here = (c == j)[None, :]
            # One term of each sum is not zero. Of a weight that stays the error is zero.
            value = tl.sum(tl.where(here & p, w, 0.0), axis=1)
            error = tl.div_rn(value, tl.load(square + j * columns + j))
            right = tl.load(square + j * columns + c, mask=(c > j) & (c < columns), other=0.0)
            w -= error[:, None] * right[None, :]
    # Each weight is stored by one program.
    tl.store(block + places, tl.where(p, 0.0, w), mask=real)


@triton.jit
def _bits(w, diagonal, real):  # type: ignore[no-untyped-def]
    """Return the bits of the scores |w| / U_jj; those of padding are above all others.

    Non-negative floats have the order of their bits.
    """
    scores = tl.abs(tl.div_rn(w, tl.broadcast_to(diagonal[None, :], w.shape)))
    return tl.where(real, scores.to(tl.int32, bitcast=True), 0x7FFFFFFF)


@triton.jit
def _lowest(bits, counts):  # type: ignore[no-untyped-def]
    """Mark the ``counts`` (R,) lowest of each row of bits (R, C); ties mark the first.

    The highest marked score is found bit by bit.
    """
    highest = tl.zeros_like(counts)
    for step in range(31):
        trial = highest | (1 << (30 - step))
        below = tl.sum((bits < trial[:, None]).to(tl.int32), axis=1)
        highest = tl.where(below < counts, trial, highest)
    less = bits < highest[:, None]
    ties = bits == highest[:, None]
    spare = counts - tl.sum(less.to(tl.int32), axis=1)
    rank = tl.cumsum(ties.to(tl.int32), axis=1)
    return (less | (ties & (rank <= spare[:, None]))) & (counts > 0)[:, None]


def mark_lowest(scores: torch.Tensor, lowest: torch.Tensor, counts: torch.Tensor) -> None:
    """Mark the ``counts`` (rows,) lowest scores of each row (rows, columns); ties mark the first.

    Scores are float32 and not negative. All tensors are contiguous.
    """
    marks = lowest.view(torch.int8)
    with torch.cuda.device_of(scores):
        if scores.shape[1] > _LONGEST:
            _mark_long(scores, marks, counts)
        else:
            _mark_short(scores, marks, counts)


def _mark_short(scores: torch.Tensor, marks: torch.Tensor, counts: torch.Tensor) -> None:
    """Mark the lowest scores of rows that one program holds in registers."""
    rows, columns = scores.shape
    width = triton.next_power_of_2(columns)
    height = max(_TILE // width, 1)
    _mark[(triton.cdiv(rows, height),)](
        scores,
        marks,
        counts,
        rows,
        columns,
        R=height,
        C=width,
        num_warps=min(max(width // _TILE, 1), _WARPS),
        enable_fp_fusion=False,
    )


@triton.jit
def _mark(scores, lowest, counts, rows, columns, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    real = (r < rows)[:, None] & (c < columns)[None, :]
    places = r[:, None].to(tl.int64) * columns + c[None, :]
    count = tl.load(counts + r, mask=r < rows, other=0).to(tl.int32)
    bits = tl.load(scores + places, mask=real, other=0.0).to(tl.int32, bitcast=True)
    marks = _lowest(tl.where(real, bits, 0x7FFFFFFF), count)
    tl.store(lowest + places, marks.to(tl.int8), mask=real)  # each mark is stored by one program


def _mark_long(scores: torch.Tensor, lowest: torch.Tensor, counts: torch.Tensor) -> None:
    """Mark the lowest scores of few long rows, each by many programs.

    The bits of the highest marked score are found in three digits: scores with the digits found so
    far are counted by their next digit.
    """
    rows, columns = scores.shape
    chunks = triton.cdiv(columns, _CHUNK)
    tallies = torch.zeros(rows, 3, _DIGITS.value, dtype=torch.int32, device=scores.device)
    ties = torch.empty(rows, chunks, dtype=torch.int32, device=scores.device)
    arguments = (scores, counts, tallies, ties, lowest, columns, chunks)
    for step in range(5):  # three digits; the ties of each chunk; the marks
        _mark_chunk[(rows, chunks)](
            *arguments,
            STEP=step,
            CHUNK=_CHUNK,
            CHUNKS=triton.next_power_of_2(chunks),
            num_warps=8,
            enable_fp_fusion=False,
        )


@triton.jit
def _mark_chunk(  # type: ignore[no-untyped-def]
    scores,
    counts,
    tallies,
    ties,
    lowest,
    columns,
    chunks,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    chunk = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    real = i < columns
    bits = tl.load(scores + row * columns + i, mask=real, other=0.0).to(tl.int32, bitcast=True)
    digits = tl.arange(0, _DIGITS)
    tallies += row * 3 * _DIGITS
    count = tl.load(counts + row).to(tl.int32)
    left = count  # to be marked among the scores that begin with the digits found so far
    highest = tl.zeros([], tl.int32)
    for step in tl.static_range(3 if STEP > 3 else STEP):
        tally = tl.load(tallies + step * _DIGITS + digits)
        digit = tl.sum((tl.cumsum(tally, axis=0) < left).to(tl.int32), axis=0)
        left -= tl.sum(tl.where(digits < digit, tally, 0), axis=0)
        highest = highest | (digit << (20 - 10 * step))
    if STEP < 3:
        # The last digit of all is that of no number: it counts the scores that do not matter.
        above: tl.constexpr = 31 if STEP == 0 else 30 - 10 * STEP
        alike = real if STEP == 0 else real & ((bits >> above) == (highest >> above))
        digit = (bits >> (20 - 10 * STEP)) & (_DIGITS - 1 if STEP == 0 else 1023)
        tally = tl.histogram(tl.where(alike, digit, _DIGITS - 1), _DIGITS)
        # Many programs add to a tally: atomic, and sums of integers have no order.
        tl.atomic_add(tallies + STEP * _DIGITS + digits, tally, mask=tally > 0, sem="relaxed")
    else:
        tie = real & (bits == highest)
        if STEP == 3:  # each number of ties is stored by one program
            tl.store(ties + row * chunks + chunk, tl.sum(tie.to(tl.int32), axis=0))
        else:
            k = tl.arange(0, CHUNKS)
            before = tl.sum(tl.load(ties + row * chunks + k, mask=k < chunk, other=0), axis=0)
            rank = before + tl.cumsum(tie.to(tl.int32), axis=0)
            marks = (bits < highest) | (tie & (rank <= left))
            marks = marks & (count > 0)
            # Each mark is stored by one program.
            tl.store(lowest + row * columns + i, marks.to(tl.int8), mask=real)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add aᵀb to ``out`` (columns, rows), where a is (depth, columns) and b (depth, rows).

    Each value is summed in one order whatever the sizes: cuBLAS chooses another order for another
    number of rows.
    """
    depth, columns = a.shape
    rows = b.shape[1]
    with torch.cuda.device_of(out):
        _add_product[(triton.cdiv(columns, _OUT), triton.cdiv(rows, _ROW_TILE))](
            out,
            a,
            b,
            columns,
            rows,
            depth,
            out.stride(0),
            a.stride(0),
            a.stride(1),
            b.stride(0),
            M=_OUT,
            N=_ROW_TILE,
            K=_DEPTH,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    out,
    a,
    b,
    columns,
    rows,
    depth,
    out_stride,
    a_stride,
    a_column,
    b_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K).to(tl.int64)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, depth, K):
        deep = first + k
        left = tl.load(
            a + deep[None, :] * a_stride + m[:, None] * a_column,
            mask=(m < columns)[:, None] & (deep < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + deep[:, None] * b_stride + n[None, :],
            mask=(deep < depth)[:, None] & (n < rows)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    places = out + m[:, None] * out_stride + n[None, :]
    inside = (m < columns)[:, None] & (n < rows)[None, :]
    # Each value is stored by one program.
    tl.store(places, tl.load(places, mask=inside, other=0.0) + total, mask=inside)

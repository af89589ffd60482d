"""The kernels of norm_act_triton.py. A program's place is (block of channels, chunk of rows, view).

`rows` are those of a view, `share` those of a chunk (the last may have fewer); there are `groups` * STEP
channels; `parts` [2, V, chunks, C] are the chunks' sums. Offsets of rows are 64-bit.
"""
# Kernels take pointers and sizes, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: PLR0913, PLR0917

import triton
import triton.language as tl

_STAGES = tl.constexpr(3)  # two tiles are read ahead


@triton.jit
def sum_values(
    x, parts, rows, share, groups,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """For each channel of a chunk: the mean, and the squared distances from it."""
    channels = groups * STEP
    column, known, first, count = _place(rows, share, channels, COLUMNS)
    # Distances from a value of the chunk: it is at most sqrt(count) deviations off, so little is cancelled.
    pivot = tl.load(x + first * channels + column, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = total
    for start in tl.range(0, count, ROWS, num_stages=_STAGES):
        at, inside = _tile(first + start, count - start, column, known, channels, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, value - pivot[None, :], 0.0)
        total += difference
        square += difference * difference
    offset = tl.sum(total, 0) / count
    _store_part(parts, column, known, channels, pivot + offset, tl.sum(square, 0) - offset * offset * count)


@triton.jit
def normalise(
    x, residual, y, parts, weight, bias, running_mean, running_var, means, invstds, momentum, eps,
    rows, share, groups, RELU: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The output of a chunk. Chunk 0 keeps the statistics; that of view 0 also updates the running ones."""
    channels = groups * STEP
    column, known, first, count = _place(rows, share, channels, COLUMNS)
    chunk, view = tl.program_id(1), tl.program_id(2)
    mean, square = _add_moments(parts, view, column, known, rows, share, channels, COLUMNS, CHUNKS)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(square / rows + eps))
    scale = invstd * tl.load(weight + column, mask=known, other=0.0)
    shift = tl.load(bias + column, mask=known, other=0.0)
    if chunk == 0:
        tl.store(means + view * channels + column, mean, mask=known)
        tl.store(invstds + view * channels + column, invstd, mask=known)
        if view == 0:
            _update_running(
                running_mean, running_var, momentum, parts,
                column, known, rows, share, channels, COLUMNS, CHUNKS,
            )  # fmt: skip
    # Backwards: what was read last is in the cache, still.
    last = (count - 1) // ROWS * ROWS
    for done in tl.range(0, count, ROWS, num_stages=_STAGES):
        start = last - done
        at, inside = _tile(first + start, count - start, column, known, channels, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # what is not a number stays so
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sum_gradients(
    grad_y, x, y, grad_residual, parts, means, rows, share, groups,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """For each channel of a chunk: the sum of the gradients behind the ReLU, and of them times x - mean."""
    channels = groups * STEP
    column, known, first, count = _place(rows, share, channels, COLUMNS)
    mean = tl.load(means + tl.program_id(2) * channels + column, mask=known, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = total
    for start in tl.range(0, count, ROWS, num_stages=_STAGES):
        at, inside = _tile(first + start, count - start, column, known, channels, ROWS)
        gradient = _load_gradient(grad_y, y, at, inside)
        if grad_residual is not None:
            tl.store(grad_residual + at, gradient.to(grad_residual.dtype.element_ty), mask=inside)
        total += gradient
        product += gradient * (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :])
    _store_part(parts, column, known, channels, tl.sum(total, 0), tl.sum(product, 0))


@triton.jit
def find_gradient(
    grad_y, x, y, grad_x, parts, weight, means, invstds, grad_weight, grad_bias, rows, share, groups,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The gradient of x in a chunk; those of weight and bias by the first chunk of the first view."""
    channels = groups * STEP
    column, known, first, count = _place(rows, share, channels, COLUMNS)
    chunk, view = tl.program_id(1), tl.program_id(2)
    total, product = _add_sums(parts, view, column, known, channels, COLUMNS, CHUNKS)
    mean = tl.load(means + view * channels + column, mask=known, other=0.0)
    invstd = tl.load(invstds + view * channels + column, mask=known, other=0.0)
    scale = invstd * tl.load(weight + column, mask=known, other=0.0)
    average, slope = total / rows, invstd * invstd * (product / rows)
    if (chunk == 0) & (view == 0):
        _store_parameter_gradients(
            grad_weight, grad_bias, invstds, parts, column, known, channels, COLUMNS, CHUNKS
        )
    last = (count - 1) // ROWS * ROWS
    for done in tl.range(0, count, ROWS, num_stages=_STAGES):
        start = last - done
        at, inside = _tile(first + start, count - start, column, known, channels, ROWS)
        gradient = _load_gradient(grad_y, y, at, inside)
        distance = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        gradient = scale[None, :] * (gradient - average[None, :] - distance * slope[None, :])
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _place(rows, share, channels, COLUMNS: tl.constexpr):
    """This program's channels and which of them there are; its first row in the whole, and how many."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1).to(tl.int64) * share
    count = tl.minimum(rows - begin, share).to(tl.int32)
    return column, column < channels, tl.program_id(2).to(tl.int64) * rows + begin, count


@triton.jit
def _tile(row, left, column, known, channels, ROWS: tl.constexpr):
    """Where a tile's values lie, from a row on of which `left` remain, and which of them there are."""
    line = tl.arange(0, ROWS)
    at = row * channels + (line[:, None] * channels + column[None, :])
    return at, (line < left)[:, None] & known[None, :]


@triton.jit
def _load_gradient(grad_y, y, at, inside):
    gradient = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        gradient = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, gradient)
    return gradient


@triton.jit
def _store_part(parts, column, known, channels, one, other):
    chunks, views = tl.num_programs(1), tl.num_programs(2)
    at = parts + (tl.program_id(2) * chunks + tl.program_id(1)) * channels + column
    tl.store(at, one, mask=known)
    tl.store(at + views * chunks * channels, other, mask=known)


@triton.jit
def _add_moments(
    parts, view, column, known, rows, share, channels, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr
):
    """A view's mean and squared distances from it: of chunks' means from the first, and within chunks."""
    chunks, views = tl.num_programs(1), tl.num_programs(2)
    at = parts + view * chunks * channels + column
    pivot = tl.load(at, mask=known, other=0.0)
    total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    square = total
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & known[None, :]
        place = at[None, :] + chunk[:, None] * channels
        count = tl.minimum(rows - chunk.to(tl.int64) * share, share).to(tl.float32)[:, None]
        difference = tl.where(inside, tl.load(place, mask=inside, other=0.0) - pivot[None, :], 0.0)
        within = tl.load(place + views * chunks * channels, mask=inside, other=0.0)
        total += count * difference
        square += within + count * difference * difference
    offset = tl.sum(total, 0) / rows
    spread = tl.sum(square, 0) - offset * offset * rows
    return pivot + offset, tl.where(spread < 0, 0.0, spread)


@triton.jit
def _add_sums(parts, view, column, known, channels, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    chunks, views = tl.num_programs(1), tl.num_programs(2)
    one = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    other = one
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & known[None, :]
        place = parts + (view * chunks + chunk)[:, None] * channels + column[None, :]
        one += tl.load(place, mask=inside, other=0.0)
        other += tl.load(place + views * chunks * channels, mask=inside, other=0.0)
    return tl.sum(one, 0), tl.sum(other, 0)


@triton.jit
def _update_running(
    running_mean, running_var, momentum, parts, column, known, rows, share, channels,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One update a view, in view order."""
    average = tl.load(running_mean + column, mask=known, other=0.0)
    variance = tl.load(running_var + column, mask=known, other=0.0)
    for view in range(tl.num_programs(2)):
        mean, square = _add_moments(parts, view, column, known, rows, share, channels, COLUMNS, CHUNKS)
        average += momentum * (mean - average)
        variance += momentum * (square / (rows - 1) - variance)
    tl.store(running_mean + column, average, mask=known)
    tl.store(running_var + column, variance, mask=known)


@triton.jit
def _store_parameter_gradients(
    grad_weight, grad_bias, invstds, parts, column, known, channels,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Summed over the views, in view order."""
    of_weight = tl.zeros([COLUMNS], tl.float32)
    of_bias = of_weight
    for view in range(tl.num_programs(2)):
        total, product = _add_sums(parts, view, column, known, channels, COLUMNS, CHUNKS)
        of_weight += product * tl.load(invstds + view * channels + column, mask=known, other=0.0)
        of_bias += total
    tl.store(grad_weight + column, of_weight, mask=known)
    tl.store(grad_bias + column, of_bias, mask=known)

"""Compiled loops of the CPU: resampling, random fields and powers. Import this file only where it is used.

Each works on flat arrays and on a range of planes or samples, holds no lock of the interpreter, and leaves the
vector units full: where the processor must fetch voxels one by one, it does so into short rows, and computes on those.
What runs is machine code, where no coverage can be counted; tests compare it with plain torch and numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medssl.augment.jit import bits_of, compile_loop, copy, copy_pair, float_of, get, pair, put

_ROW_BLOCK = 1024  # voxels of a view that are made together
_BLOCK = 256  # hashes a pass, so that their values stay in the first cache
_STRIDE = 1 << 14  # numbers whose power is taken in one piece

_f32, _i32, _u64 = np.float32, np.int32, np.uint64
_HALF, _ZERO, _ONE = np.float32(0.5), np.float32(0.0), np.float32(1.0)
_SMALL, _LEAST_POWER, _MANTISSA = np.float32(2.0**-24), np.float32(-126.0), np.int32(0x7FFFFF)
_ROOT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
_GAMMA, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@compile_loop(contract=True)
def _walk(linear: Any, shift: Any, i: Any, j: Any, at: Any) -> None:  # pragma: no cover  compiled
    """Box coordinates of one row of the output, (3, row)."""
    for axis in range(3):
        start = _f32(linear[axis, 0] * i + linear[axis, 1] * j + shift[axis])
        step, row = _f32(linear[axis, 2]), at[axis]
        for k in range(row.size):
            put(row, k, start + step * _f32(k))


@compile_loop(contract=True)
def _knot(index: Any, num: Any, knots: Any) -> Any:  # pragma: no cover  compiled
    """The knots on both sides of an output voxel, and its distance from the lower one."""
    where = _f32(index * (knots - 1)) / _f32(max(num - 1, 1))
    low = min(int(where), max(knots - 2, 0))
    return low, min(low + 1, knots - 1), where - _f32(low)


@compile_loop(contract=True)
def _mix(low: Any, high: Any, share_of_high: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(out.size):
        put(out, k, get(low, k) + share_of_high * (get(high, k) - get(low, k)))


@compile_loop(contract=True)
def _bend(low: Any, high: Any, share_of_high: Any, at: Any, bent: Any) -> None:  # pragma: no cover  compiled
    for k in range(at.size):
        put(bent, k, get(at, k) + get(low, k) + share_of_high * (get(high, k) - get(low, k)))


@compile_loop(contract=True)
def _linear_places(  # noqa: PLR0917
    at: Any, sizes: Any, steps: Any, outside: Any, place: Any, part: Any
) -> None:  # pragma: no cover  compiled
    """First neighbour of each voxel, its distances to it, and how much of it lies inside the box where that counts."""
    num = place.size
    most_x, most_y, most_z = _f32(sizes[0] - 1), _f32(sizes[1] - 1), _f32(sizes[2] - 1)
    last_x, last_y, last_z = _i32(max(sizes[0] - 2, 0)), _i32(max(sizes[1] - 2, 0)), _i32(max(sizes[2] - 2, 0))
    step_x, step_y = _i32(steps[0]), _i32(steps[1])
    for k in range(num):
        x, y, z = get(at, k), get(at, num + k), get(at, 2 * num + k)
        u, v, w = min(max(x, _ZERO), most_x), min(max(y, _ZERO), most_y), min(max(z, _ZERO), most_z)
        first, second, third = min(_i32(u), last_x), min(_i32(v), last_y), min(_i32(w), last_z)
        put(place, k, _i32(first * step_x + second * step_y + third))
        put(part, k, u - _f32(first))
        put(part, num + k, v - _f32(second))
        put(part, 2 * num + k, w - _f32(third))
    if outside == _ZERO:
        return
    for k in range(num):
        x, y, z = get(at, k), get(at, num + k), get(at, 2 * num + k)
        u, v, w = min(max(x, _ZERO), most_x), min(max(y, _ZERO), most_y), min(max(z, _ZERO), most_z)
        kept_x, kept_y = max(_ONE - abs(x - u), _ZERO), max(_ONE - abs(y - v), _ZERO)
        put(part, 3 * num + k, kept_x * kept_y * max(_ONE - abs(z - w), _ZERO))


@compile_loop(contract=True)
def _nearest_places(at: Any, sizes: Any, steps: Any, outside: Any, place: Any) -> None:  # pragma: no cover  compiled
    """Nearest voxel, ``floor(c + 0.5)``; -1 outside the box where that counts."""
    num = place.size
    num_x, num_y, num_z = _f32(sizes[0]), _f32(sizes[1]), _f32(sizes[2])
    step_x, step_y = _i32(steps[0]), _i32(steps[1])
    for k in range(num):
        x, y, z = get(at, k) + _HALF, get(at, num + k) + _HALF, get(at, 2 * num + k) + _HALF
        u, v, w = min(max(x, _ZERO), num_x - _ONE), min(max(y, _ZERO), num_y - _ONE), min(max(z, _ZERO), num_z - _ONE)
        put(place, k, _i32(_i32(u) * step_x + _i32(v) * step_y + _i32(w)))
    if outside == _ZERO:
        return
    for k in range(num):
        x, y, z = get(at, k) + _HALF, get(at, num + k) + _HALF, get(at, 2 * num + k) + _HALF
        inside = (x >= _ZERO) & (x < num_x) & (y >= _ZERO) & (y < num_y) & (z >= _ZERO) & (z < num_z)
        if not inside:
            place[k] = -1


@compile_loop(contract=True)
def _fetch(box: Any, place: Any, step_x: Any, step_y: Any, rows: Any) -> None:  # pragma: no cover  compiled
    """The eight neighbours of each voxel, as four pairs."""
    a, b, c, d = rows
    for k in range(place.size):
        first = place[np.uintp(k)]
        copy_pair(box, first, a, k)
        copy_pair(box, _i32(first + step_y), b, k)
        copy_pair(box, _i32(first + step_x), c, k)
        copy_pair(box, _i32(first + step_x + step_y), d, k)


@compile_loop(contract=True)
def _fetch_labels(box: Any, place: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(place.size):
        copy(box, max(place[np.uintp(k)], _i32(0)), out, k)
    for k in range(place.size):
        if place[np.uintp(k)] < 0:
            out[np.uintp(k)] = 0


@compile_loop(contract=True)
def _blend(rows: Any, part: Any, window: Any, out: Any) -> None:  # pragma: no cover  compiled
    """Interpolate between the eight neighbours, then window."""
    num = out.size
    low, scale, least, most = window
    a, b, c, d = rows
    for k in range(num):
        x, y, z = get(part, k), get(part, num + k), get(part, 2 * num + k)
        a0, a1 = pair(a, k)
        b0, b1 = pair(b, k)
        c0, c1 = pair(c, k)
        d0, d1 = pair(d, k)
        ab, bb, cb, db = a0 + z * (a1 - a0), b0 + z * (b1 - b0), c0 + z * (c1 - c0), d0 + z * (d1 - d0)
        near, far = ab + y * (bb - ab), cb + y * (db - cb)
        value = (near + x * (far - near) - low) * scale
        put(out, k, least if value < least else (most if value > most else value))


@compile_loop(contract=True)
def _blend_filled(rows: Any, part: Any, fill: Any, window: Any, out: Any) -> None:  # pragma: no cover  compiled
    """The same with a value outside the box."""
    num = out.size
    low, scale, least, most = window
    a, b, c, d = rows
    for k in range(num):
        x, y, z, kept = get(part, k), get(part, num + k), get(part, 2 * num + k), get(part, 3 * num + k)
        a0, a1 = pair(a, k)
        b0, b1 = pair(b, k)
        c0, c1 = pair(c, k)
        d0, d1 = pair(d, k)
        ab, bb, cb, db = a0 + z * (a1 - a0), b0 + z * (b1 - b0), c0 + z * (c1 - c0), d0 + z * (d1 - d0)
        near, far = ab + y * (bb - ab), cb + y * (db - cb)
        value = near + x * (far - near)
        value = fill + kept * (value - fill) if kept > _ZERO else fill
        value = (value - low) * scale
        put(out, k, least if value < least else (most if value > most else value))


@compile_loop(contract=True)
def resample_planes(  # noqa: PLR0912, PLR0917  numba knows no keyword-only arguments
    box: Any,
    labels: Any,
    out: Any,
    out_labels: Any,
    samples: Any,
    to_box: Any,
    moves: Any,
    extent: Any,
    window: Any,
    fill: Any,
    outside: Any,
    start: Any,
    stop: Any,
) -> None:  # pragma: no cover  compiled
    """Resample planes ``start`` to ``stop`` of the samples that are listed; plane ``t`` is ``t % X`` of ``t // X``.

    Args:
        box: (b, c, X, Y, Z) int16, uint8 or float32, Z at least 2, below 2^31 voxels a channel.
        labels: (b, k, X, Y, Z) of unsigned numbers.
        out: (b, c, *shape) float32.
        out_labels: (b, k, *shape) of the type of ``labels``.
        samples: Indices of the samples.
        to_box: (b, 4, 4) float64, output voxel to box voxel.
        moves: (b, 3, K, L, shape[2]) float32: displacement in box voxels, spread along the last axis; K 0 for none.
        extent: (b, 3) voxels that count.
        window: (b, 4) float32: low, 1 / width, least and greatest output.
        fill: Value outside.
        outside: 1 where what lies outside is ``fill``, 0 where the border goes on.
        start: First plane.
        stop: Behind the last plane.
    """
    planes, num_rows, num = out.shape[2], out.shape[3], out.shape[4]
    block = min(num_rows, max(1, _ROW_BLOCK // num))  # rows that are done together
    most = block * num
    at_once, bent_once = np.empty(3 * most, np.float32), np.empty(3 * most, np.float32)
    place_once, part_once = np.empty(most, np.int32), np.empty(4 * most, np.float32)
    a, b = np.empty(2 * most, box.dtype), np.empty(2 * most, box.dtype)
    c, d = np.empty(2 * most, box.dtype), np.empty(2 * most, box.dtype)
    rows = (a, b, c, d)
    knots, lines = moves.shape[2], moves.shape[3]
    plane = np.empty((3, max(lines, 1), num), np.float32)
    steps = (box.shape[3] * box.shape[4], box.shape[4])
    for t in range(start, stop):
        sample, i = samples[t // planes], t % planes
        sizes = (extent[sample, 0], extent[sample, 1], extent[sample, 2])
        bounds = (window[sample, 0], window[sample, 1], window[sample, 2], window[sample, 3])
        step_x, step_y = _i32(steps[0] if sizes[0] > 1 else 0), _i32(steps[1] if sizes[1] > 1 else 0)
        if knots > 0:
            low, high, share_of_high = _knot(i, planes, knots)
            for axis in range(3):
                for line in range(lines):
                    ends = moves[sample, axis, low, line], moves[sample, axis, high, line]
                    _mix(ends[0], ends[1], share_of_high, plane[axis, line])
        for first in range(0, num_rows, block):
            count = min(block, num_rows - first)
            size = count * num
            at, place, part = at_once[: 3 * size], place_once[:size], part_once[: 4 * size]
            walked = at.reshape(3, size)
            for row in range(count):
                _walk(
                    to_box[sample, :3, :3],
                    to_box[sample, :3, 3],
                    i,
                    first + row,
                    walked[:, row * num : (row + 1) * num],
                )
            if knots > 0:
                bent = bent_once[: 3 * size]
                for row in range(count):
                    low, high, share_of_high = _knot(first + row, num_rows, lines)
                    for axis in range(3):
                        own = slice(axis * size + row * num, axis * size + (row + 1) * num)
                        _bend(plane[axis, low], plane[axis, high], share_of_high, at[own], bent[own])
                at = bent
            _linear_places(at, sizes, steps, outside, place, part)
            done = slice(first * num, first * num + size)
            for channel in range(box.shape[1]):
                _fetch(box[sample, channel].reshape(-1), place, step_x, step_y, rows)
                target = out[sample, channel, i].reshape(-1)[done]
                if outside == _ZERO:
                    _blend(rows, part, bounds, target)
                else:
                    _blend_filled(rows, part, fill, bounds, target)
            if labels.shape[1] > 0:
                _nearest_places(at, sizes, steps, outside, place)
                for channel in range(labels.shape[1]):
                    target_labels = out_labels[sample, channel, i].reshape(-1)[done]
                    _fetch_labels(labels[sample, channel].reshape(-1), place, target_labels)


@compile_loop(contract=False)
def _hash(value: Any) -> Any:  # pragma: no cover  compiled
    """The finaliser of SplitMix64."""
    value = (value ^ (value >> _u64(30))) * _FIRST
    value = (value ^ (value >> _u64(27))) * _SECOND
    return value ^ (value >> _u64(31))


@compile_loop(contract=False)
def _hashes(base: Any, first: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(out.size):
        put(out, k, _hash(base + (_u64(first + k) + _u64(1)) * _GAMMA))


@compile_loop(contract=False)
def _add(x: Any, sigma: Any, noise: Any, out: Any) -> None:  # pragma: no cover  compiled
    """Two roundings, as on a device: no fused multiply-add."""
    for k in range(out.size):
        put(out, k, get(x, k) + sigma * get(noise, k))


@compile_loop(contract=False)
def add_normal_blocks(  # noqa: PLR0917
    x: Any, bases: Any, sigma: Any, table: Any, out: Any, start: Any, stop: Any
) -> None:  # pragma: no cover  compiled
    """Give ``x + sigma * n`` for blocks of 1024 numbers; a hash gives four of them.

    Args:
        x: (b, n) float32.
        bases: (b,) uint64, the scrambled seeds.
        sigma: (b,) float32.
        table: (65536,) float32, the quantiles.
        out: (b, n) float32.
        start: First block; block ``t`` is ``t % B`` of sample ``t // B`` with ``B = ceil(n / 1024)``.
        stop: Behind the last block.
    """
    num = x.shape[1]
    blocks = (num + 4 * _BLOCK - 1) // (4 * _BLOCK)
    hashes, noise = np.empty(_BLOCK, np.uint64), np.empty(4 * _BLOCK, np.float32)
    for t in range(start, stop):
        sample, first = t // blocks, t % blocks * 4 * _BLOCK
        _hashes(bases[sample], first // 4, hashes)
        for k in range(_BLOCK):
            value = hashes[k]
            for lane in range(4):
                noise[4 * k + lane] = table[(value >> _u64(16 * lane)) & _u64(0xFFFF)]
        last = min(first + 4 * _BLOCK, num)
        _add(x[sample, first:last], sigma[sample], noise[: last - first], out[sample, first:last])


@compile_loop(contract=False)
def uniform_blocks(bases: Any, out: Any, start: Any, stop: Any) -> None:  # pragma: no cover  compiled
    """Give numbers in [0, 1) for blocks of 512, two a hash, of 24 bits each; arguments as above."""
    num = out.shape[1]
    blocks = (num + 2 * _BLOCK - 1) // (2 * _BLOCK)
    hashes = np.empty(_BLOCK, np.uint64)
    for t in range(start, stop):
        sample, first = t // blocks, t % blocks * 2 * _BLOCK
        _hashes(bases[sample], first // 2, hashes)
        for k in range(min(2 * _BLOCK, num - first)):
            bits = (hashes[k >> 1] >> _u64(8 + 32 * (k & 1))) & _u64(0xFFFFFF)
            out[sample, first + k] = _f32(bits) * _f32(2.0**-24)


@compile_loop(contract=True)
def _log2(value: Any) -> Any:  # pragma: no cover  compiled
    """Logarithm of a positive number, by the polynomial of Cephes' ``logf`` between the roots of 1/2 and 2."""
    bits = _i32(bits_of(value) - _ROOT_HALF)
    f = float_of(_i32(_i32(bits & _MANTISSA) + _ROOT_HALF)) - _ONE
    p = _f32(7.0376836292e-2) * f - _f32(1.1514610310e-1)
    p = (p * f + _f32(1.1676998740e-1)) * f - _f32(1.2420140846e-1)
    p = (p * f + _f32(1.4249322787e-1)) * f - _f32(1.6668057665e-1)
    p = (p * f + _f32(2.0000714765e-1)) * f - _f32(2.4999993993e-1)
    natural = (p * f + _f32(3.3333331174e-1)) * f * f * f - _HALF * f * f + f
    return _f32(_i32(bits >> _i32(23))) + natural * _f32(1.4426950408889634)


@compile_loop(contract=True)
def _exp2(value: Any) -> Any:  # pragma: no cover  compiled
    """Power of 2 of a number from -126 to 127, by the polynomial of Cephes' ``exp2f``."""
    near = np.floor(value + _HALF)
    r = value - near
    p = (_f32(1.535336188319500e-4) * r + _f32(1.339887440266574e-3)) * r + _f32(9.618437357674640e-3)
    p = (p * r + _f32(5.550332471162809e-2)) * r + _f32(2.402264791363012e-1)
    p = (p * r + _f32(6.931472028550421e-1)) * r + _ONE
    return p * float_of(_i32(_i32(_i32(near) + _i32(127)) << _i32(23)))


@compile_loop(contract=True)
def _power(x: Any, low: Any, span: Any, exponent: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(out.size):
        share_of_span = min((get(x, k) - low) / span, _ONE)
        power = _exp2(max(exponent * _log2(share_of_span), _LEAST_POWER))
        put(out, k, low + span * (power if share_of_span > _ZERO else _ZERO))


@compile_loop(contract=True)
def power_blocks(  # noqa: PLR0917
    x: Any, low: Any, span: Any, exponent: Any, out: Any, start: Any, stop: Any
) -> None:  # pragma: no cover  compiled
    """Give ``low + span * ((x - low) / span) ** exponent`` for blocks of 16384 numbers.

    Args:
        x: (r, n) float32, not below ``low``.
        low: (r,) float32.
        span: (r,) float32, above 0.
        exponent: (r,) float32, above 0.
        out: (r, n) float32.
        start: First block; block ``t`` is ``t % B`` of row ``t // B`` with ``B = ceil(n / 16384)``.
        stop: Behind the last block.
    """
    num = x.shape[1]
    blocks = (num + _STRIDE - 1) // _STRIDE
    for t in range(start, stop):
        row, first = t // blocks, t % blocks * _STRIDE
        last = min(first + _STRIDE, num)
        _power(x[row, first:last], low[row], span[row], exponent[row], out[row, first:last])

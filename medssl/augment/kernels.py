"""Compiled loops of the CPU: resampling from stored voxels, and random fields. Import this file only where it is used.

Each works on flat arrays and on a range of planes or samples, holds no lock of the interpreter, and leaves the
vector units full: where the processor must fetch voxels one by one, it does so into short rows, and computes on those.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

_instruction: Callable[[Callable[..., Any]], Any] = intrinsic

_LEAST_WORK = 1 << 16  # voxels a thread; below, starting it costs more than it saves
_BLOCK = 256  # hashes a pass, so that their values stay in the first cache

_f32, _i32, _u64 = np.float32, np.int32, np.uint64
_HALF, _ZERO, _ONE = np.float32(0.5), np.float32(0.0), np.float32(1.0)
_GAMMA, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def share(work: Callable[[int, int], None], num: int, *, voxels: int) -> None:
    """Run ``work(start, stop)`` over ``num`` things, on as many threads as torch may use.

    Args:
        work: Holds no lock of the interpreter; its ranges never touch the same output.
        num: Planes or samples.
        voxels: Size of all things together; little work stays on the calling thread, as it does in a loader's worker.
    """
    threads = min(torch.get_num_threads(), num, voxels // _LEAST_WORK)
    if threads <= 1:
        work(0, num)
        return
    cuts = [num * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def _compiled(*, contract: bool) -> Callable[[F], F]:
    """Compile at the first call and keep the machine code on disk; ``contract`` allows fused multiply-add."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"} if contract else False}

    def wrap(function: F) -> F:
        try:
            return cast(F, numba.njit(cache=True, **options)(function))
        except RuntimeError:  # no folder that this user may write to
            return cast(F, numba.njit(**options)(function))

    return wrap


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:  # pragma: no cover
    """Address of an element, without the sign check of Python's indices."""
    struct = context.make_array(array_type)(context, builder, array)
    if index.type.width < 64:
        index = builder.sext(index, ir.IntType(64))
    return builder.gep(struct.data, [index])


def _outputs(builder: Any) -> Any:  # pragma: no cover
    """Mark of a store that no marked load can see, without which the compiler does not vectorise."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "medssl")])
    return module.add_metadata([module.add_metadata([ir.MetaDataString(module, "medssl outputs"), domain])])


@_instruction
def _get(_typing: Any, array: Any, index: Any) -> Any:  # pragma: no cover
    """``array[index]`` of an array that the loop does not write."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[0], args[0], args[1]))
        value.set_metadata("noalias", _outputs(builder))
        return value

    return array.dtype(array, index), generate


@_instruction
def _put(_typing: Any, array: Any, index: Any, _value: Any) -> Any:  # pragma: no cover
    """``array[index] = value`` of an array that the loop does not read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store = builder.store(args[2], _place(context, builder, signature.args[0], args[0], args[1]))
        store.set_metadata("alias.scope", _outputs(builder))
        return context.get_dummy_value()

    return numba.types.void(array, index, array.dtype), generate


@_instruction
def _copy(_typing: Any, array: Any, index: Any, target: Any, place: Any) -> Any:  # pragma: no cover
    """``target[place] = array[index]``, one voxel at a time."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[0], args[0], args[1]))
        builder.store(value, _place(context, builder, signature.args[2], args[2], args[3]))
        return context.get_dummy_value()

    return numba.types.void(array, index, target, place), generate


@_instruction
def _copy_pair(_typing: Any, array: Any, index: Any, target: Any, place: Any) -> Any:  # pragma: no cover
    """``target[2 * place : 2 * place + 2] = array[index : index + 2]`` as one word."""
    bits = array.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(2 * bits).as_pointer()
        source = builder.bitcast(_place(context, builder, signature.args[0], args[0], args[1]), word)
        twice = builder.shl(args[3], args[3].type(1))
        goal = builder.bitcast(_place(context, builder, signature.args[2], args[2], twice), word)
        value = builder.load(source)
        value.align = bits // 8
        builder.store(value, goal).align = bits // 8
        return context.get_dummy_value()

    return numba.types.void(array, index, target, place), generate


@_instruction
def _pair(_typing: Any, array: Any, place: Any) -> Any:  # pragma: no cover
    """Both values that :func:`_copy_pair` has put at ``place``, as float32."""
    dtype = array.dtype
    bits = dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        twice = builder.shl(args[1], args[1].type(1))
        first = _place(context, builder, signature.args[0], args[0], twice)
        if isinstance(dtype, numba.types.Float):
            second = builder.gep(first, [ir.IntType(64)(1)])
            values = [builder.load(first), builder.load(second)]
            for value in values:
                value.set_metadata("noalias", _outputs(builder))
        else:
            word = builder.load(builder.bitcast(first, ir.IntType(2 * bits).as_pointer()))
            word.align = bits // 8
            word.set_metadata("noalias", _outputs(builder))
            up = word.type(bits)
            if dtype.signed:
                halves = [builder.ashr(builder.shl(word, up), up), builder.ashr(word, up)]
                values = [builder.sitofp(half, ir.FloatType()) for half in halves]
            else:
                halves = [builder.lshr(builder.shl(word, up), up), builder.lshr(word, up)]
                values = [builder.uitofp(half, ir.FloatType()) for half in halves]
        return context.make_tuple(builder, signature.return_type, values)

    both: Any = numba.types.UniTuple
    return both(numba.types.float32, 2)(array, place), generate


@_compiled(contract=True)
def _walk(linear: Any, shift: Any, i: Any, j: Any, at: Any) -> None:  # pragma: no cover  compiled
    """Box coordinates of one row of the output."""
    num = at.size // 3
    for axis in range(3):
        start = _f32(linear[axis, 0] * i + linear[axis, 1] * j + shift[axis])
        step = _f32(linear[axis, 2])
        for k in range(num):
            _put(at, axis * num + k, start + step * _f32(k))


@_compiled(contract=True)
def _knot(index: Any, num: Any, knots: Any) -> Any:  # pragma: no cover  compiled
    """The knots on both sides of an output voxel, and its distance from the lower one."""
    where = _f32(index * (knots - 1)) / _f32(max(num - 1, 1))
    low = min(int(where), max(knots - 2, 0))
    return low, min(low + 1, knots - 1), where - _f32(low)


@_compiled(contract=True)
def _mix(low: Any, high: Any, share_of_high: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(out.size):
        _put(out, k, _get(low, k) + share_of_high * (_get(high, k) - _get(low, k)))


@_compiled(contract=True)
def _bend(low: Any, high: Any, share_of_high: Any, at: Any, bent: Any) -> None:  # pragma: no cover  compiled
    for k in range(at.size):
        _put(bent, k, _get(at, k) + _get(low, k) + share_of_high * (_get(high, k) - _get(low, k)))


@_compiled(contract=True)
def _linear_places(  # noqa: PLR0917
    at: Any, sizes: Any, steps: Any, outside: Any, place: Any, part: Any
) -> None:  # pragma: no cover  compiled
    """First neighbour of each voxel, its distances to it, and how much of it lies inside the box."""
    num = place.size
    most_x, most_y, most_z = _f32(sizes[0] - 1), _f32(sizes[1] - 1), _f32(sizes[2] - 1)
    last_x, last_y, last_z = _i32(max(sizes[0] - 2, 0)), _i32(max(sizes[1] - 2, 0)), _i32(max(sizes[2] - 2, 0))
    step_x, step_y = _i32(steps[0]), _i32(steps[1])
    for k in range(num):
        x, y, z = _get(at, k), _get(at, num + k), _get(at, 2 * num + k)
        u, v, w = min(max(x, _ZERO), most_x), min(max(y, _ZERO), most_y), min(max(z, _ZERO), most_z)
        first, second, third = min(_i32(u), last_x), min(_i32(v), last_y), min(_i32(w), last_z)
        _put(place, k, _i32(first * step_x + second * step_y + third))
        _put(part, k, u - _f32(first))
        _put(part, num + k, v - _f32(second))
        _put(part, 2 * num + k, w - _f32(third))
        kept_x, kept_y = max(_ONE - outside * abs(x - u), _ZERO), max(_ONE - outside * abs(y - v), _ZERO)
        _put(part, 3 * num + k, kept_x * kept_y * max(_ONE - outside * abs(z - w), _ZERO))


@_compiled(contract=True)
def _nearest_places(at: Any, sizes: Any, steps: Any, outside: Any, place: Any) -> None:  # pragma: no cover  compiled
    """Nearest voxel, ``floor(c + 0.5)``; -1 outside the box where that counts."""
    num = place.size
    num_x, num_y, num_z = _f32(sizes[0]), _f32(sizes[1]), _f32(sizes[2])
    step_x, step_y = _i32(steps[0]), _i32(steps[1])
    goes_on = outside == _ZERO
    for k in range(num):
        x, y, z = _get(at, k) + _HALF, _get(at, num + k) + _HALF, _get(at, 2 * num + k) + _HALF
        u, v, w = min(max(x, _ZERO), num_x - _ONE), min(max(y, _ZERO), num_y - _ONE), min(max(z, _ZERO), num_z - _ONE)
        inside = (x >= _ZERO) & (x < num_x) & (y >= _ZERO) & (y < num_y) & (z >= _ZERO) & (z < num_z)
        index = _i32(_i32(u) * step_x + _i32(v) * step_y + _i32(w))
        _put(place, k, index if inside | goes_on else _i32(-1))


@_compiled(contract=True)
def _fetch(box: Any, place: Any, step: Any, row: Any) -> None:  # pragma: no cover  compiled
    for k in range(place.size):
        _copy_pair(box, _i32(place[np.uintp(k)] + step), row, k)


@_compiled(contract=True)
def _fetch_labels(box: Any, place: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(place.size):
        index = place[np.uintp(k)]
        if index >= 0:
            _copy(box, index, out, k)
        else:
            out[np.uintp(k)] = 0


@_compiled(contract=True)
def _blend(rows: Any, part: Any, fill: Any, window: Any, out: Any) -> None:  # pragma: no cover  compiled
    """Interpolate between the eight neighbours, then window."""
    num = out.size
    low, scale, least, most = window
    a, b, c, d = rows
    for k in range(num):
        x, y, z, kept = _get(part, k), _get(part, num + k), _get(part, 2 * num + k), _get(part, 3 * num + k)
        a0, a1 = _pair(a, k)
        b0, b1 = _pair(b, k)
        c0, c1 = _pair(c, k)
        d0, d1 = _pair(d, k)
        ab, bb, cb, db = a0 + z * (a1 - a0), b0 + z * (b1 - b0), c0 + z * (c1 - c0), d0 + z * (d1 - d0)
        near, far = ab + y * (bb - ab), cb + y * (db - cb)
        value = near + x * (far - near)
        value = fill + kept * (value - fill) if kept > _ZERO else fill
        value = (value - low) * scale
        _put(out, k, least if value < least else (most if value > most else value))


@_compiled(contract=True)
def resample_planes(  # noqa: PLR0917  numba knows no keyword-only arguments
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
    at, bent = np.empty(3 * num, np.float32), np.empty(3 * num, np.float32)
    place, part = np.empty(num, np.int32), np.empty(4 * num, np.float32)
    a, b = np.empty(2 * num, box.dtype), np.empty(2 * num, box.dtype)
    c, d = np.empty(2 * num, box.dtype), np.empty(2 * num, box.dtype)
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
        for j in range(num_rows):
            _walk(to_box[sample, :3, :3], to_box[sample, :3, 3], i, j, at)
            if knots > 0:
                low, high, share_of_high = _knot(j, num_rows, lines)
                for axis in range(3):
                    row = slice(axis * num, (axis + 1) * num)
                    _bend(plane[axis, low], plane[axis, high], share_of_high, at[row], bent[row])
                at, bent = bent, at
            _linear_places(at, sizes, steps, outside, place, part)
            for channel in range(box.shape[1]):
                voxels = box[sample, channel].reshape(-1)
                _fetch(voxels, place, _i32(0), a)
                _fetch(voxels, place, step_y, b)
                _fetch(voxels, place, step_x, c)
                _fetch(voxels, place, _i32(step_x + step_y), d)
                _blend((a, b, c, d), part, fill, bounds, out[sample, channel, i, j])
            if labels.shape[1] > 0:
                _nearest_places(at, sizes, steps, outside, place)
                for channel in range(labels.shape[1]):
                    _fetch_labels(labels[sample, channel].reshape(-1), place, out_labels[sample, channel, i, j])


@_compiled(contract=False)
def _hash(value: Any) -> Any:  # pragma: no cover  compiled
    """The finaliser of SplitMix64."""
    value = (value ^ (value >> _u64(30))) * _FIRST
    value = (value ^ (value >> _u64(27))) * _SECOND
    return value ^ (value >> _u64(31))


@_compiled(contract=False)
def _hashes(base: Any, first: Any, out: Any) -> None:  # pragma: no cover  compiled
    for k in range(out.size):
        _put(out, k, _hash(base + (_u64(first + k) + _u64(1)) * _GAMMA))


@_compiled(contract=False)
def _add(x: Any, sigma: Any, noise: Any, out: Any) -> None:  # pragma: no cover  compiled
    """Two roundings, as on a device: no fused multiply-add."""
    for k in range(out.size):
        _put(out, k, _get(x, k) + sigma * _get(noise, k))


@_compiled(contract=False)
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


@_compiled(contract=False)
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

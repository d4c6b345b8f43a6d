"""How the loops of the CPU are compiled, and the few instructions that Numba has no words for.

Import this file only from those loops, for Numba is slow to load. The instructions run only while the compiler does,
and not at all where its result is on disk already: no coverage is counted in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

_instruction: Callable[[Callable[..., Any]], Any] = intrinsic


def compile_loop(*, contract: bool) -> Callable[[F], F]:
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
def get(_typing: Any, array: Any, index: Any) -> Any:  # pragma: no cover
    """``array[index]`` of an array that the loop does not write."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[0], args[0], args[1]))
        value.set_metadata("noalias", _outputs(builder))
        return value

    return array.dtype(array, index), generate


@_instruction
def put(_typing: Any, array: Any, index: Any, _value: Any) -> Any:  # pragma: no cover
    """``array[index] = value`` of an array that the loop does not read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store = builder.store(args[2], _place(context, builder, signature.args[0], args[0], args[1]))
        store.set_metadata("alias.scope", _outputs(builder))
        return context.get_dummy_value()

    return numba.types.void(array, index, array.dtype), generate


@_instruction
def copy(_typing: Any, array: Any, index: Any, target: Any, place: Any) -> Any:  # pragma: no cover
    """``target[place] = array[index]``, one voxel at a time."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[0], args[0], args[1]))
        builder.store(value, _place(context, builder, signature.args[2], args[2], args[3]))
        return context.get_dummy_value()

    return numba.types.void(array, index, target, place), generate


@_instruction
def copy_pair(_typing: Any, array: Any, index: Any, target: Any, place: Any) -> Any:  # pragma: no cover
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
def pair(_typing: Any, array: Any, place: Any) -> Any:  # pragma: no cover
    """Both values that :func:`copy_pair` has put at ``place``, as float32."""
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


@_instruction
def bits_of(_typing: Any, value: Any) -> Any:  # pragma: no cover
    """The 32 bits of a float32, as int32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return numba.types.int32(value), generate


@_instruction
def float_of(_typing: Any, bits: Any) -> Any:  # pragma: no cover
    """The float32 of 32 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return numba.types.float32(bits), generate

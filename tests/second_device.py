"""A pretended second device, for machines without one: its tensors say that they lie elsewhere, and compute on the CPU.

Code that asks where a tensor is takes the way of a device, with true values. What a CUDA device would refuse is refused
(operands on two devices), what would hold the CPU up is counted, and products of matrices round their factors to TF32.

``torch._subclasses.FakeTensorMode`` knows devices too, but has no values, so that nothing which looks at one runs, and
cannot index on a torch without CUDA.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_TO_COPY, _COPY = _aten._to_copy.default, _aten.copy_.default
_INDEXINGS = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_PRODUCTS = {_aten.addmm.default, _aten.baddbmm.default, _aten.bmm.default, _aten.mm.default}
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten._unique2.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}


class _Elsewhere(Tensor):
    """A tensor of the second device; ``values`` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Elsewhere:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the second device, outside of it")


class SecondDevice(TorchDispatchMode):
    """While entered, tensors can be put on the second device and computed with.

    Attributes:
        waits: Places in medssl, and operations there, that make the CPU wait for the device, with how often.
        doubles: The like for operations that give double precision on the device, with the most numbers.
        launches: Operations on the device; views are counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.doubles: dict[str, int] = {}
        self.launches = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the second device."""
        return _Elsewhere(tensor.clone())

    def take(self, tensor: Tensor) -> Tensor:
        """The values of a tensor of the second device; refuses one that is not."""
        assert isinstance(tensor, _Elsewhere), "a result was left on the CPU"
        return tensor.values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if any(value.device == DEVICE and not isinstance(value, _Elsewhere) for value in tensors):
            raise RuntimeError(
                f"{_place(func)}: torch.tensor(..., device=) waits for its copy; use torch.arange or .to"
            )
        known = {id(value.values): value for value in tensors if isinstance(value, _Elsewhere)}
        target = self._target(func, args, kwargs, bool(known))
        if target != DEVICE and not known:
            return func(*args, **kwargs)
        self._look(func, args, kwargs, tensors, target)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        values = _rounded if func in _PRODUCTS else _values
        out = func(*tree_map(values, args), **tree_map(values, kwargs))
        if any(there.shape != there.values.shape for there in known.values()):
            raise NotImplementedError(f"{_place(func)}: a change of shape in place")
        if func is _TO_COPY:
            out = out.clone()
        if func is _COPY:
            return args[0]
        return tree_map(lambda value: known.get(id(value), _wrapped(value)), out) if target == DEVICE else out

    def _target(self, func: Any, args: Any, kwargs: dict[str, Any], is_there: bool) -> torch.device:
        """Where the result lies."""
        asked = args[0].device if func is _COPY else kwargs.get("device")
        return torch.device(asked) if asked is not None else DEVICE if is_there else torch.device("cpu")

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], target: torch.device) -> None:
        """Refuse what a device refuses, and count what it must be waited for."""
        here = [value for value in tensors if not isinstance(value, _Elsewhere)]
        self.launches += 1
        if func in {_TO_COPY, _COPY}:
            is_blocking = not (kwargs.get("non_blocking") or (func is _COPY and len(args) > 2 and args[2]))
            if target.type == "cpu" or (here and is_blocking):
                self.waits[_place(func)] += 1
            is_double = target == DEVICE and (kwargs.get("dtype") or args[0].dtype) == torch.float64
            self._book_double(func, is_double, args[0].numel())
            return
        takes_numbers = torch.Tag.pointwise in func.tags or func in _INDEXINGS
        if any(value.ndim > 0 or not takes_numbers for value in here):
            raise RuntimeError(f"{_place(func)}: operands on the CPU and on the device")
        if func in _WAITS or (func in _INDEXINGS and _counts_true(args)):
            self.waits[_place(func)] += 1
        for value in tensors:
            self._book_double(func, value.dtype == torch.float64, value.numel())

    def _book_double(self, func: Any, is_double: bool, size: int) -> None:
        if is_double and size > 1:
            place = _place(func)
            self.doubles[place] = max(self.doubles.get(place, 0), size)


def _wrapped(value: Any) -> Any:
    return _Elsewhere(value) if isinstance(value, Tensor) else value


def _values(value: Any) -> Any:
    return value.values if isinstance(value, _Elsewhere) else value


def _rounded(value: Any) -> Any:
    """A factor of a product as TF32 takes it: 10 bits behind the leading one."""
    value = _values(value)
    if not isinstance(value, Tensor) or value.dtype not in {torch.float32, torch.complex64}:
        return value
    bits = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).contiguous().view(torch.int32)
    rounded = ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)
    return torch.view_as_complex(rounded) if value.is_complex() else rounded


def _counts_true(args: Any) -> bool:
    """Whether an index is a mask of which the device must count the true values; one number is just filled in."""
    is_masked = any(index is not None and index.dtype == torch.bool for index in args[1])
    return is_masked and not (len(args) > 2 and args[2].numel() == 1)


def _place(func: Any) -> str:
    """The operation, and the last line of medssl that asked for it."""
    ours = [frame for frame in traceback.extract_stack() if f"{Path('medssl')}/" in frame.filename]
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-1:]]
    return " ".join([*where, str(func)])

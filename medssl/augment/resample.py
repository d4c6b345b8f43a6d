"""One interpolation a view: from stored voxels, through an affine map, a displacement and a window, to float32."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from medssl.augment.threads import share
from medssl.errors import GeometryError

_KERNEL_TYPES = {torch.int16, torch.uint8, torch.float32}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}  # torch moves these
_MOST_VOXELS = 2**31 - 1  # of a channel, for the kernels count in 32 bits
_VOXELS_AT_ONCE = 1 << 23  # on a device, where places take about 100 bytes a voxel for the moment

Window = tuple[Float32[Tensor, " b"], Float32[Tensor, " b"]]


def resample(
    x: Shaped[Tensor, "b c *box"],
    to_box: Float64[Tensor, "b n n"],
    *,
    shape: Sequence[int],
    displacement: Float32[Tensor, "b d *knots"] | None = None,
    extent: Int64[Tensor, "b d"] | None = None,
    fill: float | None = None,
    label: Shaped[Tensor, "b k *box"] | None = None,
    window: Window | None = None,
) -> tuple[Float32[Tensor, "b c *s"], Shaped[Tensor, "b k *s"] | None]:
    """Read a crop from each box: images linearly, labels by nearest neighbour, in one pass.

    ``out[v] = box[to_box · v + displacement(v)]``, then ``clamp((out - low) / (high - low), 0, 1)``. A sample whose
    map only moves indices (mirrors and whole-number shifts) is cut out, and keeps its values bit for bit. On the CPU
    a compiled kernel reads the stored type; elsewhere, and without numba, ``grid_sample`` gives the same to 1e-4.

    Args:
        x: Boxes of int16, uint8, int32, float16 or float32, in 2D or 3D; never changed.
        to_box: Homogeneous map of output voxel indices to box voxel indices, on the CPU.
        shape: Voxels of the crops.
        displacement: Added to the place in the box, in box voxels, on the CPU. Knots lie evenly, the outer ones at
            the corner voxels of the crop; linear in between.
        extent: Voxels of each box that count, on the CPU; those behind are as if they were not there.
        fill: Value outside the box, where labels are 0; None extends the border.
        label: Label maps on the grid of the boxes, of any whole-number type, which they keep.
        window: Lower and upper bound for each sample; None leaves the values.

    Returns:
        Crops and their labels; the label is None if none was given.

    Raises:
        GeometryError: if the label lies on another grid, an extent is not in its box, or a map or displacement is not
            finite.
    """
    plain = label if label is None else label.view(_SIGNED.get(label.dtype, label.dtype))
    boxes = _Boxes(x, plain, to_box, displacement, extent, fill, window, tuple(shape))
    boxes.check()
    by_index = boxes.moved_by_index()
    if bool(by_index.all()) and boxes.is_still():
        return x, label
    out = torch.empty((*x.shape[:2], *shape), dtype=torch.float32, device=x.device)
    moved = None if plain is None else plain.new_empty((*plain.shape[:2], *shape))
    for sample in by_index.nonzero()[:, 0].tolist():
        _cut(boxes, sample, out, moved)
    rows = (~by_index).nonzero()[:, 0]
    if len(rows):
        fits = x[0, 0].numel() <= _MOST_VOXELS
        on_cpu = x.device.type == "cpu" and fits and compiled() is not None
        if on_cpu:
            _on_cpu(boxes, rows, out, moved)
        else:
            for part in torch.split(rows, max(1, _VOXELS_AT_ONCE // math.prod(shape))):
                _on_device(boxes, part, out, moved)
    return out, moved if moved is None or label is None else moved.view(label.dtype)


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled kernels, loaded at the first use; None where numba is missing."""
    try:
        return importlib.import_module("medssl.augment.kernels")
    except ImportError:
        return None


@dataclass(frozen=True)
class _Boxes:
    """The arguments of :func:`resample`."""

    x: Tensor
    label: Tensor | None
    to_box: Tensor
    displacement: Tensor | None
    extent: Tensor | None
    fill: float | None
    window: Window | None
    shape: tuple[int, ...]

    @property
    def dims(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        """Refuse what would read beyond a box."""
        lengths = tuple(self.x.shape[2:])
        if self.label is not None and tuple(self.label.shape[2:]) != lengths:
            raise GeometryError(
                f"resample: a label of {tuple(self.label.shape[2:])} voxels for an image of {lengths}. "
                "Cut both from one grid."
            )
        sizes = self.sizes()
        if bool(((sizes < 1) | (sizes > torch.tensor(lengths))).any()):
            raise GeometryError(
                f"resample: an extent outside 1 to {lengths} voxels of the boxes. Give the voxels that each box holds."
            )
        moves = self.displacement
        if not bool(self.to_box.isfinite().all()) or (moves is not None and not bool(moves.isfinite().all())):
            raise GeometryError(
                "resample: a map or displacement is not finite. Look for a spacing of 0 or a wrong option."
            )

    def sizes(self) -> Int64[Tensor, "b d"]:
        """Voxels of each box that count."""
        if self.extent is not None:
            return self.extent
        return torch.tensor(self.x.shape[2:]).expand(len(self.x), -1)

    def moved_by_index(self) -> Bool[Tensor, " b"]:
        """Which maps mirror and shift by whole voxels only, but for the rounding of their composition."""
        linear, shift = self.to_box[:, :-1, :-1], self.to_box[:, :-1, -1]
        signs = torch.diagonal(linear, dim1=1, dim2=2).sign()
        square = (linear - torch.diag_embed(signs)).abs().flatten(1).amax(1) < 1e-9
        whole = (shift - shift.round()).abs().amax(1) < 1e-6
        chosen = square & whole & (signs != 0).all(1)
        return chosen if self.displacement is None else chosen & ~self.displacement.flatten(1).any(1)

    def is_still(self) -> bool:
        """Whether the crops are the boxes, of maps that move by index."""
        same = self.x.shape[2:] == self.shape and self.x.dtype == torch.float32 and self.window is None
        whole = bool((self.sizes() == torch.tensor(self.x.shape[2:])).all())
        return same and whole and bool((self.to_box.round() == torch.eye(self.dims + 1, dtype=torch.float64)).all())


def _cut(boxes: _Boxes, sample: int, out: Tensor, moved: Tensor | None) -> None:
    """One sample by slices and flips."""
    linear = boxes.to_box[sample].round().long()
    signs, shifts = torch.diagonal(linear)[:-1].tolist(), linear[:-1, -1].tolist()
    sizes = boxes.sizes()[sample].tolist()
    for source, target, fill in (
        (boxes.x, out, boxes.fill),
        (boxes.label, moved, 0 if boxes.fill is not None else None),
    ):
        if source is None or target is None:
            continue
        row, beyond = source[sample], []
        for axis, (sign, shift, size, num) in enumerate(zip(signs, shifts, sizes, boxes.shape, strict=True), start=1):
            least = min(shift, shift + sign * (num - 1))
            if least >= 0 and least + num <= size:
                row = row.narrow(axis, least, num)
                row = row if sign > 0 else row.flip(axis)
                continue
            index = shift + sign * torch.arange(num)
            kept = index.clamp(0, size - 1)
            row = row.index_select(axis, kept.to(row.device, non_blocking=True))
            beyond.append((axis, (index != kept).nonzero()[:, 0].to(row.device, non_blocking=True)))
        target[sample] = row
        for axis, index in beyond:
            if fill is not None:
                target[sample].index_fill_(axis, index, fill)
    if boxes.window is not None:
        low, high = (bound[sample] for bound in boxes.window)  # single numbers, which go along with a kernel
        out[sample].sub_(low).div_(high - low).clamp_(0, 1)


def _on_device(boxes: _Boxes, rows: Int64[Tensor, " r"], out: Tensor, moved: Tensor | None) -> None:
    """By ``grid_sample``, some samples at once.

    Places are sums of one vector an axis, not a product of matrices, which a device may round to 10 bits.
    """
    device, dims, lengths = boxes.x.device, boxes.dims, boxes.x.shape[2:]
    to_box, chosen = boxes.to_box[rows], rows.to(device, non_blocking=True)
    at = _wide(to_box[:, :-1, -1].float().to(device, non_blocking=True), dims)
    for axis, num in enumerate(boxes.shape):
        steps = to_box[:, :-1, axis, None] * torch.arange(num, dtype=torch.float64)
        sides = [num if other == axis else 1 for other in range(dims)]
        at = at + steps.float().to(device, non_blocking=True).reshape(len(rows), dims, *sides)
    if boxes.displacement is not None:
        knots, mode = boxes.displacement[rows].to(device, non_blocking=True), "bilinear" if dims == 2 else "trilinear"
        at = at + F.interpolate(knots, size=boxes.shape, mode=mode, align_corners=True)
    most = _wide((boxes.sizes()[rows] - 1).float().to(device, non_blocking=True), dims)
    inside = at.clamp(min=0).minimum(most)
    scale = _wide(torch.tensor([lengths], dtype=torch.float32).to(device, non_blocking=True), dims)
    grid = ((2 * inside + 1) / scale - 1).flip(1).movedim(1, -1)
    box = boxes.x[chosen].float()
    image = F.grid_sample(box, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if boxes.fill is not None:
        kept = (1 - (at - inside).abs()).clamp_(min=0).prod(1, keepdim=True)
        image = torch.where(kept > 0, boxes.fill + kept * (image - boxes.fill), boxes.fill)
    if boxes.window is not None:
        low, high = (_wide(bound[rows, None].to(device, non_blocking=True), dims) for bound in boxes.window)
        image = image.sub_(low).div_(high - low).clamp_(0, 1)
    out[chosen] = image
    if boxes.label is None or moved is None:
        return
    nearest = (at + 0.5).floor()
    kept = nearest.clamp(min=0).minimum(most)
    index = torch.zeros_like(nearest[:, :1], dtype=torch.int64)
    for axis, length in enumerate(lengths):
        index = index * length + kept[:, axis : axis + 1].long()
    source = boxes.label[chosen].flatten(2)
    picked = source.gather(2, index.flatten(2).expand(-1, source.shape[1], -1))
    picked = picked.reshape(*source.shape[:2], *boxes.shape)
    if boxes.fill is not None:
        picked = picked * (nearest == kept).all(1, keepdim=True)
    moved[chosen] = picked


def _wide(values: Float32[Tensor, "b d"], dims: int) -> Float32[Tensor, "b d *ones"]:
    """A number for each sample and axis, against a field of places."""
    return values.reshape(*values.shape, *[1] * dims)


def _on_cpu(boxes: _Boxes, rows: Int64[Tensor, " r"], out: Tensor, moved: Tensor | None) -> None:
    """By the kernel, which knows three axes and walks along the last: those of one voxel go first."""
    kernels = compiled()
    assert kernels is not None  # noqa: S101  the caller has looked
    batch, dims, lead = len(boxes.x), boxes.dims, 3 - boxes.dims
    lengths, shape = [*[1] * lead, *boxes.x.shape[2:]], [*[1] * lead, *boxes.shape]
    box_order = sorted(range(3), key=lambda axis: lengths[axis] != 1)
    out_order = sorted(range(3), key=lambda axis: shape[axis] != 1)
    lengths, shape = [lengths[axis] for axis in box_order], [shape[axis] for axis in out_order]
    to_box = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    to_box[:, lead:, lead:] = boxes.to_box
    to_box = to_box[:, [*box_order, 3]][:, :, [*out_order, 3]]
    extent = F.pad(boxes.sizes(), (lead, 0), value=1)[:, box_order]

    x = boxes.x if boxes.x.dtype in _KERNEL_TYPES else boxes.x.float()
    x = x.reshape(*x.shape[:2], *lengths)
    x = x.repeat(1, 1, 1, 1, 2) if lengths[2] == 1 else x.contiguous()  # the kernel reads in pairs
    label = torch.empty((batch, 0, 1, 1, 1), dtype=torch.uint8)
    target = torch.empty((batch, 0, *shape), dtype=torch.uint8)
    if boxes.label is not None and moved is not None:
        bits, channels = _BITS[boxes.label.element_size()], boxes.label.shape[1]
        label = boxes.label.contiguous().view(bits).reshape(batch, channels, *lengths)
        target = moved.view(bits).view(batch, channels, *shape)
    moves = torch.empty((batch, 3, 0, 0, shape[2]), dtype=torch.float32)
    if boxes.displacement is not None:
        knots = boxes.displacement.reshape(batch, dims, *[1] * lead, *boxes.displacement.shape[2:])
        knots = torch.cat([knots.new_zeros(batch, lead, *knots.shape[2:]), knots], dim=1)[:, box_order]
        knots = knots.permute(0, 1, *(axis + 2 for axis in out_order)).flatten(0, 2)
        spread = F.interpolate(knots, size=shape[2], mode="linear", align_corners=True)
        moves = spread.reshape(batch, 3, -1, *spread.shape[1:])
    window = torch.tensor([0.0, 1.0, -torch.inf, torch.inf]).repeat(batch, 1)
    if boxes.window is not None:
        low, high = boxes.window
        window = torch.stack([low, 1 / (high - low), torch.zeros_like(low), torch.ones_like(low)], dim=1).float()

    arrays = [
        tensor.detach().contiguous().numpy()
        for tensor in (x, label, out.view(batch, -1, *shape), target, rows, to_box, moves, extent, window)
    ]
    fill, outside = np.float32(boxes.fill or 0.0), np.float32(boxes.fill is not None)

    def work(start: int, stop: int) -> None:
        kernels.resample_planes(*arrays, fill, outside, start, stop)

    num = len(rows) * shape[0]
    share(work, num, voxels=num * shape[1] * shape[2])

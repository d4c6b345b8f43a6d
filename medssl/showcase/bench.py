"""Some crops, and what each augment by itself, and all together, make of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped
from torch import Tensor

from medssl.augment.base import Augment, Mixing, Params, Spatial, derive_seeds, rows_of
from medssl.augment.frame import Frame, follow
from medssl.augment.pipeline import Pipeline, View
from medssl.showcase.words import drawn_in_words
from medssl.trainable import Batch

_DRAWS = 9
_SHOWN = 3
_SHIFT = 0.7


class Shot(NamedTuple):
    """A crop as it would be shown to a network.

    Args:
        image: Values.
        label: Its label map, if it has one.
        affine: Voxel index to world, as the content lies now.
        text: What was drawn.
    """

    image: Float32[np.ndarray, "c x y z"]
    label: Shaped[np.ndarray, "x y z"] | None
    affine: Float64[np.ndarray, "4 4"]
    text: str = ""


@dataclass(frozen=True)
class Alone:
    """What one augment does by itself: of nine draws those that change least, middling and most.

    Where draws make an image darker or brighter as a whole, it is those that give the darkest and the brightest.

    Args:
        augment: It.
        shots: A list for each case, the weakest or darkest draw first.
        words: What to call them.
        ms: Milliseconds a sample.
        hu_clipped: Share of voxels that it moved out of the range of HU by more than 100.
    """

    augment: Augment[Any]
    shots: tuple[tuple[Shot, ...], ...]
    words: tuple[str, str, str]
    ms: float
    hu_clipped: float


class Bench:
    """Two crops of each case: one to look at, and one that others may be mixed with.

    Args:
        pipeline: What is looked at.
        batch: Boxes ``image``, and ``label`` where there are labels; the crops to look at come first.
        crop_voxels: Voxels of the crops.
    """

    def __init__(self, pipeline: Pipeline, batch: Batch, crop_voxels: Sequence[int]) -> None:
        frame = Frame.of(batch.tensors, "image", shape=crop_voxels)
        assert frame is not None  # noqa: S101  every crop sampler gives one
        self.pipeline, self.batch, self.frame = pipeline, batch, frame
        self.count = len(batch) // 2
        label = batch["label"] if "label" in batch and takes_labels(pipeline) else None
        bare = Pipeline([]).plain(batch["image"], label, frame=frame)
        self._boxed_label, self._label = label, bare.label
        self._stages = [bare.image]
        for augment in pipeline.intensity:
            self._stages.append(_normalise([augment], self._stages[-1]))

    def plain(self, case: int) -> Shot:
        """The crop of a case without anything random."""
        return self._shot(self._stages[-1][case], None if self._label is None else self._label[case], case)

    def alone(self, place: int, seed: int) -> Alone:
        """Apply the augment at ``place``, spatial ones first, and no other, to every sample.

        What is not random of the others, such as a window, is applied as well.
        """
        augment = [*self.pipeline.spatial, *self.pipeline.intensity][place]
        assert isinstance(augment, Augment)  # noqa: S101  what a pipeline holds
        group = augment.config.group if isinstance(augment, Mixing) else 1
        drawn = augment.draw(derive_seeds(torch.tensor([seed]), _DRAWS * group)[0])
        drawn["on"] = torch.ones(_DRAWS * group, dtype=torch.bool)
        rows = self._rows(0, _DRAWS, group)
        first = self._displayed(augment, self._apply(augment, drawn, rows))[::group]
        chosen, words = _ends(first - self._stages[-1][:1])
        picked = torch.tensor([draw * group + member for draw in chosen for member in range(group)])
        params = {name: value[picked] for name, value in drawn.items()}
        shots, seconds, clipped = [], [], [0.0]
        for case in range(self.count):
            rows = self._rows(case, _SHOWN, group)
            start = time.perf_counter()
            view = self._apply(augment, params, rows)
            seconds.append((time.perf_counter() - start) / len(rows))
            clipped += view.notes.get("hu_clipped", torch.zeros(1)).tolist()
            image = self._displayed(augment, view)
            moved = follow(self.batch["image_affine"][rows], self.frame.rows(rows), self._after(augment, view, rows))
            shots.append(
                tuple(
                    self._shot(
                        image[row], _row(view.label, row), case, moved[row], self._drawn(augment, params, row, case)
                    )
                    for row in range(0, len(rows), group)
                )
            )
        return Alone(augment, tuple(shots), words, 1000 * float(np.median(seconds)), max(clipped))

    def views(self, case: int, count: int, seed: int) -> list[Shot]:
        """Views of one crop as training would see them; the text names the augments that were drawn."""
        size = group_size(self.pipeline)
        rows = self._rows(case, count, size)
        seeds = derive_seeds(torch.tensor([seed + case]), len(rows))[0]
        drawn = self.pipeline.draw(seeds)
        with torch.no_grad():
            view = self.pipeline.apply_to(
                self.batch["image"][rows], drawn, label=_rows(self._boxed_label, rows), frame=self.frame.rows(rows)
            )
        moved = follow(self.batch["image_affine"][rows], self.frame.rows(rows), view.frame)
        names = [str(augment.name) for augment in (*self.pipeline.spatial, *self.pipeline.intensity)]
        return [
            self._shot(view.image[row], _row(view.label, row), case, moved[row], _names(names, drawn, row))
            for row in range(0, len(rows), size)
        ]

    def cutting_ms(self) -> float:
        """Milliseconds a sample of cutting crops from their boxes, without augmentation."""
        start = time.perf_counter()
        Pipeline([]).plain(self.batch["image"], self._boxed_label, frame=self.frame)
        return 1000 * (time.perf_counter() - start) / len(self.batch)

    def _apply(self, augment: Augment[Any], params: Params, rows: Int64[Tensor, " r"]) -> View:
        single = Pipeline([augment])
        with torch.no_grad():
            if isinstance(augment, Spatial):
                label, frame = _rows(self._boxed_label, rows), self.frame.rows(rows)
                return single.apply_to(self.batch["image"][rows], [params], label=label, frame=frame)
            x = self._stages[list(self.pipeline.intensity).index(augment)][rows]
            frame = self._whole(x, rows)
            return single.apply_to(x, [params], label=_rows(self._label, rows), frame=frame)

    def _whole(self, x: Tensor, rows: Int64[Tensor, " r"]) -> Frame:
        identity = torch.eye(x.ndim - 1, dtype=torch.float64).repeat(len(x), 1, 1)
        return Frame(identity, self.frame.shape, self.frame.spacing_mm[rows])

    def _after(self, augment: Augment[Any], view: View, rows: Int64[Tensor, " r"]) -> Frame:
        return view.frame if isinstance(augment, Spatial) else self.frame.rows(rows)

    def _displayed(self, augment: Augment[Any], view: View) -> Float32[Tensor, "b c *s"]:
        """A view after all that is not random in the augments behind ``augment``."""
        behind = list(self.pipeline.intensity)
        behind = behind if isinstance(augment, Spatial) else behind[behind.index(augment) + 1 :]
        return _normalise(behind, view.image)

    def _drawn(self, augment: Augment[Any], params: Params, row: int, case: int) -> str:
        one = rows_of(params, slice(row, row + 1))
        return drawn_in_words(augment, one, shape=self.frame.shape, spacing_mm=self.frame.spacing_mm[case : case + 1])

    def _rows(self, case: int, count: int, group: int) -> Int64[Tensor, " r"]:
        """The crop of a case ``count`` times, each followed by others to mix with."""
        others = [self.count + (case + 1 + member) % self.count for member in range(group - 1)]
        return torch.tensor([case, *others] * count)

    def _shot(
        self, image: Tensor, label: Tensor | None, case: int, affine: Tensor | None = None, text: str = ""
    ) -> Shot:
        where = self.batch["image_affine"][case] if affine is None else affine
        flat = image.ndim == 3
        values = image.numpy()[..., None] if flat else image.numpy()
        marks = None if label is None else (label[0].numpy()[..., None] if flat else label[0].numpy())
        return Shot(values, marks, where.double().numpy(), text)


def group_size(pipeline: Pipeline) -> int:
    """How many consecutive samples mix with one another."""
    return math.lcm(1, *(augment.config.group for augment in pipeline.intensity if isinstance(augment, Mixing)))


def takes_labels(pipeline: Pipeline) -> bool:
    """Whether label maps can go through all augments."""
    return all(augment.moves_labels for augment in pipeline.intensity if isinstance(augment, Mixing))


def _ends(change: Float32[Tensor, "d c *s"]) -> tuple[list[int], tuple[str, str, str]]:
    """Which draws lie at both ends and in the middle, and what to call them."""
    signed, size = change.flatten(1).mean(dim=1), change.abs().flatten(1).mean(dim=1)
    is_shift = bool((signed.abs() > _SHIFT * size).float().mean() > 0.5) and bool(signed.min() < 0 < signed.max())
    order = (signed if is_shift else size).argsort().tolist()
    words = ("darkest", "middling", "brightest") if is_shift else ("least", "middling", "most")
    return [order[0], order[len(order) // 2], order[-1]], words


def _normalise(augments: Sequence[Any], x: Float32[Tensor, "b c *s"]) -> Float32[Tensor, "b k *s"]:
    with torch.no_grad():
        for augment in augments:
            x = augment.normalise(x)
    return x


def _rows(values: Tensor | None, rows: Int64[Tensor, " r"]) -> Tensor | None:
    return None if values is None else values[rows]


def _row(values: Tensor | None, row: int) -> Tensor | None:
    return None if values is None else values[row]


def _names(names: Sequence[str], drawn: Sequence[Params], row: int) -> str:
    return ", ".join(name for name, params in zip(names, drawn, strict=True) if params["on"][row]) or "nothing drawn"

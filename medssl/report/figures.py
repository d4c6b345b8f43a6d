"""Pictures for reports, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

_MOST_BARS = 80
_OUTLIER = 10.0
_MOST_ACROSS = 4
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def label_curve(
    curves: Mapping[str, Sequence[tuple[int, float, float, float]]],
    *,
    xlabel: str = "labelled subjects",
    ylabel: str = "Dice",
    title: str = "",
    log: bool = True,
) -> bytes:
    """Draw a score against the number of labelled subjects, or against a severity, one line an arm, with intervals.

    Args:
        curves: Arm to points (number of labelled subjects, score, lower bound, upper bound).
        xlabel: Name of the number.
        ylabel: Name of the score.
        title: Above the plot.
        log: Whether equal ratios of the number are equally far apart.
    """
    figure = Figure(figsize=(7.0, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    budgets = sorted({point[0] for points in curves.values() for point in points})
    for place, (arm, points) in enumerate(curves.items()):
        shift = 0.02 * (place - (len(curves) - 1) / 2)  # keeps intervals of equal budgets apart
        numbers = np.array([point[0] for point in points])
        x = numbers * (1 + shift) if log else numbers + shift
        y, low, high = (np.array([point[k] for point in points]) for k in (1, 2, 3))
        colour = _COLOURS[place % len(_COLOURS)]
        axes.errorbar(x, y, yerr=(y - low, high - y), marker="o", capsize=3, color=colour, label=arm)
    if log:
        axes.set_xscale("log")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _png(figure)


def overlay(
    image: Num[np.ndarray, "x y z"],
    label_maps: Mapping[str, Num[np.ndarray, "x y z"]],
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> bytes:
    """Draw the three middle planes of the labelled region, one row a label map.

    Args:
        image: Intensities, RAS+.
        label_maps: Name to label map on the same grid.
        spacing_mm: Of the grid, so that pixels have their true proportions.
    """
    maps = dict(label_maps)
    where = np.argwhere(np.any([labels > 0 for labels in maps.values()], axis=0))
    centre = where.mean(axis=0).round().astype(int) if len(where) else np.array(image.shape) // 2
    top = max(1, *(int(labels.max()) for labels in maps.values()))
    low, high = np.percentile(image, (1, 99))
    figure = Figure(figsize=(8.0, 2.8 * len(maps)), dpi=110, layout="constrained")
    axes = figure.subplots(len(maps), 3, squeeze=False)
    colours = ListedColormap([_COLOURS[k % len(_COLOURS)] for k in range(top)])
    for row, (name, labels) in enumerate(maps.items()):
        for column, plane in enumerate(("sagittal", "coronal", "axial")):
            across, up = [axis for axis in range(3) if axis != column]
            aspect = spacing_mm[up] / spacing_mm[across]
            cut = np.take(image, centre[column], axis=column).T
            mask = np.take(labels, centre[column], axis=column).T
            ax = axes[row][column]
            ax.imshow(cut, cmap="gray", origin="lower", aspect=aspect, vmin=low, vmax=max(high, low + 1e-6))
            ax.imshow(
                np.ma.masked_equal(mask, 0), cmap=colours, origin="lower", aspect=aspect, alpha=0.5, vmin=1, vmax=top,
                interpolation="nearest",
            )  # fmt: skip
            ax.set_title(f"{name}, {plane}", fontsize=9)
            ax.set_axis_off()
    return _png(figure)


def training_curve(
    series: Mapping[str, Sequence[tuple[int, float]]], *, ylabel: str, chance: float | None = None
) -> bytes:
    """Draw scalars of a journal against the step; ``chance`` is the level of a network that learned nothing."""
    figure = Figure(figsize=(7.0, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), label=name, color=_COLOURS[place % len(_COLOURS)], linewidth=1.2)
    if chance is not None:
        axes.axhline(chance, color="#888888", linestyle="--", linewidth=1, label="learned nothing")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _png(figure)


def cohort_grids(
    cases: Sequence[tuple[str, tuple[int, int, int], tuple[float, float, float], bool]],
) -> bytes | None:
    """Draw how voxel sizes and slice counts of a cohort are spread, one colour a modality.

    Args:
        cases: Modality, shape, spacing in mm, and whether that spacing is known, of each case.

    Returns:
        PNG, or None where nothing is known.
    """
    known = [case for case in cases if case[3]]
    solid = [case for case in cases if case[1][2] > 1]
    panels: list[tuple[str, list[tuple[str, float]]]] = [
        (
            "pixel size in a slice, mm",
            [(name, min(spacing[: 2 if shape[2] == 1 else 3])) for name, shape, spacing, _ in known],
        ),
        ("distance of slices, mm", [(name, max(spacing)) for name, shape, spacing, _ in known if shape[2] > 1]),
        ("longer side, pixels", [(name, max(shape)) for name, shape, _, _ in cases]),
        ("slices", [(name, shape[int(np.argmax(spacing))]) for name, shape, spacing, _ in solid]),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    names = sorted({case[0] for case in cases})
    figure = Figure(figsize=(3.0 * len(panels), 2.7), dpi=130, layout="constrained")
    for ax, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        groups = [[value for name, value in values if name == wanted] for wanted in names]
        everything = [value for _, value in values]
        low, high = min(everything), max(everything)
        edge = 0.05 * max(abs(high), 1e-3)
        bins = np.linspace(low - edge, high + edge, min(25, 5 + len(set(everything))))
        ax.hist(groups, bins=bins, stacked=True, color=_colours(len(names)), label=names)
        ax.yaxis.get_major_locator().set_params(integer=True)
        _plain(ax, xlabel=title, ylabel="images" if ax is figure.axes[0] else "")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return _png(figure)


def cohort_intensities(cases: Sequence[tuple[str, str, float, float]]) -> bytes | None:
    """Draw the 1st to 99th percentile of each case as a bar, one panel a modality and unit, narrow ones first.

    Args:
        cases: Modality, unit, low and high value of each case.

    Returns:
        PNG, or None without cases.
    """
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, unit, low, high in cases:
        groups.setdefault((name, unit), []).append((low, high))
    if not groups:
        return None
    names = sorted({name for name, _ in groups})
    across = min(len(groups), _MOST_ACROSS)
    down = -(-len(groups) // across)
    figure = Figure(figsize=(max(3.0 * across, 4.5), 2.7 * down), dpi=130, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for ax in panels[len(groups) :]:
        ax.set_axis_off()
    for ax, ((name, unit), ranges) in zip(panels, sorted(groups.items()), strict=False):
        ordered = sorted(ranges, key=lambda pair: (pair[1], pair[0]))
        lows, highs = np.array(ordered).T
        colour = _colours(len(names))[names.index(name)]
        if len(ordered) < _MOST_BARS:
            ax.bar(np.arange(len(ordered)), highs - lows, bottom=lows, width=0.85, color=colour)
        else:  # one shape, for thousands of bars take seconds
            ax.stairs(highs, np.arange(len(ordered) + 1) - 0.5, baseline=lows, fill=True, color=colour)
        ax.set_xticks([])
        if np.abs(highs).max() > _OUTLIER * max(1.0, float(np.median(np.abs(highs)))):
            ax.set_yscale("symlog", linthresh=1.0)
        _plain(ax, xlabel=f"{len(ordered)} images of {name}", ylabel="value" if unit == "arbitrary" else unit)
    return _png(figure)


def _colours(count: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(count)]


def _plain(ax: Axes, *, xlabel: str, ylabel: str) -> None:
    """Only the two spines that carry a scale, small type."""
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

"""Corruptions: the same for every model, stronger with severity, and only where they make sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import ConfigError
from medssl.evaluation.robustness import (
    SEVERITIES,
    CorruptedCase,
    RobustnessConfig,
    summarise_corruptions,
    summarise_sites,
)


class Stub(StoredCase):
    """A case in memory."""

    def __init__(
        self, *, unit: str = "arbitrary", modality: str = "MR", shape: tuple[int, int, int] = (16, 18, 14)
    ) -> None:
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
        body = (grid**2).sum(axis=0) < 0.6
        image = np.where(body, 200 + 40 * grid[0], 0.0) + rng.normal(0, 1, shape)
        self.case_id, self.modality, self.subject_id = "c1", modality, "s1"
        self.stub_unit, self.stub_shape = unit, shape
        self._arrays = {"image": image[None].astype(np.float32), "body": body[None].astype(np.uint8)}

    unit = property(lambda self: self.stub_unit)  # type: ignore[assignment]
    shape = property(lambda self: self.stub_shape)  # type: ignore[assignment]
    spacing_mm = property(lambda self: (1.0, 1.0, 1.0))  # type: ignore[assignment]
    fill = property(lambda self: 0.0)  # type: ignore[assignment]

    def _open(self, name: str) -> Any:
        return self._arrays[name]


def corrupted(case: StoredCase, name: str, severity: int) -> np.ndarray:
    ((_, augment),) = RobustnessConfig(corruptions=(name,), severities=(severity,)).for_case(case)[name]
    changed = CorruptedCase(case, augment, name)
    changed.__class__ = type("CorruptedStub", (CorruptedCase, Stub), {})
    return changed.read("image", (0, 0, 0), case.shape)


KINDS = {
    "MR": ({}, {"blur", "low_resolution", "thick_slices", "noise", "contrast", "bias_field", "ghosting", "motion"}),
    "CT": ({"unit": "HU", "modality": "CT"}, {"blur", "low_resolution", "thick_slices", "noise", "shift", "streaks"}),
    "US": ({"modality": "US", "shape": (16, 18, 1)}, {"blur", "low_resolution", "noise", "contrast"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_get_what_suits_their_kind(kind: str) -> None:
    options, names = KINDS[kind]
    made = RobustnessConfig().for_case(Stub(**options))
    assert set(made) == names
    assert all([level for level, _ in levels] == list(SEVERITIES) for levels in made.values())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(KINDS[kind][1])])
def test_a_corruption_grows_with_its_severity_and_is_the_same_each_time(kind: str, name: str) -> None:
    case = Stub(**KINDS[kind][0])
    clean = case.read("image", (0, 0, 0), case.shape)
    errors = []
    for severity in SEVERITIES:
        first, again = corrupted(case, name, severity), corrupted(case, name, severity)
        assert np.array_equal(first, again)
        assert np.isfinite(first).all()
        errors.append(float(np.abs(first - clean).mean()))
    assert errors[0] > 0
    assert errors[-1] > errors[0]
    assert np.diff(errors).min() > -0.05 * errors[-1]


def test_strengths_are_shares_of_the_spread_whatever_the_unit() -> None:
    case = Stub()
    clean = case._arrays["image"]
    first = corrupted(case, "noise", 3) - clean
    case._arrays = {**case._arrays, "image": clean * 10}
    np.testing.assert_allclose(corrupted(case, "noise", 3) - clean * 10, first * 10, rtol=0.02, atol=0.5)
    assert first.std() == pytest.approx(0.3 * clean.std(), rel=0.05)


def test_a_corrupted_case_keeps_everything_but_its_image(phantoms: Any) -> None:
    case = ArrayStore.open(phantoms.store).select(split="test", labelled=True)[0]
    ((_, augment),) = RobustnessConfig(corruptions=("noise",), severities=(4,)).for_case(case)["noise"]
    changed = CorruptedCase(case, augment, "noise")
    assert (changed.case_id, changed.geometry, changed.fill) == (case.case_id, case.geometry, case.fill)
    assert np.array_equal(changed.source_label(), case.source_label())
    box = ((2, 3, 1), (8, 8, 8))
    assert np.array_equal(changed.read("label", *box), case.read("label", *box))
    whole = changed.read("image", (0, 0, 0), case.shape)
    assert np.array_equal(changed.read("image", *box), whole[:, 2:10, 3:11, 1:9])
    assert not np.array_equal(whole, case.read("image", (0, 0, 0), case.shape))


@pytest.mark.parametrize(
    "options", [{"corruptions": ["streaks"]}, {"severities": [0, 1]}, {"severities": []}, {"corruptions": ["fog"]}]
)
def test_what_does_not_suit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be tried on these images"):
        RobustnessConfig.parse(options).for_case(Stub())


def rows(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"arm": "scratch", "budget": 4, "seed": seed, "case_id": f"c{case}", "subject_id": f"s{case}", "label": 1,
             "dice": 0.8 + 0.01 * seed + 0.02 * case, **columns}
            for seed in (0, 1)
            for case in (0, 1, 2)
        ]
    )  # fmt: skip


def test_the_summary_counts_what_the_study_counts() -> None:
    clean = rows()
    bad = pd.concat([rows(corruption=name, severity=3).assign(dice=value) for name, value in (("a", 0.4), ("b", 0.6))])
    extra = bad.assign(label=2, dice=0.0)
    table = summarise_corruptions(pd.concat([bad, extra]), clean=clean, arms=["scratch"])
    found = table.set_index(["corruption", "severity"])["dice"]
    assert found["all", 0] == pytest.approx(clean["dice"].mean())
    assert found["all", 3] == pytest.approx(0.5)
    assert found["a", 3] == pytest.approx(0.4)
    assert table.set_index("corruption")["drop"]["b"] == pytest.approx(clean["dice"].mean() - 0.6)


def test_sites_that_no_training_case_comes_from_are_unseen(phantoms: Any) -> None:
    store = ArrayStore.open(phantoms.store)
    test = store.select(split="test", labelled=True)
    for case in store.cases:
        case.facts = {"site": "north"} if case is not test[0] else {"site": "south"}
    results = pd.concat(
        rows().query("case_id == 'c0'").assign(case_id=case.case_id, subject_id=case.subject_id, budget=2)
        for case in test[:2]
    )
    table = summarise_sites(results, store, column="site", arms=["scratch"]).set_index("site")
    assert table.loc["south", "seen"] == 0
    assert table.loc["north", "seen"] == 1
    assert table.loc["south", "subjects"] == 1

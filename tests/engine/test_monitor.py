from __future__ import annotations

import math

import pytest
import torch

from medssl.engine.monitor import (
    PlateauAlarm,
    collapse_alarm,
    effective_rank,
    embedding_health,
    feature_std,
    rank_me,
    views_alarm,
)


def _random(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


# p_k = sigma_k / sum(sigma) + 1e-7; exp(-sum p_k log p_k), worked out in methods.md 8.13
@pytest.mark.parametrize(
    ("matrix", "value"),
    [
        (torch.eye(8), 8.0000069),
        (torch.ones(8, 4), 1.0000047),
        (torch.diag(torch.tensor([3.0, 1.0])), 1.7547653),
    ],
)
def test_rankme_has_its_reference_values(matrix: torch.Tensor, value: float) -> None:
    assert rank_me(matrix) == pytest.approx(value, abs=2e-7)


def test_rankme_ignores_scale_rotation_and_the_order_of_rows() -> None:
    z = _random(40, 6)
    rotation = torch.linalg.qr(_random(6, 6)).Q
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for other in (3.7 * z, z @ rotation, z[order]):
        assert rank_me(other) == pytest.approx(rank_me(z), abs=1e-4)


def test_rankme_does_not_depend_on_the_storage_type() -> None:
    z = _random(40, 6).to(torch.bfloat16)
    assert rank_me(z) == pytest.approx(rank_me(z.float()), abs=1e-9)


def test_the_effective_rank_sees_through_a_common_offset() -> None:
    z = _random(200, 8)
    shifted = z + 1000.0
    assert rank_me(shifted) < 1.1
    assert effective_rank(shifted) == pytest.approx(effective_rank(z), abs=1e-3)
    assert effective_rank(z) > 7.5


def test_equal_embeddings_have_no_rank_and_no_spread() -> None:
    z = torch.ones(10, 4) * 0.3
    assert effective_rank(z) == 0.0
    assert feature_std(z) == pytest.approx(0.0, abs=1e-12)
    assert rank_me(torch.zeros(5, 3)) == 0.0


def test_uniform_directions_have_a_spread_near_one() -> None:
    assert feature_std(_random(5000, 32)) == pytest.approx(1.0, abs=0.05)


def test_a_constant_encoder_raises_the_collapse_alarm_and_a_healthy_one_does_not() -> None:
    constant = torch.ones(30, 16) + 1e-9 * _random(30, 16)
    assert "collapsed" in str(collapse_alarm(embedding_health(constant)))
    line = torch.linspace(-1, 1, 300)[:, None] * torch.ones(1, 64)
    assert "rank is" in str(collapse_alarm(embedding_health(line)))
    assert collapse_alarm(embedding_health(_random(60, 16))) is None
    assert "standard deviation" in str(collapse_alarm({"feature_std": 1e-5}))
    assert collapse_alarm({"dice": 0.1}) is None


def test_the_plateau_alarm_speaks_once_after_its_grace() -> None:
    alarm = PlateauAlarm(0.435, after_step=100)
    assert alarm.update(50, 0.43) is None
    sentence = alarm.update(100, 0.434)
    assert sentence is not None
    assert "0.435" in sentence
    assert alarm.update(150, 0.434) is None


def test_the_plateau_alarm_is_quiet_while_the_network_learns() -> None:
    alarm = PlateauAlarm(0.435)
    assert all(alarm.update(step, 0.3) is None for step in range(10))


def test_the_plateau_alarm_speaks_again_when_learning_is_lost() -> None:
    alarm = PlateauAlarm(1.0)
    assert alarm.update(1, 1.0) is not None
    for step in range(2, 12):
        assert alarm.update(step, 0.2) is None
    assert any(alarm.update(step, 1.2) is not None for step in range(12, 30))


def test_without_a_chance_level_or_a_finite_loss_there_is_no_alarm() -> None:
    assert PlateauAlarm(None).update(10, 5.0) is None
    assert PlateauAlarm(1.0).update(10, math.nan) is None


def test_the_plateau_alarm_names_what_it_watches() -> None:
    assert str(PlateauAlarm(1.0).update(1, 1.0)).startswith("loss 1 is not below 1 by 2% after 1 steps")
    assert str(PlateauAlarm(1.0, monitor="ratio").update(1, 1.0)).startswith("ratio 1 is not below")


def test_a_negative_chance_level_has_its_bound_below_it() -> None:
    assert PlateauAlarm(-1.0).update(1, -1.01) is not None
    assert PlateauAlarm(-1.0).update(1, -1.03) is None


def test_the_memory_of_the_alarm_survives_a_checkpoint() -> None:
    alarm = PlateauAlarm(1.0)
    assert alarm.update(1, 1.0) is not None
    other = PlateauAlarm(1.0)
    other.load_state_dict(alarm.state_dict())
    assert other.update(2, 1.0) is None


@pytest.mark.parametrize("name", ["blank", "fallback", "anywhere"])
def test_many_views_that_teach_nothing_are_told_of(name: str) -> None:
    assert views_alarm({"loss": 1.0, f"views/{name}": 0.05}) is None
    sentence = views_alarm({"loss": 1.0, f"views/{name}": 0.12})
    assert sentence is not None
    assert sentence.startswith("12% of the views ")
    assert "medssl gallery" in sentence

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medssl.errors import ConfigError
from medssl.nn.ema import cosine_momentum, make_teacher, update_ema


def filled(value: float) -> nn.Linear:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def test_a_teacher_equals_the_student_shares_no_storage_and_takes_no_gradient() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = make_teacher(student)
    own, other = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert not {value.data_ptr() for value in own.values()} & {value.data_ptr() for value in other.values()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("steps", [1, 5])
def test_from_zero_to_one_with_momentum_nine_tenths_the_teacher_is_one_minus_its_power(steps: int) -> None:
    student, teacher = filled(1.0), filled(0.0)
    for _ in range(steps):
        update_ema(teacher, student, 0.9)
    for parameter in teacher.parameters():
        assert parameter.flatten().tolist() == pytest.approx([1 - 0.9**steps] * parameter.numel(), abs=1e-6)
    if steps == 5:
        assert float(teacher.bias[0].detach()) == pytest.approx(0.40951, abs=1e-6)


def test_running_statistics_follow_and_counters_are_copied() -> None:
    student, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    student(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 5)
    assert student.running_mean is not None
    assert teacher.running_mean is not None
    assert teacher.num_batches_tracked is not None
    update_ema(teacher, student, 0.75)
    torch.testing.assert_close(teacher.running_mean, 0.25 * student.running_mean)
    assert int(teacher.num_batches_tracked) == 1


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student() -> None:
    student, teacher = filled(3.0), filled(-1.0)
    update_ema(teacher, student, 1.0)
    assert float(teacher.weight[0, 0].detach()) == -1.0
    update_ema(teacher, student, 0.0)
    assert float(teacher.weight[0, 0].detach()) == 3.0


def test_a_teacher_of_another_structure_is_refused_and_left_alone() -> None:
    teacher = filled(0.0)
    for student in (nn.Sequential(filled(1.0)), nn.Linear(2, 4)):
        with pytest.raises(ConfigError, match="teacher and student differ"):
            update_ema(teacher, student, 0.5)
    assert float(teacher.weight.detach().abs().sum()) == 0.0


def test_the_momentum_goes_along_half_a_cosine() -> None:
    assert cosine_momentum(0.99, 1.0, 0.0) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 1.0, 0.5) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 1.0, 1.0) == pytest.approx(1.0)
    assert cosine_momentum(0.9, 1.0, 0.25) == pytest.approx(1 - 0.1 * (1 + math.sqrt(0.5)) / 2)
    assert cosine_momentum(0.9, 0.9, 0.3) == pytest.approx(0.9)

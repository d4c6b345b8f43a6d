from __future__ import annotations

import torch
from torch import nn

from medssl.progress import track
from medssl.trainable import Batch, Losses, Progress, Trainable


class Line(Trainable):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: Batch) -> Losses:
        error = self.layer(batch["x"]).square().mean()
        return Losses(error, {"square": error}, {"seen": torch.tensor(len(batch))})


def test_a_batch_moves_its_tensors_and_keeps_its_seeds_on_the_cpu():
    batch = Batch({"x": torch.ones(2, 3)}, torch.tensor([1, 2]), ("a", "b")).to("cpu")
    assert "x" in batch
    assert "y" not in batch
    assert len(batch) == 2
    assert batch.seeds.device.type == "cpu"


def test_a_batch_keeps_geometry_and_notes_on_the_cpu_and_every_type():
    tensors = {
        "image": torch.ones(2, 1, 3, dtype=torch.int16),
        "image_to_box": torch.eye(4, dtype=torch.float64).repeat(2, 1, 1),
        "image_spacing_mm": torch.ones(2, 3),
        "image_extent": torch.ones(2, 3),
        "image_affine": torch.ones(2, 4, 4),
    }
    batch = Batch(tensors, torch.tensor([1, 2]), ("a", "b"), {"padded": torch.zeros(2)})
    moved = batch.to("meta")
    assert {name: tensor.device.type for name, tensor in moved.tensors.items()} == {
        "image": "meta", "image_to_box": "cpu", "image_spacing_mm": "cpu", "image_extent": "cpu", "image_affine": "cpu",
    }  # fmt: skip
    assert moved["image"].dtype == torch.int16
    assert moved.notes["padded"].device.type == "cpu"
    other = batch.with_tensors({"x": torch.ones(2)}, {"more": torch.ones(2)})
    assert (set(other.tensors), set(other.notes), other.case_ids) == ({"x"}, {"padded", "more"}, ("a", "b"))


def test_by_default_a_batch_is_trained_on_as_it_comes():
    batch = Batch({"x": torch.ones(2, 3)}, torch.tensor([1, 2]), ("a", "b"))
    assert Line().prepare(batch, training=True) is batch


def test_losses_become_plain_numbers_with_their_names():
    losses = Line()(Batch({"x": torch.zeros(2, 3)}, torch.tensor([1, 2]), ("a", "b")))
    assert set(losses.scalars()) == {"loss", "square", "seen"}
    assert losses.scalars()["seen"] == 2.0


def test_weight_decay_spares_biases_and_every_parameter_comes_once():
    line = Line()
    groups = {group.name: group for group in line.param_groups()}
    assert groups["all/decay"].params == [line.layer.weight]
    assert groups["all/no_decay"].weight_decay_scale == 0.0
    assert line.chance_level() is None
    line.before_step(Progress(0, 4))
    line.after_step(Progress(1, 4))
    assert Progress(1, 4).fraction == 0.25
    assert Progress(0, 0).fraction == 0.0


def test_a_progress_bar_hands_on_every_item():
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(track(iter([1, 2]), "counting", total=2, completed=1)) == [1, 2]


def test_a_progress_bar_asks_for_its_status_after_each_item():
    said = iter(["one", "two"])
    assert list(track([1, 2], "counting", status=lambda: next(said))) == [1, 2]
    assert next(said, None) is None

"""What every method must do; a new file in ``medssl/methods`` is tested before its author writes a test."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from medssl import registry
from medssl.engine.monitor import collapse_alarm, effective_rank, embedding_health
from medssl.errors import ConfigError
from medssl.methods.base import Method
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.nn.unet import Config as UNetConfig
from medssl.nn.unet import ResidualUNetEncoder
from medssl.trainable import Batch, Progress

METHODS = registry.names("methods", Method)

# small enough for seconds on a CPU; a method that is not named here is tested with a crop of 16 voxels
SMALL = {
    "mae": {"crop_voxels": [16, 16, 16], "block_voxels": [4, 4, 4]},
    "voco": {"crop_voxels": [8, 8, 8], "grid": [2, 2, 2], "projector_channels": [64, 32]},
}
STEPS = {"mae": 150}
NUMBERS = (0, 1, 2, 3)


class Body:
    """A subject with organs at places that vary a little from subject to subject."""

    channels = 1
    shape = (24, 24, 24)
    spacing_mm = (1.0, 1.0, 1.5)
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    body_box = np.array([[0.0] * 3, [24.0] * 3])
    is_metric = True
    atlas_affine = None
    fill = 0.0

    def __init__(self, number):
        rng = np.random.default_rng(number)
        self.case_id = f"body {number}"
        place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in self.shape], indexing="ij"))
        voxels = 0.2 * rng.normal(size=self.shape) + 0.5 * place[0]
        for centre, radius, height in (((-0.4, 0.1, 0.2), 0.5, 2.0), ((0.5, -0.3, -0.2), 0.4, -1.5)):
            middle = np.array(centre) + 0.08 * rng.normal(size=3)
            voxels += height * (((place - middle[:, None, None, None]) ** 2).sum(axis=0) < radius**2)
        self._voxels = ((voxels - voxels.mean()) / voxels.std()).astype(np.float32)[None]

    def has(self, name):
        return name == "image"

    def read(self, name, start, shape):
        return self._voxels[(slice(None), *(slice(a, a + n) for a, n in zip(start, shape, strict=True)))]

    def foreground_voxels(self, value):
        return np.empty((0, 3), np.int32)


def build(name, *, seed=0, **options):
    torch.manual_seed(seed)
    net = ResidualUNetEncoder(
        UNetConfig(channels=(8, 16), strides=(2, 2), blocks=(1, 1)), in_channels=1, spatial_dims=3
    )
    mapping = {"name": name, **SMALL.get(name, {"crop_voxels": [16, 16, 16]}), "augment": {"preset": "none"}, **options}
    cls, config = registry.configure("methods", mapping, Method)
    return cls(config, encoder=net, seed=seed)


def batch(method, *, numbers=(0, 1), draw=0):
    sampler = method.view_sampler()
    samples = [
        sampler([Body(number)] * sampler.cases_per_sample, np.random.default_rng([number, draw])) for number in numbers
    ]
    tensors = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    return Batch(tensors, torch.tensor(numbers) + 1000 * draw, tuple(f"body {number}" for number in numbers))


def losses_of(method, data):
    """One forward pass as the loop does it, augmented if the method trains."""
    return method(method.prepare(data, training=method.training))


def train(method, batches, *, optimiser=None, start=0, total=10):
    optimiser = optimiser or optimiser_of(method)
    losses = []
    for step, data in enumerate(batches, start):
        method.before_step(Progress(step, total))
        found = losses_of(method, data)
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
        method.after_step(Progress(step + 1, total))
        losses.append(found.scalars())
    return losses


def optimiser_of(method):
    groups = [
        {"params": group.params, "weight_decay": 0.01 * group.weight_decay_scale} for group in method.param_groups()
    ]
    return torch.optim.AdamW(groups, lr=3e-3)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def test_the_default_config_is_valid_and_an_unknown_key_is_refused(name):
    config_class = importlib.import_module(f"medssl.methods.{name}").Config
    assert config_class.parse(config_class().to_dict()) == config_class()
    with pytest.raises(ConfigError, match="unknown key"):
        registry.configure("methods", {"name": name, "no_such_key": 1}, Method)


def test_the_docstring_names_its_paper_and_deviations(name):
    cls = registry.find("methods", name, Method)
    assert "Reference:" in cls.__doc__
    assert "arXiv:" in cls.__doc__
    assert "Deviations:" in cls.__doc__
    assert cls.citations


def test_losses_are_finite_scalars_and_parts_make_the_total(name):
    method = build(name)
    losses = losses_of(method, batch(method))
    for value in (losses.total, *losses.parts.values(), *losses.monitors.values()):
        assert value.ndim == 0
        assert torch.isfinite(value)
    assert losses.total.requires_grad
    assert not any(value.requires_grad for value in losses.monitors.values())
    total = sum(float(value.detach()) for value in losses.parts.values())
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-5)


def test_prepare_is_a_pure_function_of_the_batch_and_the_flag(name):
    method = build(name, augment=[{"name": "noise", "sigma": [0.1, 0.5]}])
    data = batch(method)
    before = {key: tensor.clone() for key, tensor in data.tensors.items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = {training: method.prepare(data, training=training) for training in (True, False)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in data.tensors.items())
    for parameter in method.eval().parameters():
        parameter.data.zero_()
    torch.manual_seed(2)
    for training, first in made.items():
        again = method.prepare(data, training=training)
        assert again.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.tensors.items())
        assert not any(tensor.requires_grad for tensor in first.tensors.values())
        assert all(note.shape == (len(data),) for note in first.notes.values())
    assert any(not torch.equal(tensor, made[False][key]) for key, tensor in made[True].tensors.items())


def test_two_volumes_are_learned_by_heart(name):  # (a)
    method = build(name)
    data = batch(method)
    plateau = method.chance_level() or losses_of(method.eval(), data).scalars()[method.chance_monitor]
    method.train()
    last = train(method, [data] * STEPS.get(name, 60), total=200)[-1]
    assert last[method.chance_monitor] < 0.2 * plateau


def test_constant_encoder_sets_off_the_collapse_alarm_and_does_not_beat_chance(name):  # (b)
    method = build(name).eval()
    for parameter in method.encoder.parameters():
        parameter.data.zero_()
    for student, teacher in method.momentum_pairs():
        teacher.load_state_dict(student.state_dict())
    images = torch.stack([torch.from_numpy(Body(number).read("image", (4, 4, 4), (16, 16, 16))) for number in range(8)])
    with torch.no_grad():
        health = embedding_health(method.embed(images))
        losses = losses_of(method, batch(method, numbers=range(8)))
    assert "collapsed" in collapse_alarm(health)
    if method.chance_level() is not None:
        assert losses.scalars()[method.chance_monitor] > 0.9 * method.chance_level()


def test_features_keep_more_than_one_direction_after_training(name):
    method = build(name)
    train(method, [batch(method, draw=draw) for draw in range(10)])
    images = torch.stack([torch.from_numpy(Body(number).read("image", (4, 4, 4), (16, 16, 16))) for number in range(8)])
    with torch.no_grad():
        embedding = method.eval().embed(images)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (8, 24)
    assert effective_rank(embedding) > 1.0


def test_every_loss_term_reaches_the_student_and_none_the_teacher(name):  # (c)
    method = build(name)
    losses = losses_of(method, batch(method))
    teachers = {id(p) for _, teacher in method.momentum_pairs() for p in teacher.parameters()}
    for part in losses.parts.values():
        found = torch.autograd.grad(part, list(method.encoder.parameters()), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    losses.total.backward()
    for key, parameter in method.named_parameters():
        if id(parameter) in teachers:
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


def test_parameter_groups_hold_every_trainable_parameter_once(name):
    method = build(name)
    grouped = [id(p) for group in method.param_groups() for p in group.params]
    trainable = [id(p) for p in method.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_teachers_start_equal_share_nothing_and_follow(name):
    method = build(name)
    for student, teacher in method.momentum_pairs():
        for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    before = [copy.deepcopy(teacher.state_dict()) for _, teacher in method.momentum_pairs()]
    train(method, [batch(method)])
    for (_, teacher), old in zip(method.momentum_pairs(), before, strict=True):
        assert any(not torch.equal(value, old[key]) for key, value in teacher.state_dict().items())
        assert not teacher.training


def test_order_of_the_batch_does_not_matter(name):  # (d)
    method = build(name).eval()
    plain = losses_of(method, batch(method, numbers=(0, 1, 2))).scalars()
    assert losses_of(method, batch(method, numbers=(2, 0, 1))).scalars() == pytest.approx(plain, abs=1e-5)


def test_evaluation_repeats_bit_for_bit_and_changes_nothing(name):  # (e)
    method = build(name).eval()
    before = copy.deepcopy(method.state_dict())
    data = batch(method)
    assert losses_of(method, data).scalars() == losses_of(method, data).scalars()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_equal_seeds_give_equal_losses_and_weights(name):
    a, b = build(name, seed=3), build(name, seed=3)
    assert train(a, [batch(a), batch(a, draw=1)]) == train(b, [batch(b), batch(b, draw=1)])
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert train(build(name, seed=4), [batch(a)]) != train(build(name, seed=3), [batch(a)])


def test_saved_run_goes_on_as_if_nothing_had_happened(name):  # (g)
    method = build(name)
    data = [batch(method, draw=draw) for draw in range(4)]
    optimiser = optimiser_of(method)
    train(method, data[:2], optimiser=optimiser)
    saved = copy.deepcopy((method.state_dict(), optimiser.state_dict()))
    rest = train(method, data[2:], optimiser=optimiser, start=2)
    fresh = build(name, seed=9)
    fresh.load_state_dict(saved[0], strict=True)
    again = optimiser_of(fresh)
    again.load_state_dict(saved[1])
    assert train(fresh, data[2:], optimiser=again, start=2) == rest
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in method.state_dict().items())


def one_of_two(folder):
    """One of two processes: loss and gradient of every method on its half of the batch."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name in METHODS:
        method = build(name)
        parallel = DistributedDataParallel(method)
        data = batch(method, numbers=NUMBERS[2 * rank : 2 * rank + 2])
        loss = parallel(method.prepare(data, training=True)).total
        loss.backward()
        mean = loss.detach() / 2
        distributed.all_reduce(mean)
        found |= {f"{name}/loss": mean} | {
            f"{name}/{key}": p.grad for key, p in method.named_parameters() if p.requires_grad
        }
    save_file(found, folder / f"{rank}.safetensors")
    distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its things apart


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    children = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [child.wait(timeout=240) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_processes_have_the_loss_and_the_gradient_of_one(name, two_processes):  # (h)
    method = build(name)
    loss = losses_of(method, batch(method, numbers=NUMBERS)).total
    loss.backward()
    expected = {"loss": loss.detach()} | {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    for found in two_processes:
        for key, value in expected.items():
            torch.testing.assert_close(
                found[f"{name}/{key}"], value, atol=1e-5, rtol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
            )


def test_half_precision_agrees_with_single_precision(name):  # (i)
    method = build(name).eval()
    data = batch(method)
    with torch.no_grad():
        single = losses_of(method, data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = losses_of(method, data)
    assert half.total.dtype == torch.float32
    assert float(half.total) == pytest.approx(float(single.total), rel=0.02)


def test_encoder_survives_a_bundle_bit_for_bit(name, tmp_path):
    method = build(name)
    train(method, [batch(method)])
    passport = Passport(
        kind="encoder", backbone=method.encoder.config, spatial_dims=3, in_channels=1, prepare={}, unit="arbitrary",
        crop_voxels=(16, 16, 16), recipe={}, method=name, data_fingerprint="none", citations=method.citations,
    )  # fmt: skip
    save_bundle(tmp_path / "bundle", {"encoder": method.encoder}, passport)
    loaded = load_bundle(tmp_path / "bundle").build_encoder()
    own = method.encoder.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))

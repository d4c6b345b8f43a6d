"""VoCo: T3 to T9 of methods.md 1.11 on the whole method, its presets and its guards."""

import copy
import itertools

import numpy as np
import pytest
import torch

from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.losses.overlap import base_regulariser
from medssl.methods.base import draw_subsets
from medssl.methods.voco import PRESETS, Config, VoCo, chance_level, pearson, top1
from medssl.nn.bundle import Passport, load_bundle, load_into, save_bundle
from medssl.nn.decoder import Decoder
from medssl.nn.unet import Config as UNetConfig
from medssl.nn.unet import ResidualUNetEncoder
from medssl.trainable import Batch, Progress
from medssl.views import GridCrops, grid_boxes, overlap_fractions

HISTORICAL = ("paper", "released", "v1", "v2", "nnssl")
TINY = {"crop_voxels": [8, 8, 8], "grid": [2, 2, 1], "projector_channels": [32, 16], "augment": {"preset": "none"}}


def encoder(*, spatial_dims=3, seed=0):
    torch.manual_seed(seed)
    config = UNetConfig(channels=(4, 8), strides=(2, 2), blocks=(1, 1))
    return ResidualUNetEncoder(config, in_channels=1, spatial_dims=spatial_dims)


def voco(**options):
    return VoCo(Config.parse({**TINY, **options}), encoder=encoder(), seed=0)


def batch(*, volumes=2, targets=4, grid=(2, 2, 1), crop=(8, 8, 8), seed=0):
    rng = np.random.default_rng(seed)
    num = int(np.prod(grid))
    cell = np.array([*crop, 1][:3])
    starts = rng.integers(0, (np.array(grid) - 1) * cell + 1, size=(volumes * targets, 3))
    boxes = np.stack([starts, np.broadcast_to(cell, starts.shape)], axis=1).astype(float)
    overlap = overlap_fractions(boxes, grid_boxes(grid, cell)).reshape(volumes, targets, num)
    image = lambda n: torch.from_numpy(rng.normal(size=(volumes, n, 1, *crop))).float()
    tensors = {"targets": image(targets), "bases": image(num), "overlap": torch.from_numpy(overlap).float()}
    return Batch(tensors, torch.arange(volumes) + 5, tuple(f"case {i}" for i in range(volumes)))


def losses_of(method, data):
    return method(method.prepare(data, training=method.training))


def step(method, data, optimiser, *, step_number=1, total=10):
    losses = losses_of(method, data)
    optimiser.zero_grad()
    losses.total.backward()
    optimiser.step()
    method.after_step(Progress(step_number, total))
    return losses


def optimiser_of(method):
    return torch.optim.AdamW([p for group in method.param_groups() for p in group.params], lr=1e-3)


@pytest.mark.parametrize("preset", [*HISTORICAL, "medssl"])
def test_every_preset_trains_and_its_parts_add_up(preset):
    method = voco(preset=preset)
    losses = step(method, batch(), optimiser_of(method))
    assert torch.isfinite(losses.total)
    assert float(losses.total.detach()) == pytest.approx(
        sum(float(v.detach()) for v in losses.parts.values()), abs=1e-5
    )
    assert set(losses.parts) == {"pos", "neg", "reg"} | ({"inter"} if preset == "v2" else set())
    assert {"pearson", "top1"} <= set(losses.monitors)


def test_presets_are_those_of_the_comparison_table():  # methods.md 1.5
    teacher = {name: PRESETS[name].teacher for name in PRESETS}
    assert teacher == {
        "paper": "none",
        "released": "none",
        "v1": "full",
        "v2": "head",
        "nnssl": "none",
        "medssl": "full",
    }
    assert {n: PRESETS[n].pos_weight for n in HISTORICAL} == {
        "paper": "all", "released": "indicator", "v1": "overlap", "v2": "overlap", "nnssl": "overlap",
    }  # fmt: skip
    assert {n: PRESETS[n].neg_form for n in HISTORICAL} == {
        "paper": "paper", "released": "square", "v1": "square", "v2": "log", "nnssl": "square",
    }  # fmt: skip
    assert {n: PRESETS[n].reg_power for n in HISTORICAL} == {"paper": 1, "released": 2, "v1": 2, "v2": 2, "nnssl": 1}
    assert [n for n in HISTORICAL if not PRESETS[n].detach_bases] == ["v1"]
    assert [n for n in PRESETS if not PRESETS[n].reg_symmetric] == ["v1", "v2"]
    assert [n for n in PRESETS if PRESETS[n].features == "last"] == ["paper", "released"]
    assert PRESETS["v1"].momentum == PRESETS["v2"].momentum == (0.9, 0.9)
    assert (PRESETS["medssl"].momentum, PRESETS["medssl"].projector_norm) == ((0.99, 1.0), "layer")


def test_option_overrides_the_preset_and_leaves_the_rest():
    objective = Config.parse({"preset": "v1", "pos_weight": "indicator", "detach_bases": True}).objective
    assert (objective.pos_weight, objective.detach_bases) == ("indicator", True)
    assert (objective.neg_form, objective.teacher, objective.grid) == ("square", "full", (4, 4, 1))


@pytest.mark.parametrize(
    ("preset", "grid", "crop", "plateau", "similarity", "at_zero"),
    [
        ("v1", (4, 4, 1), 96, 0.435, 0.24, 0.714),
        ("released", (4, 4, 1), 96, 0.270, 0.13, 0.368),
        ("v2", (3, 3, 1), 64, 0.609, 0.14, 0.713),
        ("nnssl", (4, 4, 1), 64, 0.598, 0.17, 0.714),
    ],
)
def test_plateau_equals_the_table(preset, grid, crop, plateau, similarity, at_zero):  # T9, methods.md 1.7
    objective = PRESETS[preset]
    assert objective.grid == grid
    sampler = GridCrops(grid, (crop,) * 3, num_targets=objective.num_targets)
    loss, constant = chance_level(sampler, objective)
    assert loss == pytest.approx(plateau, abs=0.01)
    assert constant == pytest.approx(similarity, abs=0.021)  # the constant is sought in steps of 0.02
    assert loss < at_zero


def test_chance_level_is_known_at_construction_and_does_not_touch_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    backbone = encoder()
    torch.manual_seed(3)
    method = VoCo(Config.parse(TINY), encoder=backbone, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert 0.1 < method.chance_level() < 1.0
    assert 0.0 < method.chance_similarity < 0.6


@pytest.mark.parametrize("preset", ["v1", "released", "nnssl", "medssl"])
def test_constant_encoder_has_at_least_the_chance_level_and_no_correlation(preset):
    method = voco(preset=preset).eval()
    for parameter in method.encoder.parameters():
        parameter.data.zero_()
    if method.teacher_encoder is not None:
        method.teacher_encoder.load_state_dict(method.encoder.state_dict())
    losses = losses_of(method, batch(volumes=64))
    assert float(losses.total.detach()) > method.chance_level()
    assert abs(float(losses.monitors["pearson"])) < 1e-3


@pytest.mark.parametrize("teacher", ["none", "head", "full"])
def test_detached_bases_get_no_gradient_from_the_prediction(teacher):  # T4
    method = voco(teacher=teacher, detach_bases=True).eval()
    data = batch()
    data["bases"].requires_grad_()
    data["targets"].requires_grad_()
    losses = method(data)
    to_bases, to_targets = torch.autograd.grad(
        losses.parts["pos"], [data["bases"], data["targets"]], retain_graph=True, allow_unused=True
    )
    assert to_bases is None or (to_bases == 0).all()
    assert to_targets.abs().sum() > 0
    (from_reg,) = torch.autograd.grad(losses.parts["reg"], data["bases"])
    assert (from_reg.flatten(2).norm(dim=-1) > 0).all()  # symmetric regulariser: every base


@pytest.mark.parametrize("teacher", ["none", "full"])
def test_bases_get_a_gradient_from_the_prediction_unless_detached(teacher):
    method = voco(teacher=teacher, detach_bases=False).eval()
    data = batch()
    data["bases"].requires_grad_()
    (found,) = torch.autograd.grad(method(data).parts["pos"], data["bases"])
    assert (found.flatten(2).norm(dim=-1) > 0).any()


def test_full_teacher_averages_both_directions():  # methods.md 1.4
    method = voco().eval()
    with torch.no_grad():
        for parameter in method.teacher_projector.parameters():
            parameter.mul_(1.3).add_(0.02)
    data = batch()
    losses = method(data)

    def embed(network, projector, images):
        pyramid = network(images.flatten(0, 1))
        z = projector(torch.cat([level.flatten(2).mean(-1) for level in pyramid], dim=1))
        return torch.nn.functional.normalize(z, dim=-1).view(2, images.shape[1], -1)

    xs, bs = (embed(method.encoder, method.projector, data[n]) for n in ("targets", "bases"))
    xt, bt = (embed(method.teacher_encoder, method.teacher_projector, data[n]) for n in ("targets", "bases"))
    s = ((xs @ bt.mT).clamp(min=0) + (xt @ bs.mT).clamp(min=0)) / 2
    y = data["overlap"]
    pos = [-(y[v] * torch.log(1 - (y[v] - s[v]).abs() + 1e-6)).sum() / y[v].sum() for v in range(2)]
    neg = [(s[v][y[v] == 0] ** 2).sum() / max(1, int((y[v] == 0).sum())) for v in range(2)]
    cosine = bs @ bs.mT
    reg = [sum(cosine[v, i, j].clamp(min=0) ** 2 for i, j in itertools.combinations(range(4), 2)) / 6 for v in range(2)]
    for name, expected in (("pos", pos), ("neg", neg), ("reg", reg)):
        assert float(losses.parts[name].detach()) == pytest.approx(float(sum(expected).detach()) / 2, abs=1e-5)


@pytest.mark.parametrize("preset", ["v1", "v2", "medssl"])
def test_teacher_takes_no_gradient_and_no_place_in_the_optimiser(preset):  # T4
    method = voco(preset=preset)
    losses_of(method, batch()).total.backward()
    in_optimiser = {id(p) for group in method.param_groups() for p in group.params}
    for _, teacher in method.momentum_pairs():
        assert not teacher.training
        for parameter in teacher.parameters():
            assert parameter.grad is None
            assert id(parameter) not in in_optimiser


def test_teacher_follows_at_the_preset_momentum():  # T5
    method = voco(preset="v1")
    for (name, value), (_, copied) in zip(
        method.encoder.state_dict().items(), method.teacher_encoder.state_dict().items(), strict=True
    ):
        assert torch.equal(value, copied), name
    for student, teacher in method.momentum_pairs():
        for parameter in student.parameters():
            parameter.data.fill_(1.0)
        for parameter in teacher.parameters():
            parameter.data.fill_(0.0)
    for n in range(1, 6):
        method.after_step(Progress(n, 100))
    for _, teacher in method.momentum_pairs():
        for parameter in teacher.parameters():
            torch.testing.assert_close(parameter.data, torch.full_like(parameter, 0.40951), atol=1e-6, rtol=0)


def test_momentum_of_the_default_rises_to_one():
    method = voco()
    found = [method.momentum(Progress(step, 10)) for step in range(11)]
    assert found[0] == pytest.approx(0.99)
    assert found[-1] == pytest.approx(1.0)
    assert found == sorted(found)


def test_permuted_bases_and_volumes_leave_the_loss():  # T6
    method = voco().eval()
    data = batch(volumes=3)
    plain = losses_of(method, data).scalars()
    order = [2, 0, 3, 1]
    bases = Batch(
        {"targets": data["targets"], "bases": data["bases"][:, order], "overlap": data["overlap"][..., order]},
        data.seeds,
        data.case_ids,
    )
    volumes = Batch({n: t[[2, 0, 1]] for n, t in data.tensors.items()}, data.seeds[[2, 0, 1]], data.case_ids)
    for other in (bases, volumes):
        assert losses_of(method, other).scalars() == pytest.approx(plain, abs=1e-6)


def test_target_outside_the_grid_is_refused():  # T7
    data = batch()
    data["overlap"][0, 1] = 0
    with pytest.raises(CaseError, match="overlaps no base"):
        losses_of(voco(), data)


def test_saved_state_gives_the_same_loss_in_a_fresh_method():  # T8
    method = voco(preset="v1")
    optimiser = optimiser_of(method)
    step(method, batch(), optimiser)
    fresh = VoCo(Config.parse({**TINY, "preset": "v1"}), encoder=encoder(seed=9), seed=7)
    fresh.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
    assert losses_of(fresh, batch(seed=1)).scalars() == losses_of(method, batch(seed=1)).scalars()


def test_exported_encoder_fits_a_segmenter_and_a_renamed_key_is_refused(tmp_path):  # T8
    method = voco()
    passport = Passport(
        kind="encoder", backbone=method.encoder.config, spatial_dims=3, in_channels=1, prepare={}, unit="arbitrary",
        crop_voxels=(8, 8, 8), recipe={}, method="voco", data_fingerprint="none", citations=method.citations,
    )  # fmt: skip
    save_bundle(tmp_path / "bundle", {"encoder": method.encoder}, passport)
    bundle = load_bundle(tmp_path / "bundle")
    loaded = bundle.build_encoder()
    for (name, a), (_, b) in zip(method.encoder.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model = torch.nn.ModuleDict({"encoder": encoder(seed=4), "decoder": Decoder((4, 8), (2, 4), 3, 2)})
    report = load_into(model["encoder"], bundle.tensors, prefix="encoder")
    assert len(report.matched) == len(model["encoder"].state_dict())
    new = {name for name in model.state_dict() if name not in bundle.tensors}
    assert new == {name for name in model.state_dict() if name.startswith("decoder.")}
    renamed = {key.replace("levels.0", "stem", 1): value for key, value in bundle.tensors.items()}
    with pytest.raises(CheckpointError, match="tensors match"):
        load_into(model["encoder"], renamed, prefix="encoder")


@pytest.mark.parametrize("teacher", ["none", "head", "full"])
def test_subset_of_bases_leaves_the_prediction_and_estimates_the_regulariser_without_bias(teacher):  # methods.md 1.4b
    options = {"teacher": teacher, "detach_bases": True, "grid": [3, 2, 1]}
    whole, part = voco(**options).eval(), voco(**options, reg_bases=4).eval()
    part.load_state_dict(whole.state_dict())
    data = batch(volumes=1, grid=(3, 2, 1))
    with torch.no_grad():
        full = losses_of(whole, data).scalars()
        drawn = [Batch(data.tensors, torch.tensor([seed]), data.case_ids) for seed in range(300)]
        found = [losses_of(part, one).scalars() for one in drawn]
    for name in ("pos", "neg", "pearson", "top1"):
        assert found[0][name] == pytest.approx(full[name], abs=1e-5)
    regs = np.array([one["reg"] for one in found])
    assert regs.std() > 0
    assert abs(regs.mean() - full["reg"]) < 4 * regs.std() / np.sqrt(len(regs))


def test_subsets_are_equally_likely_and_depend_on_the_seed_alone():
    drawn = draw_subsets(torch.arange(4000), 5, size=2)
    counts = np.zeros((5, 5))
    for a, b in drawn.tolist():
        counts[min(a, b), max(a, b)] += 1
    upper = counts[np.triu_indices(5, 1)]
    assert abs(upper - 400).max() < 5 * np.sqrt(400)
    assert torch.equal(draw_subsets(torch.tensor([7, 3]), 5, size=2)[1], drawn[3])


def test_subset_is_the_same_regulariser_as_over_its_own_bases():
    bases = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    every = [base_regulariser(bases[:, list(chosen)]) for chosen in itertools.combinations(range(6), 4)]
    assert float(torch.stack(every).mean()) == pytest.approx(float(base_regulariser(bases)), abs=1e-6)


def test_crops_are_varied_independently_while_training_and_not_in_eval_mode():
    augment = [{"name": "brightness", "shift": [-0.5, 0.5]}]
    method = VoCo(Config.parse({**TINY, "augment": augment}), encoder=encoder(), seed=0)
    data = batch()
    same = {**data.tensors, "bases": torch.ones_like(data["bases"]), "targets": torch.ones_like(data["targets"])}
    crops = method.prepare(Batch(same, data.seeds, data.case_ids), training=True)
    shifts = torch.cat([crops["targets"].flatten(0, 1), crops["bases"].flatten(0, 1)]).flatten(1).mean(dim=1)
    assert len({round(float(shift), 6) for shift in shifts}) == len(shifts)
    plain = method.prepare(data, training=False)
    assert torch.equal(plain["bases"], data["bases"])
    assert torch.equal(plain["targets"], data["targets"])
    assert crops.notes["fallback"].shape == (len(data),)


@pytest.mark.parametrize(("name", "code"), [("mirror", "E_MIRROR"), ("affine", "E_POSITION_AUGMENT")])
def test_augments_that_move_a_crop_are_refused(name, code):
    with pytest.raises(ConfigError, match=name) as caught:
        voco(augment=[{"name": name}])
    assert caught.value.code == code


def test_augments_in_mm_go_by_the_voxel_size_of_each_crop():
    method = VoCo(
        Config.parse({**TINY, "augment": [{"name": "blur", "sigma_mm": [2.0, 2.0]}]}), encoder=encoder(), seed=0
    )
    data = batch()
    spacing = torch.full((2, 4, 3), 8.0, dtype=torch.float64)
    spacing[1] = 0.5
    geometry = {"bases_to_box": torch.eye(4, dtype=torch.float64).repeat(2, 4, 1, 1), "bases_spacing_mm": spacing}
    made = method.prepare(data.with_tensors({**data.tensors, **geometry}), training=True)
    coarse, fine = (made["bases"][n].std() / data["bases"][n].std() for n in range(2))
    assert coarse > 0.9
    assert fine < 0.3


def test_feature_dropout_drops_elements_and_never_whole_samples():  # methods.md 2.5
    method = voco(preset="v2", feature_dropout=0.5)
    torch.manual_seed(0)
    dropped = method.dropout(torch.ones(500, 12))
    assert (dropped == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (dropped != 0).any(dim=1).float().mean() > 0.99
    assert (method.eval().dropout(torch.ones(5, 12)) == 1).all()


def test_inter_follows_the_next_volume():  # methods.md 2.3
    method = voco(teacher="head", detach_bases=True, inter=True, inter_min_similarity=0.0).eval()
    losses = losses_of(method, batch())
    assert 0 < float(losses.monitors["inter_share"]) <= 1
    assert float(losses.monitors["inter_label_mass"]) > 0
    with pytest.raises(ConfigError, match="batch_size"):
        losses_of(method, batch(volumes=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_mm": [8.0, 8.0, 8.0]}, "cell_mm has no effect"),
        ({"grid": [1, 1, 1]}, "fewer than two bases"),
        ({"crop_voxels": [0, 8, 8]}, "at least 1"),
        ({"pos_weight": "all"}, "go together"),
        ({"neg_form": "paper"}, "go together"),
        ({"projector_channels": [32, 4]}, "orthogonal bases"),
        ({"preset": "nnssl", "inter": True}, "inter needs a teacher"),
        ({"teacher": "head", "detach_bases": False}, "teacher head goes with detach_bases"),
        ({"momentum": [0.9, 1.1]}, "0 to 1"),
        ({"reg_bases": 3}, "detach_bases"),
        ({"preset": "v2", "reg_bases": 3}, "detach_bases and no inter"),
        ({"preset": "released", "reg_bases": 3}, "projector_norm layer"),
        ({"detach_bases": True, "reg_bases": 9}, "more than 4 bases"),
        ({"preset": "v3"}, "preset"),
        ({"pos_wieght": "all"}, "Did you mean pos_weight"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Config.parse({**TINY, **options}, source="voco")


def test_views_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="ask for 4 of"):
        losses_of(voco(), batch(crop=(8, 8, 4)))
    with pytest.raises(ConfigError, match="9 bases"):
        losses_of(voco(), batch(grid=(3, 3, 1)))


def test_images_in_two_dimensions_work_and_a_thick_crop_is_refused():
    config = Config.parse({**TINY, "crop_voxels": [8, 8, 1]})
    method = VoCo(config, encoder=encoder(spatial_dims=2), seed=0)
    assert torch.isfinite(losses_of(method, batch(crop=(8, 8))).total)
    with pytest.raises(ConfigError, match="must be 1"):
        VoCo(Config.parse(TINY), encoder=encoder(spatial_dims=2), seed=0)


def test_sampler_has_the_configured_grid_and_mode():
    method = voco(num_targets=3, position_mode="crop", cell_mm=[8.0, 8.0, 8.0])
    sampler = method.view_sampler()
    assert (sampler.grid, sampler.crop_voxels, sampler.num_targets) == ((2, 2, 1), (8, 8, 8), 3)
    assert (sampler.position_mode, sampler.cell_mm) == ("crop", (8.0, 8.0, 8.0))


def test_correlation_and_agreement_are_those_of_numpy():
    generator = torch.Generator().manual_seed(0)
    s, y = torch.rand(3, 2, 5, generator=generator), torch.rand(3, 2, 5, generator=generator)
    assert float(pearson(s, y)) == pytest.approx(np.corrcoef(s.flatten(), y.flatten())[0, 1], abs=1e-6)
    agree = (s.argmax(-1) == y.argmax(-1)).float().mean()
    assert float(top1(s, y)) == pytest.approx(float(agree), abs=1e-6)
    assert float(pearson(torch.ones(1, 1, 4), torch.rand(1, 1, 4))) == 0.0
    assert float(top1(torch.tensor([[[0.1, 0.9, 0.0]]]), torch.tensor([[[0.5, 0.5, 0.0]]]))) == 1.0

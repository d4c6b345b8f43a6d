"""Overlap losses against numbers worked out by hand in methods.md 1.11 and against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from medssl.errors import CaseError
from medssl.losses.overlap import base_regulariser, consistency_terms, overlap_terms, rectified_cosine
from medssl.views import grid_boxes, overlap_fractions

EPS = 1e-6

# T2: y = (0.75, 0.25, 0, 0), s = (0.8, 0.1, 0.3, 0)
Y = torch.tensor([[[0.75, 0.25, 0.0, 0.0]]])
S = torch.tensor([[[0.8, 0.1, 0.3, 0.0]]])


def random_pairs(*, volumes=3, targets=2, bases=9, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.concatenate([rng.integers(0, 129, (volumes * targets, 2)), np.zeros((volumes * targets, 1))], axis=1)
    boxes = np.stack([starts, np.full_like(starts, 64)], axis=1)
    overlap = overlap_fractions(boxes, grid_boxes((3, 3, 1), (64, 64, 64)))[:, :bases]
    overlap = torch.from_numpy(overlap).float().view(volumes, targets, bases)
    return torch.from_numpy(rng.random(overlap.shape)).float() * 0.99, overlap


def loops(similarity, overlap, pos_weight, neg_form):
    """The formulas of methods.md 1.4 and 1.5, volume by volume and pair by pair."""
    pos, neg = [], []
    for s, y in zip(similarity.tolist(), overlap.tolist(), strict=True):
        pairs = [(s[r][k], y[r][k]) for r in range(len(s)) for k in range(len(s[r]))]
        weight = {"overlap": lambda v: v, "indicator": lambda v: float(v > 0), "all": lambda v: 1.0}[pos_weight]
        top = -sum(weight(b) * math.log(1 - abs(b - a) + EPS) for a, b in pairs)
        pos.append(top / sum(weight(b) for _, b in pairs))
        penalty = {"square": lambda v: v * v, "log": lambda v: -math.log(1 - v + EPS), "paper": lambda v: 0.0}[neg_form]
        apart = [a for a, b in pairs if b == 0]
        neg.append(sum(penalty(a) for a in apart) / (len(apart) + EPS))
    return sum(pos) / len(pos), sum(neg) / len(neg)


@pytest.mark.parametrize(
    ("centre", "indices", "values"),
    [
        ((48, 48), [0], [1.0]),
        ((96, 96), [0, 1, 4, 5], [0.25] * 4),
        ((72, 120), [0, 1, 4, 5], [0.1875, 0.5625, 0.0625, 0.1875]),
    ],
)
def test_labels_of_a_four_by_four_grid_are_those_of_the_reference(centre, indices, values):  # T1
    box = np.array([[[centre[0] - 48, centre[1] - 48, 0], [96, 96, 96]]], dtype=float)
    label = overlap_fractions(box, grid_boxes((4, 4, 1), (96, 96, 96)))[0]
    assert np.flatnonzero(label).tolist() == indices
    np.testing.assert_allclose(label[indices], values, atol=1e-12)


def test_labels_of_a_grid_in_three_dimensions_are_those_of_the_reference():  # T1
    bases = grid_boxes((2, 2, 2), (64, 64, 64))
    label = overlap_fractions(np.array([[[16, 32, 48], [64, 64, 64]]], dtype=float), bases)[0]
    assert label[0] == pytest.approx(0.09375, abs=1e-12)
    assert label[1] == pytest.approx(0.28125, abs=1e-12)
    middle = overlap_fractions(np.array([[[32, 32, 32], [64, 64, 64]]], dtype=float), bases)[0]
    np.testing.assert_allclose(middle, 0.125, atol=1e-12)


@pytest.mark.parametrize(("grid", "most"), [((4, 4, 1), 4), ((3, 3, 3), 8)])
def test_labels_sum_to_one_and_equal_a_count_of_voxels(grid, most):  # T1
    edge = 6
    rng = np.random.default_rng(1)
    starts = rng.integers(0, (np.array(grid) - 1) * edge + 1, size=(1000, 3))
    boxes = np.stack([starts, np.full_like(starts, edge)], axis=1).astype(float)
    labels = overlap_fractions(boxes, grid_boxes(grid, (edge,) * 3))
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    assert (labels > 0).sum(axis=1).max() <= most
    cell = np.zeros(np.array(grid) * edge, dtype=int)
    for n, (i, j, k) in enumerate(itertools.product(*map(range, grid))):
        cell[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge, k * edge : (k + 1) * edge] = n
    for start, label in zip(starts, labels, strict=True):
        x, y, z = start
        found = np.bincount(cell[x : x + edge, y : y + edge, z : z + edge].ravel(), minlength=math.prod(grid))
        np.testing.assert_allclose(label, found / edge**3, atol=1e-12)


@pytest.mark.parametrize(
    ("pos_weight", "neg_form", "pos", "neg"),
    [
        ("overlap", "square", 0.0790985, 0.0450),
        ("overlap", "log", 0.0790985, 0.1783362),
        ("indicator", "square", 0.1069049, 0.0450),
        ("all", "paper", 0.1426218, 0.0),
    ],
)
def test_loss_by_hand(pos_weight, neg_form, pos, neg):  # T2
    terms = overlap_terms(S, Y, pos_weight=pos_weight, neg_form=neg_form)
    assert float(terms.pos) == pytest.approx(pos, abs=1e-4)
    assert float(terms.neg) == pytest.approx(neg, abs=1e-4)


@pytest.mark.parametrize("pos_weight", ["overlap", "indicator", "all"])
@pytest.mark.parametrize("neg_form", ["square", "log", "paper"])
def test_loss_equals_the_formula_in_loops(pos_weight, neg_form):
    similarity, overlap = random_pairs()
    terms = overlap_terms(similarity, overlap, pos_weight=pos_weight, neg_form=neg_form)
    pos, neg = loops(similarity, overlap, pos_weight, neg_form)
    assert float(terms.pos) == pytest.approx(pos, abs=1e-5)
    assert float(terms.neg) == pytest.approx(neg, abs=1e-5)


@pytest.mark.parametrize(
    ("pos_weight", "neg_form"), [("overlap", "square"), ("overlap", "log"), ("indicator", "square"), ("all", "paper")]
)
def test_zero_is_reached_by_the_ideal_embedding(pos_weight, neg_form):  # T3
    _, overlap = random_pairs()
    bases = torch.eye(16)[:9].expand(3, -1, -1)
    # x = Σ y_k b_k + √(1 − ‖y‖²) e⊥
    rest = (1 - overlap.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    targets = overlap @ bases + rest * torch.eye(16)[9]
    terms = overlap_terms(rectified_cosine(targets, bases), overlap, pos_weight=pos_weight, neg_form=neg_form)
    total = terms.pos + terms.neg + base_regulariser(bases)
    assert abs(float(total)) < 1e-5


def test_embedding_without_the_orthogonal_part_stays_above_zero():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 289, (4000, 3)) * [1, 1, 0]
    boxes = np.stack([starts, np.full_like(starts, 96)], axis=1).astype(float)
    overlap = torch.from_numpy(overlap_fractions(boxes, grid_boxes((4, 4, 1), (96, 96, 96)))).float()[:, None]
    bases = torch.eye(16).expand(len(overlap), -1, -1)
    terms = overlap_terms(rectified_cosine(overlap @ bases, bases), overlap)
    assert 0.24 < float(terms.pos) < 0.29  # methods.md 1.7: about 0.25 to 0.28


def test_symmetric_regulariser_gives_every_base_a_gradient():  # T4
    bases = (torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.1).requires_grad_()
    base_regulariser(bases).backward()
    assert (bases.grad.norm(dim=-1) > 0).all()


def test_one_sided_regulariser_leaves_the_last_base_alone():  # T4, methods.md 1.4
    bases = (torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.1).requires_grad_()
    base_regulariser(bases, symmetric=False).backward()
    assert (bases.grad[:, -1] == 0).all()
    assert (bases.grad[:, :-1].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("power", [1, 2])
def test_regulariser_equals_the_formula_in_loops(power):
    bases = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    means = []
    for volume in bases.tolist():
        values = []
        for i, j in itertools.combinations(range(4), 2):
            dot = sum(a * b for a, b in zip(volume[i], volume[j], strict=True))
            norms = math.sqrt(sum(a * a for a in volume[i])) * math.sqrt(sum(b * b for b in volume[j]))
            values.append(max(0.0, dot / norms) ** power)
        means.append(sum(values) / len(values))
    assert float(base_regulariser(bases, power=power)) == pytest.approx(sum(means) / 3, abs=1e-6)


def test_mean_of_the_regulariser_over_all_subsets_is_its_value_over_all_bases():  # methods.md 1.4b
    bases = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2)).double()
    subsets = [base_regulariser(bases[:, list(chosen)]) for chosen in itertools.combinations(range(6), 3)]
    assert float(torch.stack(subsets).mean()) == pytest.approx(float(base_regulariser(bases)), abs=1e-6)


def test_order_of_bases_and_of_volumes_does_not_matter():  # T6
    generator = torch.Generator().manual_seed(3)
    _, overlap = random_pairs()
    targets, bases = (torch.randn(3, n, 16, generator=generator) for n in (2, 9))

    def total(order_of_bases, order_of_volumes):
        x, b, y = targets[order_of_volumes], bases[order_of_volumes], overlap[order_of_volumes]
        b, y = b[:, order_of_bases], y[..., order_of_bases]
        return float(sum(overlap_terms(rectified_cosine(x, b), y)) + base_regulariser(b))

    plain = total(list(range(9)), [0, 1, 2])
    assert total([4, 0, 8, 2, 6, 1, 3, 7, 5], [0, 1, 2]) == pytest.approx(plain, abs=1e-6)
    assert total(list(range(9)), [2, 0, 1]) == pytest.approx(plain, abs=1e-6)


def test_target_without_overlap_is_refused():  # T7
    overlap = Y.clone()
    overlap[...] = 0
    with pytest.raises(CaseError, match="overlaps no base") as caught:
        overlap_terms(S, overlap)
    assert caught.value.code == "E_NO_OVERLAP"
    assert isinstance(caught.value, ValueError)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes must be equal"):
        overlap_terms(S, Y[..., :3])


def test_regulariser_of_a_single_base_is_refused():
    with pytest.raises(ValueError, match="a pair needs two"):
        base_regulariser(torch.ones(1, 1, 4))


def test_extreme_disagreement_is_finite_with_finite_gradient():
    similarity = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    overlap = torch.tensor([[[1.0, 0.0]]])
    for neg_form in ("square", "log"):
        similarity.grad = None
        terms = overlap_terms(similarity, overlap, neg_form=neg_form)
        (terms.pos + terms.neg).backward()
        assert torch.isfinite(terms.pos + terms.neg)
        assert torch.isfinite(similarity.grad).all()
    assert float(terms.pos.detach()) == pytest.approx(-math.log(EPS), rel=1e-3)


def test_volume_whose_targets_overlap_all_bases_has_no_negatives():
    overlap = torch.full((1, 1, 4), 0.25)
    terms = overlap_terms(torch.full((1, 1, 4), 0.9), overlap)
    assert float(terms.neg) == 0.0


def test_losses_are_float32_under_autocast_and_equal_to_those_without():
    generator = torch.Generator().manual_seed(5)
    targets, bases = (torch.randn(1, n, 32, generator=generator) for n in (1, 4))
    plain = sum(overlap_terms(rectified_cosine(targets, bases), Y)) + base_regulariser(bases)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sum(overlap_terms(rectified_cosine(targets, bases), Y)) + base_regulariser(bases)
    assert mixed.dtype == torch.float32
    assert float(mixed) == float(plain)


def test_zero_embedding_is_similar_to_nothing_and_has_finite_gradient():
    targets = torch.zeros(1, 1, 4, requires_grad=True)
    similarity = rectified_cosine(targets, torch.eye(4)[None])
    sum(overlap_terms(similarity, Y)).backward()
    assert (similarity == 0).all()
    assert torch.isfinite(targets.grad).all()


def test_consistency_follows_the_formula_for_targets_that_count():  # methods.md 2.3
    label = torch.tensor([[[0.75, 0.25, 0.0, 0.0], [0.05, 0.0, 0.0, 0.0]]])
    similarity = torch.tensor([[[0.8, 0.1, 0.3, 0.0], [0.9, 0.9, 0.9, 0.9]]])
    terms, counts = consistency_terms(similarity, label, min_label=0.1)
    assert counts.tolist() == [[True, False]]
    assert float(terms.pos) == pytest.approx(0.0790985, abs=1e-4)
    assert float(terms.neg) == pytest.approx(0.1783362, abs=1e-4)


def test_consistency_without_any_similar_base_is_zero_with_a_gradient():  # methods.md 2.5
    similarity = torch.rand(2, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms, counts = consistency_terms(similarity, torch.zeros(2, 1, 4), min_label=0.1)
    (terms.pos + terms.neg).backward()
    assert not counts.any()
    assert float((terms.pos + terms.neg).detach()) == 0.0
    assert (similarity.grad == 0).all()


def test_consistency_label_takes_no_gradient():
    label = torch.full((1, 1, 4), 0.5, requires_grad=True)
    similarity = torch.full((1, 1, 4), 0.2, requires_grad=True)
    terms, _ = consistency_terms(similarity, label, min_label=0.1)
    terms.pos.backward()
    assert label.grad is None
    assert similarity.grad.abs().sum() > 0

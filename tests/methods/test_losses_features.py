"""The losses on maps and on samples' relations: against the papers' formulas in float64, by hand, at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcli.methods.losses import features as losses
from kdcli.methods.losses.contrast import contrastive
from tests import formulas
from tests.formulas import Array, normal

VARIANCE = np.array([0.5, 2.0, 3.0])
Losses = dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Array, Array], float]]]
MAPS: Losses = {
    "hint": (losses.hint, formulas.hint),
    "attention": (losses.attention, formulas.attention),
    "variational": (
        lambda s, t: losses.variational(s, torch.from_numpy(VARIANCE), t),
        lambda s, t: formulas.variational(s, VARIANCE, t),
    ),
    "review": (losses.review, formulas.review),
}
RELATIONS: Losses = {
    "similarity": (losses.similarity, formulas.similarity),
    "relational": (losses.relational, lambda s, t: formulas.relational(s, t, 25, 50)),
    "probabilistic": (losses.probabilistic, formulas.probabilistic),
}
BOTH = MAPS | RELATIONS
SIZES = [((3, 6, 6), (3, 6, 6)), ((3, 8, 8), (3, 4, 4)), ((3, 3, 5), (3, 7, 5)), ((3, 1, 1), (3, 2, 2))]


def tensors(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


def check(loss: Callable[[Tensor, Tensor], Tensor], expected: float, student: Array, teacher: Array) -> None:
    assert loss(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-6, abs=1e-14)
    single = loss(*tensors(student, teacher, dtype=torch.float32))
    assert single.dtype == torch.float32
    assert single.shape == ()
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_equals_the_formula_at_the_smaller_of_two_sizes(
    name: str, sizes: tuple[tuple[int, ...], ...]
) -> None:
    loss, formula = MAPS[name]
    student, teacher = normal(4, *sizes[0], seed=1), normal(4, *sizes[1], seed=2)
    check(loss, formula(student, teacher), student, teacher)


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((3, 2, 2), (7,)), ((1,), (2,))], ids=str)
@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize("name", RELATIONS)
def test_relations_equal_the_formula_whatever_the_widths(
    name: str, batch: int, shapes: tuple[tuple[int, ...], ...]
) -> None:
    loss, formula = RELATIONS[name]
    student, teacher = normal(batch, *shapes[0], seed=3), 5 + normal(batch, *shapes[1], seed=4)
    check(loss, formula(student, teacher), student, teacher)


@pytest.mark.parametrize("name", RELATIONS)
def test_one_sample_has_no_relations(name: str) -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    loss = RELATIONS[name][0](student, torch.ones(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert float(student.grad.abs().max()) == 0


@pytest.mark.parametrize("name", BOTH)
def test_half_types_are_promoted(name: str) -> None:
    loss = BOTH[name][0]
    half = tensors(normal(4, 3, 5, 5, seed=5), normal(4, 3, 5, 5, seed=6), dtype=torch.bfloat16)
    single = loss(half[0].float(), half[1].float())
    assert torch.equal(loss(*half), single)
    assert single.dtype == torch.float32
    assert loss(half[0].double(), half[1]).dtype == torch.float64


@pytest.mark.parametrize("name", BOTH)
def test_gradient_is_the_derivative_and_the_teacher_gets_none(name: str) -> None:
    loss = BOTH[name][0]
    student, teacher = tensors(normal(3, 3, 2, 2, seed=7), normal(3, 3, 2, 2, seed=8))
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)
    loss(student, teacher).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", ["zero", "both zero", "equal", "two alike", "large", "opposite"])
def test_loss_and_gradient_are_finite_at_the_edges(name: str, kind: str) -> None:
    some, other = normal(4, 3, 2, 2, seed=9), normal(4, 3, 2, 2, seed=10)
    zero, one = np.zeros_like(some), np.ones_like(some)
    alike = some.copy()
    alike[1] = alike[0]
    alike[2] = 0
    cases = {
        "zero": (zero, other),
        "both zero": (zero, zero),
        "equal": (0.7 * one, other),
        "two alike": (alike, other),
        "large": (1e4 * some, other),
        "opposite": (some * np.array([1, -1, 1, -1])[:, None, None, None], other),
    }
    student, teacher = tensors(*cases[kind], dtype=torch.float32)
    student.requires_grad_()
    found = BOTH[name][0](student, teacher)
    found.backward()
    assert math.isfinite(found.item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) < 1e4  # an ε in a denominator would give 1e7 and more


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([name for name in BOTH if name != "variational"]), st.integers(0, 10**6))
def test_zero_where_the_student_is_the_teacher_and_never_below(name: str, seed: int) -> None:
    loss = BOTH[name][0]
    student, teacher = tensors(normal(4, 2, 3, 3, seed=seed), normal(4, 2, 3, 3, seed=seed + 1))
    assert loss(student, student).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher).item() > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(0.01, 100))
def test_attention_and_relations_are_blind_to_scale(seed: int, scale: float, other_scale: float) -> None:
    student, teacher = tensors(normal(4, 2, 3, 3, seed=seed), normal(4, 2, 3, 3, seed=seed + 1))
    for loss in (losses.attention, losses.similarity, losses.relational, losses.probabilistic):
        plain = loss(student, teacher).item()
        assert loss(scale * student, other_scale * teacher).item() == pytest.approx(plain, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_relational_is_blind_to_rotation_and_shift(seed: int) -> None:
    student, teacher, turn, shift = tensors(
        normal(5, 4, seed=seed),
        normal(5, 3, seed=seed + 1),
        normal(4, 4, seed=seed + 2),
        normal(1, 4, seed=seed),
    )
    turned = student @ torch.linalg.qr(turn)[0] + 10 * shift
    expected = losses.relational(student, teacher).item()
    assert losses.relational(turned, teacher).item() == pytest.approx(expected, rel=1e-7)


def test_relational_is_as_precise_far_from_zero() -> None:
    """Float32 products of such embeddings hold no more than whole numbers."""
    student, teacher = tensors(500 + normal(6, 20, seed=14), normal(6, 4, seed=15), dtype=torch.float32)
    expected = formulas.relational(student.double().numpy(), teacher.double().numpy(), 25, 50)
    assert losses.relational(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_relational_of_two_samples_that_are_the_same_has_no_angle_there() -> None:
    student, teacher = tensors(normal(4, 20, seed=16), normal(4, 4, seed=17), dtype=torch.float32)
    student[1] = student[0]
    expected = formulas.relational(student.double().numpy(), teacher.double().numpy(), 25, 50)
    for scale in (1.0, 2.0**13):  # what rounding leaves of their difference is large then
        assert losses.relational(scale * student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_the_mean_does_not_change_when_the_batch_is_there_twice(name: str) -> None:
    loss = MAPS[name][0]
    student, teacher = tensors(normal(3, 3, 5, 5, seed=11), normal(3, 3, 5, 5, seed=12))
    twice = loss(torch.cat([student] * 2), torch.cat([teacher] * 2))
    torch.testing.assert_close(twice, loss(student, teacher))


# --- each by hand -------------------------------------------------------------------------------------------


def maps(values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def test_hint_by_hand() -> None:
    student, teacher = maps([1, 2, 3, 4], 1, 1, 2, 2), maps([1, 0, 3, 8], 1, 1, 2, 2)
    assert losses.hint(student, teacher).item() == 5.0  # (0 + 4 + 0 + 16)/4
    # a teacher of 1×1 sees the student's mean, 2.5
    assert losses.hint(student, maps([1.5], 1, 1, 1, 1)).item() == 1.0


def test_attention_by_hand() -> None:
    """Q is (3, 4) and (0, 25): (0.6, 0.8) and (0, 1)."""
    student = maps([1, 1, 1, 1, 1, 1, 0, 1], 1, 4, 1, 2)
    teacher = maps([0, 5], 1, 1, 1, 2)
    assert losses.attention(student, teacher).item() == pytest.approx((0.36 + 0.04) / 2, rel=1e-12)


def test_variational_by_hand() -> None:
    mean, teacher = maps([1, 2], 1, 2, 1, 1), maps([3, 2], 1, 2, 1, 1)
    found = losses.variational(mean, torch.tensor([4.0, 1.0]), teacher)
    assert found.item() == pytest.approx((0.5 + math.log(2)) / 2, rel=1e-6)  # ½(4/4 + log 4) and 0


def test_review_by_hand() -> None:
    """Differences 1, 1, 1, −1 at 2×2, their mean ½ at 1×1: (1 + ½·¼)/1.5."""
    zero, student = torch.zeros(1, 1, 2, 2).double(), maps([1, 1, 1, -1], 1, 1, 2, 2)
    assert losses.review(student, zero).item() == pytest.approx(0.75, rel=1e-12)
    assert losses.review(maps([3], 1, 1, 1, 1), maps([1], 1, 1, 1, 1)).item() == 4.0


def test_similarity_by_hand() -> None:
    """Unit matrix against one whose entries are all 1/√2."""
    student, teacher = torch.eye(2).double(), maps([1, 0, 1, 0], 2, 2)
    expected = (2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4
    assert losses.similarity(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_relational_by_hand() -> None:
    """Places 0, 1, 3 on a line: distances over their mean ½, 1, 1½, cosines 1, −1, 1. Equilateral: 1 and ½."""
    student = maps([0, 1, 3], 3, 1)
    teacher = maps([0, 0, 1, 0, 0.5, math.sqrt(0.75)], 3, 2)
    distance = 2 * (0.125 + 0 + 0.125) / 9
    angle = 2 * (0.125 + 1.0 + 0.125) / 27
    assert losses.relational(student, teacher, 1.0, 0.0).item() == pytest.approx(distance, rel=1e-9)
    assert losses.relational(student, teacher, 0.0, 1.0).item() == pytest.approx(angle, rel=1e-9)
    assert losses.relational(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-9)


def test_probabilistic_by_hand() -> None:
    """Right angles: rows (⅔, ⅓); the same direction: (½, ½)."""
    teacher = maps([1, 2, 2, 4], 2, 2)
    row = 0.5 * math.log(0.75) + 0.5 * math.log(1.5)
    found = losses.probabilistic(maps([3, 0, 0, 1], 2, 2), teacher)
    assert found.item() == pytest.approx(2 * row / 4, rel=1e-5)


def test_contrastive_by_hand() -> None:
    """P = 1 for the positive, ½ for one negative of two samples: h = ⅔ and ½, together log 3."""
    scores = torch.tensor([[1.0, 0.5]]).double().log()
    assert contrastive(scores, 2).item() == pytest.approx(math.log(3), rel=1e-12)


def test_contrastive_equals_the_formula_and_has_its_gradient() -> None:
    log_scores = normal(5, 8, seed=13, scale=3)
    check(lambda s, _: contrastive(s, 50), formulas.contrastive(log_scores, 50), log_scores, log_scores)
    (scores,) = tensors(log_scores)
    assert torch.autograd.gradcheck(lambda s: contrastive(s, 50), scores.requires_grad_())
    torch.testing.assert_close(contrastive(torch.cat([scores] * 2), 50), contrastive(scores, 50))
    half = scores.detach().bfloat16()
    assert torch.equal(contrastive(half, 50), contrastive(half.float(), 50))


def test_contrastive_is_finite_for_scores_that_no_float_holds() -> None:
    scores = torch.tensor([[-300.0, 300.0, -300.0], [300.0, -300.0, -300.0]], requires_grad=True)
    found = contrastive(scores, 4)
    found.backward()
    assert found.item() == pytest.approx((300 + math.log(0.5) + 300 - math.log(0.5)) / 2, rel=1e-6)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()

"""The losses on logits against the papers' formulas in float64, against numbers by hand, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcli.methods.losses import logits as losses
from tests import formulas
from tests.formulas import Array, normal


def labels_of(logits: Array | Tensor) -> list[int]:
    """Some labels, the same for the same shape."""
    return [(3 * sample + 1) % logits.shape[1] for sample in range(len(logits))]


def decoupled(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    return losses.decoupled(student, teacher, torch.tensor(labels_of(student)), tau, 1.0, 8.0)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Array, Array], float]]] = {
    "logits": (losses.logit_regression, lambda s, t: 0.5 * ((s - t) ** 2).sum() / len(s)),
    "kd": (lambda s, t: losses.kd_loss(s, t, 3.0), lambda s, t: formulas.instances(s, t, 3.0)),
    "lskd": (
        lambda s, t: losses.kd_loss(losses.standardize(s), losses.standardize(t), 2.0),
        lambda s, t: formulas.instances(formulas.standardized(s), formulas.standardized(t), 2.0),
    ),
    "dkd": (
        decoupled,
        lambda s, t: float(formulas.decoupled(s, t, labels_of(s), 4.0, 1.0, 8.0).mean()),
    ),
    "dist": (
        lambda s, t: losses.dist(s, t, 4.0, 2.0, 3.0),
        lambda s, t: formulas.dist(s, t, 4.0, 2.0, 3.0),
    ),
    "mlkd": (
        lambda s, t: losses.multi_level(s, t, (2.0, 3.0, 6.0)),
        lambda s, t: formulas.multi_level(s, t, (2.0, 3.0, 6.0)),
    ),
}
SHAPES = [(2, 3), (5, 10), (4, 2), (16, 30)]


def tensors(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_formula(name: str, shape: tuple[int, int]) -> None:
    loss, formula = LOSSES[name]
    student, teacher = normal(*shape, seed=1, scale=4), normal(*shape, seed=2, scale=4)
    expected = formula(student, teacher)
    assert loss(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-6, abs=1e-14)
    single = loss(*tensors(student, teacher, dtype=torch.float32))
    assert single.dtype == torch.float32
    assert single.shape == ()
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_formula_where_a_class_has_next_to_no_probability(name: str) -> None:
    loss, formula = LOSSES[name]
    student, teacher = normal(4, 5, seed=3), normal(4, 5, seed=4)
    student[:, 1] -= 150
    teacher[:, 1] -= 170  # e^(−150/4) is below what an ε of 1e-8 would see
    student[0, 2] += 100
    expected = formula(student, teacher)
    assert loss(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-6)
    single = loss(*tensors(student, teacher, dtype=torch.float32))
    assert single.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_types_are_promoted(name: str) -> None:
    loss = LOSSES[name][0]
    half = tensors(normal(4, 6, seed=5), normal(4, 6, seed=6), dtype=torch.bfloat16)
    found = loss(*half)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(half[0].float(), half[1].float()))
    assert loss(half[0].double(), half[1]).dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative_and_the_teacher_gets_none(name: str) -> None:
    loss = LOSSES[name][0]
    student, teacher = tensors(normal(3, 4, seed=7), normal(3, 4, seed=8))
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)
    loss(student, teacher).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["extreme", "opposite", "zero", "equal", "one sample"])
def test_loss_and_gradient_are_finite_at_the_edges(name: str, kind: str) -> None:
    signs = np.sign(normal(4, 5, seed=9))
    cases = {
        "extreme": (50 * signs, -50 * np.sign(normal(4, 5, seed=10))),
        "opposite": (50 * signs, -50 * signs),
        "zero": (np.zeros((4, 5)), normal(4, 5, seed=11)),
        "equal": (np.full((4, 5), 3.3), np.full((4, 5), 0.1)),
        "one sample": (normal(1, 5, seed=12), normal(1, 5, seed=13)),
    }
    student, teacher = tensors(*cases[kind], dtype=torch.float32)
    student.requires_grad_()
    found = LOSSES[name][0](student, teacher)
    found.backward()
    assert math.isfinite(found.item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) < 1e3  # an ε in a denominator would give 1e7 and more


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*LOSSES]), st.integers(2, 7), st.integers(2, 9), st.integers(0, 10**6))
def test_zero_where_the_student_is_the_teacher_and_never_below(
    name: str, batch: int, classes: int, seed: int
) -> None:
    loss = LOSSES[name][0]
    student, teacher = tensors(normal(batch, classes, seed=seed), normal(batch, classes, seed=seed + 1))
    assert loss(student, student).item() == pytest.approx(0, abs=1e-9)
    assert loss(student, teacher).item() >= -1e-9


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([name for name in LOSSES if name != "logits"]),
    st.integers(0, 10**6),
    st.floats(-20, 20),
    st.floats(-20, 20),
)
def test_a_shift_of_all_logits_changes_nothing(
    name: str, seed: int, shift: float, other_shift: float
) -> None:
    loss = LOSSES[name][0]
    student, teacher = tensors(normal(4, 5, seed=seed), normal(4, 5, seed=seed + 1))
    plain = loss(student, teacher).item()
    assert loss(student + shift, teacher + other_shift).item() == pytest.approx(plain, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mlkd"])
def test_the_mean_does_not_change_when_the_batch_is_there_twice(name: str) -> None:
    loss = LOSSES[name][0]
    student, teacher = tensors(normal(3, 4, seed=14), normal(3, 4, seed=15))
    labels = torch.tensor(labels_of(student))
    if name == "dkd":
        found = losses.decoupled(
            torch.cat([student] * 2), torch.cat([teacher] * 2), torch.cat([labels] * 2), 4.0, 1.0, 8.0
        )
    else:
        found = loss(torch.cat([student] * 2), torch.cat([teacher] * 2))
    assert found.item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)


# --- each by hand -------------------------------------------------------------------------------------------


def test_standardize_by_hand() -> None:
    found = losses.standardize(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]))
    # standard deviations 1 and √((4 + 4 + 16)/2) = √12
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-0.57735027, -0.57735027, 1.1547005]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0.1, 50), st.floats(-50, 50))
def test_standardize_is_blind_to_scale_and_shift(classes: int, seed: int, scale: float, shift: float) -> None:
    (logits,) = tensors(normal(3, classes, seed=seed))
    found = losses.standardize(scale * logits + shift)
    torch.testing.assert_close(found, losses.standardize(logits), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(3).double(), rtol=0, atol=1e-6)


HALVES = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]  # teacher, student


def logarithms(*rows: list[float], tau: float = 1.0) -> Tensor:
    return tau * torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_decoupled_by_hand(tau: float) -> None:
    """TCKD = ½ log 2 + ½ log ⅔ = 0.143841; NCKD of (½, ½) and (⅔, ⅓) = 0.058892; the second sample is right."""
    teacher, student = HALVES
    same = [0.2, 0.3, 0.5]
    found = losses.decoupled(
        logarithms(student, same, tau=tau),
        logarithms(teacher, same, tau=tau),
        torch.tensor([0, 2]),
        tau,
        1.0,
        8.0,
    )
    assert found.item() == pytest.approx(tau**2 * (0.14384104 + 8 * 0.05889152) / 2, rel=1e-6)


def test_decoupled_weighs_samples_and_divides_by_the_batch() -> None:
    student, teacher = normal(3, 4, seed=1), normal(3, 4, seed=2)
    each = formulas.decoupled(student, teacher, [0, 3, 1], 2.0, 0.5, 3.0)
    weights = np.array([0.0, 0.5, 2.0])
    found = losses.decoupled(
        *tensors(student, teacher), torch.tensor([0, 3, 1]), 2.0, 0.5, 3.0, torch.from_numpy(weights)
    )
    assert found.item() == pytest.approx((each * weights).sum() / 3, rel=1e-9)


def test_decoupled_parts_make_up_the_soft_targets() -> None:
    """Zhao et al., eq. 6: KL = TCKD + (1 − p_y)·NCKD."""
    student, teacher = tensors(normal(5, 6, seed=3, scale=3), normal(5, 6, seed=4, scale=3))
    labels = torch.tensor([0, 5, 2, 2, 1])
    other = 1 - (teacher / 3).softmax(dim=1)[torch.arange(5), labels]
    parts = losses.decoupled(student, teacher, labels, 3.0, 1.0, 0.0)
    parts = parts + losses.decoupled(student, teacher, labels, 3.0, 0.0, 1.0, other)
    torch.testing.assert_close(parts, losses.kd_loss(student, teacher, 3.0))


def test_decoupled_of_other_classes_equals_the_mask_of_the_authors_code() -> None:
    student, teacher = tensors(normal(5, 6, seed=5, scale=3), normal(5, 6, seed=6, scale=3))
    labels = torch.tensor([0, 5, 2, 2, 1])
    mask = 1000.0 * torch.nn.functional.one_hot(labels, 6)
    masked = losses.kd_loss(student - 4 * mask, teacher - 4 * mask, 4.0)
    torch.testing.assert_close(losses.decoupled(student, teacher, labels, 4.0, 0.0, 1.0), masked)


def test_decoupled_has_no_other_classes_of_two() -> None:
    student, teacher = tensors(normal(5, 2, seed=7), normal(5, 2, seed=8))
    labels = torch.tensor([0, 1, 1, 0, 1])
    assert losses.decoupled(student, teacher, labels, 4.0, 0.0, 8.0).item() == 0
    whole = losses.decoupled(student, teacher, labels, 4.0, 1.0, 8.0)
    torch.testing.assert_close(whole, losses.kd_loss(student, teacher, 4.0))


def test_dist_by_hand() -> None:
    """ρ of the rows is −½ and 1, of the columns 1, −1, 1: inter ¾, intra ⅔."""
    teacher, student = HALVES
    same = [0.2, 0.3, 0.5]
    sides = logarithms(student, same), logarithms(teacher, same)
    assert losses.dist(*sides, 1.0, 2.0, 3.0).item() == pytest.approx(2 * 0.75 + 3 * 2 / 3, rel=1e-9)
    assert losses.dist(2 * sides[0], 2 * sides[1], 2.0, 2.0, 3.0).item() == pytest.approx(4 * 3.5, rel=1e-9)
    # one sample: its row alone
    assert losses.dist(sides[0][:1], sides[1][:1], 1.0, 2.0, 3.0).item() == pytest.approx(3.0, rel=1e-9)


def test_dist_takes_what_does_not_vary_as_uncorrelated() -> None:
    student, teacher = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
    assert losses.dist(student, teacher, 2.0, 1.0, 1.0).item() == pytest.approx(8.0)


def test_multi_level_by_hand() -> None:
    """Of (½, ¼, ¼) and thirds: KL 0.058892; (⅜ − ⅓)²; (0.138889² + 4·0.013889² + 4·0.048611²)/3."""
    student, teacher = torch.zeros(1, 3).double(), logarithms(HALVES[0])
    once = 0.05889152 + 0.00173611 + 0.00983796
    assert losses.multi_level(student, teacher, [1.0]).item() == pytest.approx(once, rel=1e-6)
    assert losses.multi_level(student, teacher, [1.0, 1.0]).item() == pytest.approx(2 * once, rel=1e-6)


def test_multi_level_relates_the_samples() -> None:
    """Two samples: their products are part of it, and so a student that swaps them is not at 0 for the classes."""
    teacher, student = logarithms(*HALVES), logarithms(*HALVES[::-1])
    # each KL is ¼ log 2; PᵗPᵗᵀ and PᵗᵀPᵗ are those of the student
    assert losses.multi_level(student, teacher, [1.0]).item() == pytest.approx(0.25 * math.log(2), rel=1e-9)
    # a student that gives both samples the first's: PPᵀ = 0.375 for all, the teacher's off the diagonal 0.3125
    both = logarithms(HALVES[0], HALVES[0])
    # the classes' products: 0.1875, −0.1875 on the diagonal, 0.0625 four times, see the outer products
    expected = 0.125 * math.log(2) + 2 * 0.0625**2 / 2 + (2 * 0.1875**2 + 4 * 0.0625**2) / 3
    assert losses.multi_level(both, teacher, [1.0]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: losses.multi_level(s, t, [1e4]),
        lambda s, t: losses.decoupled(s, t, torch.tensor([0, 4, 2, 2]), 1e4, 1.0, 0.8),  # 1 − 1/C
    ],
    ids=["mlkd", "dkd"],
)
def test_gradient_tends_to_logit_matching_at_high_temperature(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    student, teacher = tensors(normal(4, 5, seed=0, scale=3), normal(4, 5, seed=1, scale=3))
    student, teacher = (side - side.mean(dim=1, keepdim=True) for side in (student, teacher))
    student.requires_grad_()
    loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 5 / 4, rtol=1e-2, atol=1e-4)

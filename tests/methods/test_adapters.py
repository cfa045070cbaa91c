"""Auxiliary modules: formulas, memory banks, state dict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli.methods.losses import features as losses
from kdcli.methods.losses.contrast import Contrast
from tests import formulas
from tests.formulas import Array, normal

STUDENT, TEACHER = (3, 4, 4), (5, 2, 2)
SAMPLES = torch.tensor([4, 0, 7])
NEGATIVES = torch.tensor([[1, 2, 3], [9, 8, 1], [0, 4, 4]])


def tensors(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


def weights(module: nn.Module) -> dict[str, Array]:
    """Parameters and buffers as numpy, float64."""
    return {name: value.double().numpy().copy() for name, value in module.state_dict().items()}


def contrast(**changes: float) -> Contrast:
    torch.manual_seed(0)
    return Contrast(6, 9, **{"samples": 10, "dim": 4, **changes}).double()


def review() -> losses.Review:
    torch.manual_seed(0)
    return losses.Review([(3, 8, 8), (4, 4, 4), (5, 1, 1)], [(2, 8, 8), (6, 2, 2), (7, 1, 1)]).double()


def review_maps(seed: int = 0, batch: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    student = [
        normal(batch, *shape, seed=seed + i) for i, shape in enumerate([(3, 8, 8), (4, 4, 4), (5, 1, 1)])
    ]
    teacher = [
        normal(batch, *shape, seed=seed + 9 + i) for i, shape in enumerate([(2, 8, 8), (6, 2, 2), (7, 1, 1)])
    ]
    return tensors(*student), tensors(*teacher)


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, list[Tensor], list[Tensor]], Tensor]]:
    """A fresh module in float64 and how it is called with lists of the two sides' tensors."""
    torch.manual_seed(0)
    if name == "contrast":
        return contrast(), lambda m, s, t: m(s[0], t[0], SAMPLES, NEGATIVES)
    if name == "review":
        return review(), lambda m, s, t: m(s, t)
    kinds = {"hint": losses.Hint, "variational": losses.Variational}
    return kinds[name](STUDENT, TEACHER).double(), lambda m, s, t: m(s[0], t[0])


def inputs(name: str, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    if name == "review":
        return review_maps(seed)
    shapes = ((6,), (9,)) if name == "contrast" else (STUDENT, TEACHER)
    student, teacher = tensors(normal(3, *shapes[0], seed=seed), normal(3, *shapes[1], seed=seed + 1))
    return [student], [teacher]


NAMES = ["hint", "variational", "contrast", "review"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_student_and_adapter_and_not_the_teacher(name: str) -> None:
    module, call = build(name)
    student, teacher = inputs(name)
    for side in (*student, *teacher):
        side.requires_grad_()
    loss = call(module, student, teacher)
    loss.backward()
    assert loss.shape == ()
    assert all(side.grad is not None and float(side.grad.abs().max()) > 0 for side in student)
    assert all(side.grad is None for side in teacher)
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative(name: str) -> None:
    module, call = build(name)
    student, teacher = inputs(name)
    if name == "contrast":
        call(module, student, teacher)  # its scale is a constant from now on
        module.eval()  # a memory that changed between two calls would be another function
    for side in student:
        side.requires_grad_()
    parameters = list(module.parameters())

    def loss(*values: Tensor) -> Tensor:
        return call(module, list(values[: len(student)]), teacher)

    assert torch.autograd.gradcheck(loss, (*student, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_promoted(name: str) -> None:
    module, call = build(name)
    module.float()
    sides = inputs(name)
    half = [[value.bfloat16() for value in side] for side in sides]
    whole = [[value.float() for value in side] for side in half]
    found = call(copy.deepcopy(module), *half)
    assert found.dtype == torch.float32
    assert torch.equal(found, call(copy.deepcopy(module), *whole))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_determines_the_next_losses(name: str) -> None:
    def steps(module: nn.Module, first: int, last: int) -> list[float]:
        found = []
        for step in range(first, last):
            loss = call(module, *inputs(name, seed=10 * step))
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            found.append(loss.item())
        return found

    module, call = build(name)
    steps(module, 0, 3)
    torch.manual_seed(99)
    resumed = build(name)[0]
    with torch.no_grad():
        for value in resumed.state_dict().values():
            value.copy_(
                value + 1 if value.is_floating_point() else ~value if value.dtype == torch.bool else value
            )
    resumed.load_state_dict(copy.deepcopy(module.state_dict()))
    assert steps(resumed, 3, 6) == steps(module, 3, 6)


@pytest.mark.parametrize("name", NAMES)
def test_adapter_weights_depend_on_the_seed(name: str) -> None:
    first, again = (weights(build(name)[0]) for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    torch.manual_seed(1)
    kinds = {
        "hint": lambda: losses.Hint(STUDENT, TEACHER),
        "variational": lambda: losses.Variational(STUDENT, TEACHER),
        "contrast": lambda: Contrast(6, 9, 10, 4),
        "review": lambda: losses.Review([(3, 8, 8)], [(2, 8, 8)]),
    }
    one, other = kinds[name](), kinds[name]()
    assert not torch.equal(next(one.parameters()), next(other.parameters())) or name == "variational"


# --- hint and variational -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_shape", "teacher_shape"), [(STUDENT, TEACHER), ((2, 3, 3), (2, 6, 6))])
def test_hint_equals_the_formula(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    module = losses.Hint(student_shape, teacher_shape).double()
    student, teacher = normal(3, *student_shape, seed=1), normal(3, *teacher_shape, seed=2)
    w = weights(module)
    s, t = formulas.same_size(student, teacher)
    expected = formulas.hint(formulas.convolved(s, w["regressor.weight"], w["regressor.bias"]), t)
    assert module(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-6)
    assert module.float()(*tensors(student, teacher, dtype=torch.float32)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_hint_always_regresses() -> None:
    module = losses.Hint((2, 3, 3), (2, 3, 3))
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * 2 + 2


@pytest.mark.parametrize(("student_shape", "teacher_shape"), [(STUDENT, TEACHER), ((2, 3, 3), (4, 6, 6))])
def test_variational_equals_the_formula(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]
) -> None:
    module = losses.Variational(student_shape, teacher_shape).double()
    student, teacher = normal(3, *student_shape, seed=1), normal(3, *teacher_shape, seed=2)
    with torch.no_grad():
        module.spread.copy_(torch.linspace(-3, 3, teacher_shape[0]))
    w = weights(module)
    mean, t = formulas.same_size(student, teacher)
    for layer in (0, 2, 4):
        mean = formulas.convolved(mean if layer == 0 else np.maximum(mean, 0), w[f"regressor.{layer}.weight"])
    variance = np.array([math.log(1 + math.exp(x)) + 1e-5 for x in w["spread"]])
    expected = formulas.variational(mean, variance, t)
    assert module(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-6)
    assert module.float()(*tensors(student, teacher, dtype=torch.float32)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_variances_start_at_five() -> None:
    """Of teacher's maps 0 and a student's 0 only the variance is left: ½ log 5."""
    module = losses.Variational((2, 3, 3), (4, 3, 3))
    loss = module(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))
    assert loss.item() == pytest.approx(0.5 * math.log(5), rel=1e-6)


# --- contrast -----------------------------------------------------------------------------------------------


def contrast_by_formula(
    w: dict[str, Array], student: Array, teacher: Array, temperature: float
) -> tuple[float, Array]:
    """The loss of a first batch, and its log Z of both anchors."""
    vectors = []
    for name, values in (("student", student), ("teacher", teacher)):
        embedded = values @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        vectors.append(embedded / np.sqrt((embedded**2).sum(axis=1, keepdims=True)))
    numbers = np.concatenate([SAMPLES.numpy()[:, None], NEGATIVES.numpy()], axis=1)
    total, scales = 0.0, []
    for anchors, bank in ((vectors[0], w["teacher_bank"]), (vectors[1], w["student_bank"])):
        scores = np.array(
            [
                [math.exp(v @ bank[n] / temperature) for n in row]
                for v, row in zip(anchors, numbers, strict=True)
            ]
        )
        scale = scores.mean() * len(bank)
        scales.append(math.log(scale))
        total += formulas.contrastive(np.log(scores / scale), len(bank))
    return total, np.array(scales)


@pytest.mark.parametrize("samples", [10, 100])  # all products, or those of the rows asked for
def test_contrast_equals_the_formula(samples: int) -> None:
    module = contrast(samples=samples)
    student, teacher = normal(3, 6, seed=1), normal(3, 9, seed=2)
    w = weights(module)
    expected, scales = contrast_by_formula(w, student, teacher, 0.07)
    found = module(*tensors(student, teacher), SAMPLES, NEGATIVES)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(weights(module)["log_scale"], scales, rtol=1e-9)
    single = contrast(samples=samples).float()
    found = single(*tensors(student, teacher, dtype=torch.float32), SAMPLES, NEGATIVES)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_contrast_scale_stays_that_of_the_first_batch() -> None:
    module = contrast()
    module(*tensors(normal(3, 6, seed=1), normal(3, 9, seed=2)), SAMPLES, NEGATIVES)
    first = weights(module)
    student, teacher = normal(3, 6, seed=3), normal(3, 9, seed=4)
    loss = module(*tensors(student, teacher), SAMPLES, NEGATIVES).item()
    assert np.array_equal(weights(module)["log_scale"], first["log_scale"])
    assert loss != pytest.approx(contrast_by_formula(first, student, teacher, 0.07)[0], rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_contrast_remembers_the_batch_alone_at_length_one(momentum: float) -> None:
    module = contrast(momentum=momentum)
    before = weights(module)
    student, teacher = normal(3, 6, seed=1), normal(3, 9, seed=2)
    module(*tensors(student, teacher), SAMPLES, NEGATIVES)
    after = weights(module)
    others = [n for n in range(10) if n not in SAMPLES.tolist()]
    for name, values in (("student", student), ("teacher", teacher)):
        bank, old = after[f"{name}_bank"], before[f"{name}_bank"]
        assert np.array_equal(bank[others], old[others])
        embedded = values @ before[f"{name}.weight"].T + before[f"{name}.bias"]
        embedded /= np.sqrt((embedded**2).sum(axis=1, keepdims=True))
        mixed = momentum * old[SAMPLES] + (1 - momentum) * embedded
        expected = mixed / np.sqrt((mixed**2).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(bank[SAMPLES], expected, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(bank[SAMPLES], axis=1), 1, rtol=1e-12)


def test_contrast_remembers_nothing_in_eval_mode() -> None:
    module = contrast().eval()
    before = weights(module)
    student, teacher = normal(3, 6, seed=1), normal(3, 9, seed=2)
    expected, _ = contrast_by_formula(before, student, teacher, 0.07)
    assert module(*tensors(student, teacher), SAMPLES, NEGATIVES).item() == pytest.approx(expected, rel=1e-9)
    after = weights(module)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_contrast_starts_uniform_within_the_bound_of_its_width() -> None:
    bank = Contrast(2, 2, samples=2000, dim=12).student_bank
    bound = math.sqrt(3 / 12)
    assert float(bank.abs().max()) <= bound
    assert float(bank.double().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(bank.double().mean())) < 0.01


def test_contrast_is_finite_where_embeddings_are_zero() -> None:
    module = Contrast(6, 9, samples=10, dim=4)
    with torch.no_grad():
        module.student.bias.zero_()
    student = torch.zeros(3, 6, requires_grad=True)
    module(student, torch.ones(3, 9), SAMPLES, NEGATIVES).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) < 1e3


# --- review -------------------------------------------------------------------------------------------------


def test_review_equals_the_formula_on_stages_of_different_sizes() -> None:
    module = review()
    student, teacher = review_maps()
    w = weights(module)
    expected, deeper = 0.0, np.zeros(0)
    for stage in (2, 1, 0):
        s, t = student[stage].numpy(), teacher[stage].numpy()
        x = formulas.batch_normed(formulas.convolved(s, w[f"stages.{stage}.enter.0.weight"]))
        if stage < 2:
            deeper = formulas.nearest(deeper, *x.shape[2:])
            z = formulas.convolved(
                np.concatenate([x, deeper], axis=1),
                w[f"stages.{stage}.attention.weight"],
                w[f"stages.{stage}.attention.bias"],
            )
            z = 1 / (1 + np.exp(-z))
            x = x * z[:, [0]] + deeper * z[:, [1]]
        deeper = formulas.nearest(x, *t.shape[2:])
        out = formulas.batch_normed(formulas.convolved3(deeper, w[f"stages.{stage}.leave.0.weight"]))
        expected += formulas.review(out, t)
    assert module(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    single = review().float()([x.float() for x in student], [x.float() for x in teacher])
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_review_of_one_stage_is_the_loss_of_its_maps() -> None:
    module = losses.Review([(3, 4, 4)], [(2, 4, 4)]).double()
    student, teacher = tensors(normal(2, 3, 4, 4, seed=1), normal(2, 2, 4, 4, seed=2))
    fused, _ = copy.deepcopy(module).stages[0](student, None, (4, 4))
    assert module([student], [teacher]).item() == pytest.approx(losses.review(fused, teacher).item())
    assert module.stages[0].attention is None


def test_review_fuses_at_the_students_deepest_width_up_to_512() -> None:
    assert losses.Review([(3, 4, 4), (6, 2, 2)], [(2, 4, 4), (2, 2, 2)]).stages[0].enter[0].out_channels == 6
    assert losses.Review([(600, 1, 1)], [(1, 1, 1)]).stages[0].enter[0].out_channels == 512
    with pytest.raises(ValueError, match="shorter"):
        losses.Review([(3, 4, 4), (6, 2, 2)], [(2, 4, 4)])


def test_review_takes_a_single_image_whose_deepest_maps_are_one_value() -> None:
    module = review()
    student, teacher = review_maps(batch=1)
    assert math.isfinite(module(student, teacher).item())

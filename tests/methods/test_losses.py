"""Losses against numpy in float64, computed from the papers' formulas, and against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import methods
from kdcli.base.config import make
from kdcli.base.errors import UsageError
from kdcli.data import augment
from kdcli.methods import TrainConfig
from kdcli.methods.losses import logits as losses
from kdcli.methods.losses.contrast import Negatives
from tests import formulas

Array = npt.NDArray[np.float64]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits(batch: int, classes: int, seed: int, scale: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, classes)) * scale


def t(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


CASES = [(2, 3, 0), (7, 10, 1), (1, 2, 2), (33, 100, 3)]


@pytest.mark.parametrize(("batch", "classes", "seed"), CASES)
def test_logit_regression_sums_over_classes_and_averages_over_the_batch(
    batch: int, classes: int, seed: int
) -> None:
    s, teacher = logits(batch, classes, seed), logits(batch, classes, seed + 50)
    expected = sum(0.5 * ((s[i] - teacher[i]) ** 2).sum() for i in range(batch)) / batch
    assert float(losses.logit_regression(t(s), t(teacher))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize(("batch", "classes", "seed"), CASES)
def test_soft_targets_equal_the_formula(batch: int, classes: int, seed: int, tau: float) -> None:
    s, teacher = logits(batch, classes, seed), logits(batch, classes, seed + 50)
    p, q = softmax(teacher / tau), softmax(s / tau)
    expected = tau**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    assert float(losses.kd_loss(t(s), t(teacher), tau)) == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(("batch", "classes", "seed"), CASES)
def test_cross_entropy_equals_the_formula(batch: int, classes: int, seed: int) -> None:
    s = logits(batch, classes, seed)
    labels = np.random.default_rng(seed).integers(0, classes, batch)
    expected = -np.log(softmax(s)[np.arange(batch), labels]).mean()
    assert float(losses.cross_entropy(t(s), torch.from_numpy(labels))) == pytest.approx(expected, rel=1e-5)


def test_two_by_three_by_hand() -> None:
    s = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]])
    # ½(0 + 4 + 1) = 2.5 and ½·9 = 4.5
    assert float(losses.logit_regression(s, teacher)) == pytest.approx(3.5)
    # second row at τ = 1: teacher (e³, 1, 1)/(e³+2), student uniform
    z = math.exp(3) + 2
    p = [math.exp(3) / z, 1 / z, 1 / z]
    kl = sum(x * math.log(3 * x) for x in p)
    assert float(losses.kd_loss(s[1:], teacher[1:], 1.0)) == pytest.approx(kl, rel=1e-5)
    # log(e + e² + e³) − 3 and log 3
    labels = torch.tensor([2, 0])
    expected = (math.log(math.e + math.e**2 + math.e**3) - 3 + math.log(3)) / 2
    assert float(losses.cross_entropy(s, labels)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 10**6), st.floats(0.5, 10), st.floats(-20, 20))
def test_soft_targets_are_zero_at_equality_and_blind_to_shifts(
    batch: int, classes: int, seed: int, tau: float, shift: float
) -> None:
    s, teacher = logits(batch, classes, seed), logits(batch, classes, seed + 1)
    assert abs(float(losses.kd_loss(t(s), t(s), tau))) < 1e-4
    plain = float(losses.kd_loss(t(s), t(teacher), tau))
    assert plain >= -1e-6
    assert float(losses.kd_loss(t(s + shift), t(teacher), tau)) == pytest.approx(plain, rel=1e-2, abs=1e-3)


def test_gradient_of_soft_targets_tends_to_logit_matching_at_high_temperature() -> None:
    """Hinton et al. 2015, eq. 4: for zero-mean logits, τ²·KL has gradient (s − t)/C as τ → ∞."""
    s = torch.from_numpy(logits(4, 5, 0)).requires_grad_()
    teacher = torch.from_numpy(logits(4, 5, 1))
    centred = [x - x.mean(dim=1, keepdim=True) for x in (s, teacher)]
    losses.kd_loss(centred[0], centred[1], 1e4).backward()
    expected = (centred[0] - centred[1]).detach() / 5 / 4
    torch.testing.assert_close(s.grad, expected, rtol=1e-3, atol=1e-4)


def test_mean_over_the_batch_does_not_depend_on_its_size() -> None:
    s, teacher = logits(3, 4, 0), logits(3, 4, 1)
    twice = np.concatenate([s, s]), np.concatenate([teacher, teacher])
    for loss in (losses.logit_regression, lambda a, b: losses.kd_loss(a, b, 3.0)):
        assert float(loss(t(twice[0]), t(twice[1]))) == pytest.approx(float(loss(t(s), t(teacher))), rel=1e-6)


# --- the noisy teacher -------------------------------------------------------------------------------------


def test_unselected_samples_keep_their_target_exactly_and_selected_ones_are_scaled() -> None:
    teacher = t(logits(5, 4, 0))
    selected = torch.tensor([[True], [False], [True], [False], [False]])
    noise = torch.tensor([[0.5], [9.0], [-2.0], [9.0], [9.0]])
    out = losses.perturb(teacher, selected, noise)
    assert torch.equal(out[[1, 3, 4]], teacher[[1, 3, 4]])
    torch.testing.assert_close(out[0], 1.5 * teacher[0])
    torch.testing.assert_close(out[2], -1.0 * teacher[2])


@pytest.mark.parametrize("scope", ["sample", "logit"])
def test_noise_has_the_ratio_and_the_spread_asked_for_and_no_bias(scope: str) -> None:
    samples = np.arange(40_000)
    selected, noise = losses.draw_noise(0, 3, samples, 0.3, 0.7, None if scope == "sample" else 6)
    assert noise.shape == (40_000, 1 if scope == "sample" else 6)
    assert float(selected.double().mean()) == pytest.approx(0.3, abs=0.01)
    chosen = noise[selected[:, 0]].double()
    assert float(chosen.mean()) == pytest.approx(0.0, abs=0.025)
    assert float(chosen.std()) == pytest.approx(0.7, abs=0.02)
    if scope == "logit":
        correlation = np.corrcoef(chosen.T.numpy())
        assert np.abs(correlation - np.eye(6)).max() < 0.05


def test_noise_follows_the_sample_and_the_epoch_not_the_batch() -> None:
    samples = np.arange(64)
    selected, noise = losses.draw_noise(0, 1, samples, 0.5, 0.9)
    backwards = losses.draw_noise(0, 1, samples[::-1].copy(), 0.5, 0.9)
    assert torch.equal(backwards[0].flip(0), selected)
    assert torch.equal(backwards[1].flip(0), noise)
    assert not torch.equal(losses.draw_noise(0, 2, samples, 0.5, 0.9)[1], noise)
    assert not torch.equal(losses.draw_noise(1, 1, samples, 0.5, 0.9)[1], noise)


def features_of(seed: int, *, grad: bool) -> methods.Features:
    """Two stages and an embedding of six images."""
    random = np.random.default_rng(seed)
    maps = [t(random.normal(size=(6, channels, side, side))) for channels, side in ((4, 8), (6, 4))]
    made = methods.Features(tuple(maps), t(random.normal(size=(6, 6))))
    for value in (*made.stages, made.embedding):
        value.requires_grad_(grad)
    return made


def batch_of(seed: int = 0) -> methods.Batch:
    return methods.Batch(
        student_logits=t(logits(6, 4, seed)).requires_grad_(),
        teacher_logits=t(logits(6, 4, seed + 9)),
        labels=torch.tensor([0, 1, 2, 3, 0, 1]),
        samples=np.arange(6),
        epoch=0,
        seed=0,
        student_features=features_of(seed, grad=True),
        teacher_features=features_of(seed + 9, grad=False),
        done=1.0,
    )


def objective_of(method: str, **settings: object) -> methods.Objective:
    return methods.objective(make(TrainConfig, {"method": method, **settings}))


def adapters_of(objective: methods.Objective) -> dict[str, torch.nn.Module]:
    shapes = methods.Shapes(((4, 8, 8), (6, 4, 4)), 6)
    labels = np.array([0, 1, 2, 3, 0, 1])
    return objective.adapters(methods.Training(shapes, shapes, labels, np.arange(6)))


def total(objective: methods.Objective, batch: methods.Batch) -> torch.Tensor:
    weights = objective.weights()
    terms = objective.compute(batch, adapters_of(objective))
    assert list(terms) == list(weights)
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def test_kd_is_lambda_times_ce_plus_the_rest_times_the_soft_term() -> None:
    batch = batch_of()
    s, teacher = batch.student_logits.detach().double().numpy(), batch.targets.double().numpy()
    p, q = softmax(teacher / 4), softmax(s / 4)
    soft = 16 * (p * np.log(p / q)).sum(axis=1).mean()
    ce = -np.log(softmax(s)[np.arange(6), batch.labels.numpy()]).mean()
    assert total(objective_of("kd", lamda=0.2, tau=4.0), batch).item() == pytest.approx(
        0.2 * ce + 0.8 * soft, rel=1e-5
    )


@pytest.mark.parametrize("name", methods.METHODS)
def test_gradient_reaches_student_and_adapters_only(name: str) -> None:
    objective = objective_of(name, ce_weight=0.0) if name != "ce" else objective_of(name)
    batch, adapters = batch_of(), adapters_of(objective)
    terms = objective.compute(batch, adapters)
    torch.stack(list(terms.values())).sum().backward()
    reached = [
        value.grad
        for value in (batch.student_logits, *batch.features[0].stages, batch.features[0].embedding)
        if value.grad is not None
    ]
    assert sum(float(grad.abs().sum()) for grad in reached) > 0
    assert all(bool(torch.isfinite(grad).all()) for grad in reached)
    assert batch.targets.grad is None
    assert all(value.grad is None for value in (*batch.features[1].stages, batch.features[1].embedding))
    learning = [value for module in adapters.values() for value in module.parameters()]
    assert bool(learning) == (methods.METHODS[name].adapter is not None)
    assert all(value.grad is not None for value in learning)


def test_weights_are_the_methods_own_unless_given() -> None:
    assert weights("logits") == {"logits": 1.0}
    assert weights("ce", kd_weight=5.0) == {"ce": 1.0}
    assert weights("kd", lamda=0.0) == {"kd": 1.0}
    assert weights("noisy", ce_weight=2.0) == {"ce": 2.0, "noisy": 1.0}
    with pytest.raises(UsageError, match="all weights"):
        weights("logits", kd_weight=0.0)
    with pytest.raises(UsageError, match="unknown method: magic"):
        methods.parse("magic")


def test_unread_lists_settings_of_other_methods() -> None:
    typed = ["lr", "tau", "noisy_ratio", "teacher"]
    assert methods.unread("kd", typed) == ["noisy_ratio"]
    assert methods.unread("noisy", typed) == ["tau"]
    assert methods.unread("logits", typed) == ["tau", "noisy_ratio"]
    assert methods.unread("ce", typed) == ["tau", "noisy_ratio", "teacher"]


def test_noise_zero_is_plain_logit_regression() -> None:
    calm = total(objective_of("noisy", noisy_sigma=0.0), batch_of())
    assert calm.item() == total(objective_of("logits"), batch_of()).item()


def test_noisy_uses_the_purpose_of_its_own() -> None:
    """The coin that flips an image must not decide its noise."""
    samples = np.arange(1000)
    flips = augment.random_bits(0, augment.FLIP, 0, samples)
    noise = augment.random_bits(0, augment.NOISE, 0, samples)
    assert abs(np.corrcoef(flips[0], noise[0])[0, 1]) < 0.1


def test_mixup_weighs_two_labels() -> None:
    logits = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    shares = np.array([0.25, 0.9])
    expected = np.mean([-0.25 * log_p[0, 2] - 0.75 * log_p[0, 1], -0.9 * log_p[1, 0] - 0.1 * log_p[1, 0]])
    found = losses.cross_entropy(
        torch.tensor(logits), torch.tensor([2, 0]), 0.0, torch.tensor([1, 0]), torch.tensor(shares)
    )
    assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("batch", "classes", "seed"), CASES)
def test_smoothed_cross_entropy_equals_the_formula(
    batch: int, classes: int, seed: int, smoothing: float
) -> None:
    s = logits(batch, classes, seed)
    labels = np.random.default_rng(seed).integers(0, classes, batch)
    expected = formulas.smoothed(s, labels.tolist(), smoothing)
    found = losses.cross_entropy(torch.from_numpy(s), torch.from_numpy(labels), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    single = losses.cross_entropy(t(s), torch.from_numpy(labels), smoothing)
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_smoothing_by_hand() -> None:
    """Probabilities ¾ and ¼, smoothing 0.2 of two classes: targets 0.9 and 0.1."""
    s, label = torch.tensor([[math.log(3), 0.0]]).double(), torch.tensor([0])
    own = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert losses.cross_entropy(s, label, 0.2).item() == pytest.approx(own, rel=1e-6)
    other = -0.1 * math.log(0.75) - 0.9 * math.log(0.25)
    mixed = losses.cross_entropy(s, label, 0.2, 1 - label, torch.tensor([0.3]))
    assert mixed.item() == pytest.approx(0.3 * own + 0.7 * other, rel=1e-6)


def test_cross_entropies_promote_half_types_and_have_their_gradient() -> None:
    half, labels = t(logits(4, 5, 0)).bfloat16(), torch.tensor([0, 1, 4, 2])
    shares = torch.full((4,), 0.3)
    for loss in (
        lambda s: losses.cross_entropy(s, labels, 0.1),
        lambda s: losses.cross_entropy(s, labels, 0.1, labels.flip(0), shares),
    ):
        assert loss(half).dtype == torch.float32
        assert torch.equal(loss(half), loss(half.float()))
        assert torch.autograd.gradcheck(loss, half.double().requires_grad_())


# --- several methods, weights, temperatures -------------------------------------------------------------------


def weights(method: str, done: float = 1.0, **settings: object) -> dict[str, float]:
    return objective_of(method, **settings).weights(done)


def test_joined_methods_have_the_first_ones_cross_entropy_and_each_its_term() -> None:
    assert weights("kd+at") == {"ce": 0.3, "kd": 0.7, "at": 1000.0}
    assert weights("at+kd") == {"ce": 1.0, "at": 1000.0, "kd": 0.7}
    assert weights("logits+sp") == {"logits": 1.0, "sp": 3000.0}
    assert weights("logits+ce") == {"ce": 1.0, "logits": 1.0}
    assert weights("kd+at", weight=["at=5", "ce=0"]) == {"kd": 0.7, "at": 5.0}
    assert weights("at+kd", weight=["at=0"]) == {"ce": 1.0, "kd": 0.7}
    assert weights("kd", kd_weight=0.0) == {"ce": 0.3}
    with pytest.raises(UsageError, match="has 2 terms of the teacher"):
        weights("kd+at", kd_weight=1.0)
    with pytest.raises(UsageError, match="kd has no such term"):
        weights("kd", weight=["at=1"])
    with pytest.raises(UsageError, match="named twice"):
        methods.parse("kd+at+kd")
    for name in ("kd+", "+", "kd++at", ""):
        with pytest.raises(UsageError, match="no name"):
            methods.parse(name)


def test_terms_of_zero_weight_are_left_out() -> None:
    active = objective_of("kd+at", weight=["at=0"])
    assert objective_of("kd+at").needs_features and not active.needs_features and active.needs_teacher
    assert not objective_of("kd", kd_weight=0.0).needs_teacher
    assert not objective_of("kd", lamda=0.0).needs_labels
    assert objective_of("kd", kd_weight=0.0).needs_labels and objective_of("dkd+at").needs_labels


def config_of(method: str, **settings: object) -> TrainConfig:
    return make(TrainConfig, {"method": method, **settings})


def test_weights_and_temperatures_move_in_a_straight_line() -> None:
    by_epoch = {"epochs": 10, "weight": ["at=0:1000:5"]}
    assert [weights("at", done, **by_epoch)["at"] for done in (0.0, 0.1, 0.25, 0.5, 1.0)] == [
        0.0,
        200.0,
        500.0,
        1000.0,
        1000.0,
    ]
    assert weights("kd", 0.25, weight=["kd=4:0"])["kd"] == 3.0
    # dkd's own warm-up: the first twelfth of training, 20 of 240 epochs
    assert weights("dkd", 1 / 24) == {"ce": 1.0, "dkd": pytest.approx(0.5)}
    assert weights("dkd", 0.5) == {"ce": 1.0, "dkd": 1.0}
    falling, batch = objective_of("kd", tau=8.0, tau_end=2.0, lamda=0.0), batch_of()
    for done, tau in ((0.0, 8.0), (0.5, 5.0), (1.0, 2.0)):
        s, teacher = batch.student_logits.detach(), batch.targets
        expected = losses.kd_loss(s, teacher, tau)
        found = falling.compute(replace(batch, done=done))["kd"]
        torch.testing.assert_close(found, expected)


def test_each_method_has_its_own_temperature_unless_one_is_given() -> None:
    for name, tau in {"kd": 3.0, "dkd": 4.0, "dist": 4.0, "lskd": 2.0, "born-again": 1.0}.items():
        plain = objective_of(name).compute(batch_of())[name]
        assert torch.equal(plain, objective_of(name, tau=tau).compute(batch_of())[name])
        assert not torch.equal(plain, objective_of(name, tau=7.0).compute(batch_of())[name])


def test_standardized_kd_at_the_same_temperature_is_lskd() -> None:
    standard = objective_of("kd", standardize=True, tau=2.0).compute(batch_of())["kd"]
    assert torch.equal(standard, objective_of("lskd").compute(batch_of())["lskd"])


def test_dkd_of_a_mixture_takes_each_label_with_its_share() -> None:
    batch = batch_of()
    others, shares = torch.tensor([1, 2, 3, 0, 1, 2]), torch.tensor([0.25, 1.0, 0.5, 0.0, 0.75, 0.6])
    found = objective_of("dkd").compute(replace(batch, other_labels=others, shares=shares))["dkd"]
    each = [
        losses.decoupled(batch.student_logits[[i]], batch.targets[[i]], torch.tensor([label]), 4.0, 1.0, 1.0)
        * share
        for i in range(6)
        for label, share in ((batch.labels[i], shares[i]), (others[i], 1 - shares[i]))
    ]
    torch.testing.assert_close(found, torch.stack(each).sum() / 6)


def test_the_contrasted_images_are_of_other_classes_and_follow_the_sample() -> None:
    labels = np.array([0, 2, 1, 0, 1, 2, 0, 0, 1, 2, 2, 0])
    trained = np.array([0, 1, 2, 3, 4, 5, 6, 8, 9])
    draw = Negatives(labels, trained, 4001)
    samples = np.array([3, 1, 8, 0])
    found = draw(samples, seed=5, epoch=2)
    assert found.shape == (4, 4001)
    for row, sample in zip(found, samples, strict=True):
        allowed = [number for number in trained if labels[number] != labels[sample]]
        numbers, counts = np.unique(row, return_counts=True)
        assert list(numbers) == allowed
        assert counts.min() > 0.8 * 4001 / len(allowed)
    assert np.array_equal(draw(samples[::-1], 5, 2)[::-1], found)
    assert not np.array_equal(draw(samples, 5, 3), found)
    with pytest.raises(UsageError, match="only one class"):
        Negatives(np.zeros(4, np.int64), np.arange(4), 3)


def test_a_weight_of_the_teachers_term_is_constant_where_its_default_is_0() -> None:
    assert [weights("kd", done, lamda=1.0, kd_weight=2.0)["kd"] for done in (0.0, 0.5, 1.0)] == [
        2.0,
        2.0,
        2.0,
    ]


def test_a_weight_of_the_teachers_term_keeps_its_warm_up() -> None:
    assert [weights("dkd", done, kd_weight=2.0)["dkd"] for done in (0.0, 1 / 24, 1.0)] == [
        0.0,
        pytest.approx(1.0),
        2.0,
    ]
    assert weights("dkd", 0.0, weight=["dkd=2"])["dkd"] == 2.0
    assert weights("kd", 0.0, kd_weight=2.0) == {"ce": 0.3, "kd": 2.0}


def test_a_method_that_leaves_the_last_layer_alone_is_refused() -> None:
    for method, settings_of in (
        ("at", {"ce_weight": 0.0}),
        ("sp+crd", {"weight": ["ce=0"]}),
        ("logits+at", {"weight": ["logits=0"]}),
    ):
        with pytest.raises(UsageError, match="nothing trains the student's last layer"):
            objective_of(method, **settings_of).check()
    for method in (*methods.METHODS, "logits+at", "at+ls"):
        objective_of(method, **({"ce_weight": 0.0} if "+" in method else {})).check()


def test_contrast_does_not_go_with_mixup() -> None:
    from kdcli.engine.plan import resolve

    resolve(config_of("crd", augment="flip-crop"))
    resolve(config_of("at", augment="flip-mixup"))
    with pytest.raises(UsageError, match="mixed images have two"):
        resolve(config_of("kd+crd", augment="flip-mixup"))

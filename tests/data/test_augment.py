"""Views: the generator against published vectors, the pictures against plain numpy, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.data import augment

# Random123's kat_vectors for philox4x32, 10 rounds (Salmon et al.)
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    out = augment.philox(np.array(counter, np.uint64)[:, None], key)
    assert out[:, 0].tolist() == expected


def images(count: int = 12, size: int = 9) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, size, size + 1, 3)).astype(np.uint8)
    )


@pytest.mark.parametrize("name", ["none", "flip", "flip-crop", "flip-crop-cutout", "crop", "cutout"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), view=st.integers(0, 1000), shuffle=st.integers(0, 10**6))
def test_a_view_depends_on_seed_view_and_sample_alone(name: str, seed: int, view: int, shuffle: int) -> None:
    pictures, samples = images(), np.arange(100, 112)
    whole = augment.apply(name, pictures, seed, view, samples)
    order = np.random.default_rng(shuffle).permutation(12)[:5]
    torch.random.manual_seed(shuffle)
    part = augment.apply(name, pictures[torch.from_numpy(order)], seed, view, samples[order])
    assert torch.equal(part, whole[torch.from_numpy(order)])
    assert whole.dtype == torch.uint8
    assert whole.shape == pictures.shape


def test_two_flip_views_hold_both_variants_of_every_image() -> None:
    pictures, samples = images(), np.arange(12)
    first, second = (augment.apply("flip", pictures, 5, view, samples) for view in (0, 1))
    mirrored = pictures.flip(2)
    for index in range(12):
        pair = {tuple(v[index].flatten().tolist()) for v in (first, second)}
        assert pair == {tuple(v[index].flatten().tolist()) for v in (pictures, mirrored)}
    assert torch.equal(augment.apply("flip", pictures, 5, 2, samples), first)
    halves = torch.tensor([0, 1], dtype=torch.uint8).expand(10_000, 1, 2)[..., None]
    share = augment.apply("flip", halves, 0, 0, np.arange(10_000))[:, 0, 0, 0].double().mean()
    assert share == pytest.approx(0.5, abs=0.02)


def test_flip_crop_is_a_shifted_window_of_the_padded_and_maybe_mirrored_image() -> None:
    pictures, samples = images(), np.arange(12)
    seen = set()
    for view in range(30):
        out = augment.apply("flip-crop", pictures, 3, view, samples).numpy()
        for index in range(12):
            padded = np.pad(pictures[index].numpy(), ((4, 4), (4, 4), (0, 0)))
            found = [
                (dy, dx, mirror)
                for dy in range(9)
                for dx in range(9)
                for mirror in (False, True)
                if np.array_equal(
                    out[index],
                    padded[dy : dy + 9, dx : dx + 10][:, :: -1 if mirror else 1],
                )
            ]
            assert found
            seen.update(found)
    assert {dy for dy, _, _ in seen} == set(range(9))
    assert {dx for _, dx, _ in seen} == set(range(9))


def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    samples = np.arange(1000) * 3
    first = augment.order(0, 0, samples)
    assert sorted(first.tolist()) == samples.tolist()
    assert not np.array_equal(first, augment.order(0, 1, samples))
    assert not np.array_equal(first, augment.order(1, 0, samples))
    assert np.array_equal(first, augment.order(0, 0, samples))


def test_normal_numbers_have_normal_moments() -> None:
    random = augment.random_bits(1, augment.NOISE, 0, np.arange(200_000))
    x = augment.normal(random[0], random[1])
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)
    assert (x**4).mean() == pytest.approx(3, abs=0.1)


def test_cutout_greys_one_square_that_may_hang_over_the_edge() -> None:
    pictures, samples = torch.zeros(300, 12, 16, 3, dtype=torch.uint8), np.arange(300)
    out = augment.apply("cutout", pictures, 7, 2, samples).numpy()
    centres = set()
    for picture in out:
        rows, columns = np.nonzero((picture == augment.GREY).all(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a full rectangle, 6 × 6 unless it is cut off by an edge
        assert height == 6 or rows.min() == 0 or rows.max() == 11
        assert width == 6 or columns.min() == 0 or columns.max() == 15
        assert 3 <= height <= 6
        assert 3 <= width <= 6
        centres.add((rows.min(), columns.min()))
    assert len(centres) > 60
    assert set(np.unique(out)) == {0, augment.GREY}


def test_mixup_is_the_weighted_mean_of_two_views() -> None:
    data, samples, pool = images(40), np.arange(25, 35), np.arange(0, 40, 3)

    def take(numbers: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
        return data[torch.from_numpy(numbers)]

    found = augment.make_view("flip-crop-mixup", take, 9, 4, samples, pool).numpy()
    mixed = augment.mixing("flip-crop-mixup", 9, 4, samples, pool)
    assert mixed is not None
    for index, sample in enumerate(samples):
        own, other = (
            augment.apply("flip-crop", take(np.array([n])), 9, 4, np.array([n])).numpy()[0].astype(np.float64)
            for n in (sample, mixed.partners[index])
        )
        exact = mixed.shares[index] * own + (1 - mixed.shares[index]) * other
        assert np.abs(found[index] - exact).max() <= 0.5 + 1e-3
    shares = augment.mixing("mixup", 1, 0, np.arange(20_000), pool)
    assert shares is not None
    assert shares.shares.mean() == pytest.approx(0.5, abs=0.01)  # Beta(1, 1): uniform
    assert shares.shares.std() == pytest.approx(12**-0.5, abs=0.01)
    assert augment.mixing("flip-crop", 1, 0, samples, pool) is None


def test_each_step_draws_its_own_numbers() -> None:
    samples = np.arange(5000)
    drawn = [augment.uniform(augment.random_bits(1, purpose, 0, samples)[0]) for purpose in range(8)]
    for first in range(8):
        for second in range(first):
            assert abs(np.corrcoef(drawn[first], drawn[second])[0, 1]) < 0.07

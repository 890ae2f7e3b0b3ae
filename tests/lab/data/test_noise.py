"""Label noise flips the stated number of labels to the stated classes; the mask is correct."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_lab.data.noise import asymmetric, human, successors, symmetric

rates = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 2**40)


def labels(n: int, classes: int) -> Tensor:
    return torch.arange(n) * 7 % classes


@given(st.integers(0, 300), rates, st.integers(2, 20), seeds)
def test_symmetric_flips_exactly_that_many_and_the_mask_is_where_they_differ(
    n: int, rate: float, classes: int, seed: int
) -> None:
    y = labels(n, classes)
    noisy, flipped = symmetric(y, rate, classes, seed)
    assert int(flipped.sum()) == int(rate * n)
    assert torch.equal(flipped, noisy != y)
    assert ((noisy >= 0) & (noisy < classes)).all()
    assert torch.equal(y, labels(n, classes))


@given(st.integers(0, 300), rates, st.integers(2, 20), seeds)
def test_asymmetric_flips_exactly_that_many_to_the_next_class(
    n: int, rate: float, classes: int, seed: int
) -> None:
    y = labels(n, classes)
    noisy, flipped = asymmetric(y, rate, classes, seed)
    assert int(flipped.sum()) == int(rate * n)
    assert torch.equal(noisy[flipped], (y[flipped] + 1) % classes)
    assert torch.equal(noisy[~flipped], y[~flipped])


@given(st.sampled_from([symmetric, asymmetric]), rates, rates, seeds)
def test_at_one_seed_the_noise_levels_are_nested(noise, a: float, b: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    y = labels(200, 10)
    (low, low_mask), (high, high_mask) = (noise(y, rate, 10, seed) for rate in sorted((a, b)))
    assert not (low_mask & ~high_mask).any()
    assert torch.equal(low[low_mask], high[low_mask])


@pytest.mark.parametrize("noise", [symmetric, asymmetric])
def test_the_seed_decides(noise) -> None:  # type: ignore[no-untyped-def]
    y = labels(500, 10)
    assert torch.equal(noise(y, 0.4, 10, 3)[0], noise(y, 0.4, 10, 3)[0])
    assert not torch.equal(noise(y, 0.4, 10, 3)[1], noise(y, 0.4, 10, 4)[1])


def test_symmetric_is_uniform_over_the_other_classes() -> None:
    y = torch.zeros(90_000, dtype=torch.int64)
    noisy, _ = symmetric(y, 0.999, 10, 0)
    counts = torch.bincount(noisy, minlength=10)[1:].double()
    # 10,000 each: five deviations are 4.7%
    assert ((counts / counts.mean() - 1).abs() < 0.05).all()


def test_which_samples_are_flipped_does_not_depend_on_their_labels() -> None:
    assert torch.equal(
        symmetric(labels(100, 10), 0.3, 10, 0)[1], symmetric(labels(100, 3), 0.3, 10, 0)[1]
    )


def test_within_super_classes_the_next_class_is_the_next_member_in_a_ring() -> None:
    coarse = torch.tensor([0, 1, 0, 1, 0])
    assert successors(5, coarse).tolist() == [2, 3, 4, 1, 0]
    assert successors(5).tolist() == [1, 2, 3, 4, 0]
    y = labels(100, 5)
    noisy, flipped = asymmetric(y, 0.5, 5, 0, coarse)
    assert int(flipped.sum()) == 50
    assert torch.equal(coarse[noisy], coarse[y])


def test_human_labels_are_passed_on_with_where_they_differ() -> None:
    y, people = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    noisy, flipped = human(y, people)
    assert torch.equal(noisy, people)
    assert flipped.tolist() == [False, True, False]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("noise", [symmetric, asymmetric])
def test_a_rate_that_is_no_share_is_refused(noise, rate: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        ValueError,
        match=rf"^noise: rate must lie in \[0, 1\); got {rate}\. "
        r"It is the share of labels that are flipped\.$",
    ):
        noise(labels(10, 2), rate, 2, 0)


def test_labels_and_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^noise: labels must lie in \[0, 3\); got 0 to 3\. Is `classes` right\?"
    ):
        symmetric(torch.arange(4), 0.5, 3, 0)
    with pytest.raises(
        ValueError, match=r"^noise: there must be two classes or more to flip between; got 1"
    ):
        symmetric(torch.zeros(4, dtype=torch.int64), 0.5, 1, 0)
    with pytest.raises(
        ValueError, match=r"coarse must give a super-class for each of the 4 classes; got 3"
    ):
        asymmetric(torch.arange(4), 0.5, 4, 0, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(
        ValueError,
        match=r"each super-class must have two classes or more; super-class 1 has one, 2,",
    ):
        asymmetric(torch.arange(3), 0.5, 3, 0, torch.tensor([0, 0, 1]))


def test_human_labels_must_be_there_and_as_many() -> None:
    with pytest.raises(
        ValueError,
        match=r"human labels must come with the data set; got one without\. "
        "Use cifar100n or cifar100n-coarse",
    ):
        human(torch.arange(3), None)
    with pytest.raises(ValueError, match=r"there must be one human label per sample, 3; got 2"):
        human(torch.arange(3), torch.arange(2))

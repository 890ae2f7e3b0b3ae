"""A micro-batch is a function of the seed and its number; a pass visits every sample once.

Strata are exact.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_lab.data.sampling import Iid, Sampler, Stratified, Stream, derive_seed, generator

seeds = st.integers(0, 2**40)


def labels(classes: int, each: int, extra: int = 0) -> Tensor:
    """`each` samples of every class, interleaved, and `extra` more of class 0."""
    return torch.cat(
        [torch.arange(classes * each) % classes, torch.zeros(extra, dtype=torch.int64)]
    )


def samplers(seed: int = 0) -> list[Sampler]:
    return [Iid(30, 8, seed), Stratified(labels(4, 5, 3), 4, 8, seed)]


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 4), seeds)
def test_iid_visits_every_sample_once_per_pass(n: int, b: int, passes: int, seed: int) -> None:
    sampler = Iid(n, b, seed)
    drawn = torch.cat([sampler.draw(m) for m in range(-(-n * passes // b))])
    for p in range(passes):
        assert drawn[p * n : (p + 1) * n].sort().values.tolist() == list(range(n))


@given(st.integers(2, 6), st.integers(1, 5), st.data(), seeds)
def test_stratified_has_as_many_of_each_class_and_visits_every_sample_of_it_once(
    classes: int, each: int, data: st.DataObject, seed: int
) -> None:
    y = labels(classes, each)
    per = data.draw(st.integers(1, each))
    sampler = Stratified(y, classes, per * classes, seed)
    drawn = torch.stack([sampler.draw(m) for m in range(each)])  # each class: `per` whole passes
    assert all(
        torch.bincount(y[batch], minlength=classes).tolist() == [per] * classes for batch in drawn
    )
    assert torch.bincount(drawn.flatten(), minlength=len(y)).tolist() == [per] * len(y)


@given(seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_a_draw_does_not_depend_on_what_was_drawn_before(seed: int, numbers: list[int]) -> None:
    for used, fresh in zip(samplers(seed), samplers(seed), strict=True):
        for m in numbers:
            used.draw(m)
        assert torch.equal(used.draw(numbers[0]), fresh.draw(numbers[0]))


def test_draws_are_indices_of_the_size_asked_for_and_the_seed_decides() -> None:
    for one, same, other in zip(samplers(0), samplers(0), samplers(1), strict=True):
        batch = one.draw(5)
        assert (batch.dtype, batch.shape) == (torch.int64, (one.b,))
        assert torch.equal(batch, same.draw(5))
        assert not torch.equal(batch, other.draw(5))


def test_what_is_drawn_can_be_written_to_without_harm() -> None:
    for sampler, fresh in zip(samplers(), samplers(), strict=True):
        sampler.draw(0).zero_()
        assert torch.equal(sampler.draw(0), fresh.draw(0))


def test_what_is_asked_for_again_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, fresh = samplers()[1], samplers()[1]
    first = sampler.draw(3)
    monkeypatch.delattr(Stream, "take")
    assert torch.equal(sampler.draw(3), first)
    monkeypatch.undo()
    assert torch.equal(sampler.draw(4), fresh.draw(4))


def test_passes_differ() -> None:
    sampler = Iid(1000, 1000, 0)
    assert not torch.equal(sampler.draw(0), sampler.draw(1))


def test_classes_of_different_size_are_drawn_alike() -> None:
    y = labels(2, 5, extra=90)
    drawn = torch.cat([Stratified(y, 2, 10, 0).draw(m) for m in range(4)])
    assert torch.bincount(y[drawn]).tolist() == [20, 20]
    assert drawn[y[drawn] == 0].unique().numel() == 20


@given(
    seeds,
    st.lists(st.integers(-5, 5) | st.text(max_size=3), max_size=3),
    st.lists(st.integers(-5, 5) | st.text(max_size=3), max_size=3),
)
def test_keys_are_distinct_for_distinct_parts_and_fit_a_generator(
    seed: int, a: list[int | str], b: list[int | str]
) -> None:
    assert 0 <= derive_seed(seed, *a) < 2**63
    assert (derive_seed(seed, *a) == derive_seed(seed, *b)) == (a == b)
    assert torch.rand(1, generator=generator(seed, *a)) == torch.rand(
        1, generator=generator(seed, *a)
    )


def test_keys_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "iid", 1) == 4_979_827_171_985_336_229
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, "1") != derive_seed(0, 1)


def test_more_per_class_than_there_is() -> None:
    with pytest.raises(
        ValueError,
        match=r"^stratified: every class must have b / classes = 4 samples; class 1 has 3\. "
        r"Use b=6 or fewer, or the iid sampler\.$",
    ):
        Stratified(labels(2, 3, extra=5), 2, 8, 0)


def test_a_class_without_samples() -> None:
    with pytest.raises(ValueError, match=r"class 2 has 0\. Use the iid sampler\.$"):
        Stratified(labels(2, 3), 3, 3, 0)


@pytest.mark.parametrize(("b", "use"), [(0, 4), (5, 4), (7, 8), (-4, 4)])
def test_a_batch_that_is_no_multiple_of_the_classes(b: int, use: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^stratified: b must be a multiple of the 4 classes; got {b}\. "
        f"Use b={use}, or the iid sampler",
    ):
        Stratified(labels(4, 5), 4, b, 0)


@pytest.mark.parametrize(("n", "b"), [(0, 1), (1, 0)])
def test_iid_of_nothing(n: int, b: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^iid: needs at least one sample, and one per micro-batch; got n={n}, b={b}",
    ):
        Iid(n, b, 0)


def test_a_negative_number() -> None:
    for sampler in samplers():
        with pytest.raises(
            ValueError, match=r"^draw: the micro-batch's number must be at least 0; got -1"
        ):
            sampler.draw(-1)

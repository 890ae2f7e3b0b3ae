"""The batched augmentation equals that of one picture at a time; normalising can be undone."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaf_lab.data.augment import crop_and_flip, normalise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(
    b: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """No pixel is black, so that what comes in from outside can be told apart."""
    return torch.randint(1, 256, (b, channels, height, width), generator=generator(1)).to(dtype)


def crops(picture: Tensor, padding: int) -> Tensor:
    """All that may become of one picture, (2 (2 padding + 1)^2, C, H, W)."""
    _, height, width = picture.shape
    padded = torch.nn.functional.pad(picture, (padding,) * 4)
    shifts = range(2 * padding + 1)
    windows = [padded[:, y : y + height, x : x + width] for y in shifts for x in shifts]
    return torch.stack(windows + [window.flip(2) for window in windows])


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
    st.sampled_from([torch.uint8, torch.float32]),
    st.integers(0, 2**40),
)
def test_each_picture_is_one_of_its_crops(
    b: int, c: int, h: int, w: int, padding: int, dtype: torch.dtype, seed: int
) -> None:
    x = pictures(b, c, h, w, dtype)
    out = crop_and_flip(x, generator(seed), padding)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    for before, after in zip(x, out, strict=True):
        assert (crops(before, padding) == after).flatten(1).all(1).any()


def test_all_crops_are_equally_likely() -> None:
    picture = pictures(1, 1, 4, 4)
    out = crop_and_flip(picture.expand(9000, -1, -1, -1), generator(), padding=1)
    counts = (crops(picture[0], 1)[:, None] == out).flatten(2).all(2).sum(1)
    assert int(counts.sum()) == 9000
    assert ((counts - 500).abs() < 110).all()  # 18 outcomes, 500 each: five deviations


def test_the_generator_decides_and_the_input_is_left_alone() -> None:
    x = pictures(50, 3, 32, 32)
    before = x.clone()
    assert torch.equal(crop_and_flip(x, generator(3)), crop_and_flip(x, generator(3)))
    assert not torch.equal(crop_and_flip(x, generator(3)), crop_and_flip(x, generator(4)))
    assert torch.equal(x, before)


def test_bytes_and_floats_are_moved_alike() -> None:
    x = pictures(50, 3, 32, 32)
    assert torch.equal(crop_and_flip(x, generator()).float(), crop_and_flip(x.float(), generator()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter() -> None:
    x = pictures(50, 3, 32, 32)
    assert torch.equal(crop_and_flip(x.cuda(), generator()).cpu(), crop_and_flip(x, generator()))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1)), min_size=1, max_size=4))
def test_normalise_is_the_formula(moments: list[tuple[float, float]]) -> None:
    mean, std = zip(*moments, strict=True)
    x = pictures(3, len(mean), 4, 4)
    direct = (x.double() / 255 - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(
        std
    ).double().view(-1, 1, 1)
    out = normalise(x, mean, std)
    assert out.dtype == torch.float32
    # values to 20, float32's 24 bits in mean, std and result
    assert torch.allclose(out.double(), direct, atol=2e-5)


def test_normalise_leaves_floats_alone_too() -> None:
    x = pictures(2, 1, 4, 4, torch.float32)
    before = x.clone()
    normalise(x, (0.5,), (0.5,))
    assert torch.equal(x, before)


def test_moments_of_another_number_of_channels() -> None:
    with pytest.raises(
        ValueError,
        match=r"^normalise: mean and std must have one number per channel, 3; got 1 and 1\. "
        "Use those of the data set",
    ):
        normalise(pictures(1, 3, 4, 4), (0.5,), (0.5,))


def test_a_batch_of_100_costs_little_of_a_step() -> None:
    x = pictures(100, 3, 32, 32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        normalise(crop_and_flip(x, generator()), (0.5,) * 3, (0.25,) * 3)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3  # 5% of the 100 ms that a ResNet18 step takes; measured 0.3 ms

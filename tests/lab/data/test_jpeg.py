"""From a JPEG or PNG file to a picture: decoding, random crops, the middle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gaf_lab.data import jpeg
from gaf_lab.data.sampling import generator
from gaf_lab.data.sources import DataError
from helpers.pictures import random_pixels, save


def test_grey_and_cmyk_pictures_and_those_with_another_files_suffix_become_rgb(tmp_path):
    smooth = np.broadcast_to(
        np.linspace(40, 200, 16, dtype=np.uint8)[None, :, None], (16, 16, 3)
    ).copy()
    paths = [
        save(tmp_path / "rgb.JPEG", smooth, quality=95),
        save(tmp_path / "grey.JPEG", smooth, "L", quality=95),
        save(tmp_path / "cmyk.JPEG", smooth, "CMYK", quality=95),
        save(tmp_path / "alpha.JPEG", smooth, "RGBA", format="PNG"),
    ]
    for path in paths:
        image = jpeg.decode(path)
        assert image.mode == "RGB"
        # what JPEG loses of a slope at quality 95
        assert np.abs(np.asarray(image).astype(int) - smooth).max() <= 4, path


@pytest.mark.parametrize("damage", ["cut off", "text", "empty", "gone"])
def test_a_file_that_is_no_whole_picture_is_named(tmp_path, damage):
    path = save(tmp_path / "n01_1.JPEG", random_pixels(32, 32))
    content = {"cut off": path.read_bytes()[:-200], "text": b"not a picture", "empty": b""}
    path.write_bytes(content[damage]) if damage in content else path.unlink()
    with pytest.raises(
        DataError,
        match=f"{path} must be a whole JPEG or PNG file; it cannot be read .*. Unpack it again.",
    ):
        jpeg.decode(path)


def test_a_test_picture_is_the_middle_of_what_has_256_pixels_on_its_shorter_side():
    pixels = random_pixels(256, 356)
    found = jpeg.crop(Image.fromarray(pixels), 224, None)
    assert torch.equal(found, torch.from_numpy(pixels[16:240, 66:290]).permute(2, 0, 1))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**31))
def test_random_crops_lie_in_the_picture_with_area_and_ratio_in_their_ranges(width, height, seed):
    tries = jpeg.draw_crops(1, generator(seed))[0, :-1].tolist()
    left, top, right, bottom = jpeg.random_box(width, height, tries)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = right - left, bottom - top
    # rounding moves each side by half a pixel at most
    assert (across - 0.5) / (down + 0.5) <= 4 / 3 + 1e-9
    assert (across + 0.5) / (down - 0.5) >= 3 / 4 - 1e-9
    if 3 / 4 <= width / height <= 4 / 3:  # of a longer picture there may be no such crop
        assert (across + 0.5) * (down + 0.5) >= 0.08 * width * height


def test_a_random_crop_is_the_one_that_its_numbers_stand_for():
    pixels = random_pixels(64, 64)
    # of the range of areas, for a quarter of the picture; 0.5 for as wide as high
    share = (0.25 - 0.08) / 0.92
    draw = torch.zeros(jpeg.CROP_TRIES + 1, 4, dtype=torch.float64)
    draw[0] = torch.tensor([share, 0.5, 10 / 33, 32.9 / 33])
    draw[-1, 0] = 0.7
    plain = jpeg.crop(Image.fromarray(pixels), 32, draw)
    assert torch.equal(plain, torch.from_numpy(pixels[32:64, 10:42]).permute(2, 0, 1))
    draw[-1, 0] = 0.3
    assert torch.equal(jpeg.crop(Image.fromarray(pixels), 32, draw), plain.flip(2))


def test_where_no_try_fits_the_crop_is_the_largest_in_the_middle():
    wide = [[0.999, 0.5, 0.0, 0.0]] * jpeg.CROP_TRIES  # nearly the whole area as a square
    assert jpeg.random_box(400, 100, wide) == pytest.approx(
        (400 / 2 - 200 / 3, 0, 400 / 2 + 200 / 3, 100)
    )
    assert jpeg.random_box(100, 400, wide) == pytest.approx(
        (0, 400 / 2 - 200 / 3, 100, 400 / 2 + 200 / 3)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_is_turned_as_its_exif_orientation_says(tmp_path, form, orientation):
    # EXIF 2.3, tag 0x0112: the sides of the picture at which the stored row 0 and column 0 are
    sides = ("top left", "top right", "bottom right", "bottom left")
    sides += ("left top", "right top", "right bottom", "left bottom")
    row, column = sides[orientation - 1].split()
    seen = np.zeros((16, 32, 3), dtype=np.uint8)
    seen[:8, :16], seen[:8, 16:], seen[8:, :16] = 240, 160, 80
    stored = seen if row in ("top", "bottom") else seen.transpose(1, 0, 2)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("right", "bottom") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {}
    path = save(
        tmp_path / "x.JPEG", np.ascontiguousarray(stored), format=form, exif=exif, **options
    )
    found = np.asarray(jpeg.decode(path)).astype(int)
    assert found.shape == seen.shape
    assert np.abs(found - seen).max() <= 2  # blocks of 8 x 8 of one shade each


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*", b"nothing", b"\0" * 40])
def test_a_picture_whose_exif_data_cannot_be_read_is_as_it_is_stored(tmp_path, exif):
    pixels = random_pixels(6, 4)
    path = save(tmp_path / "x.png", pixels, exif=exif)
    assert np.array_equal(np.asarray(jpeg.decode(path)), pixels)

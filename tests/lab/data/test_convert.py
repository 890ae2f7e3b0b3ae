"""Data of the user's own: every form gives its values back, and what is wrong is named."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from gaf_lab.commands.main import main
from gaf_lab.data.arrays import describe_arrays, read_arrays
from gaf_lab.data.check_arrays import count_by_labels
from gaf_lab.data.convert import read_from
from gaf_lab.data.convert_pictures import read_folders
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.run_data import RunData
from gaf_lab.data.sources import DataError
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig

ARRAYS = "gaf_lab.tasks.arrays:arrays"


def run_data(path, **changes) -> RunData:
    usual = {"task": ARRAYS, "noise": "none", "k": 2, "b": 2, "device": "cpu"}
    return make_run_data(TrainConfig(**{**usual, **changes}), path, torch.device("cpu"))


def write_table(path, rows=40, separator=","):
    lines = [separator.join(["size", "colour", "kind"])]
    for i in range(rows):
        lines.append(separator.join([f"{i}.5", ["red", "blue"][i % 2], ["cat", "dog"][i % 4 // 2]]))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_becomes_scaled_numbers_and_numbered_classes(tmp_path, separator):
    write_table(tmp_path / "t.csv", separator=separator)
    found = read_from(f"csv:{tmp_path}/t.csv")
    (x, y), (_, test_y) = found.train, found.test
    assert found.classes == ["cat", "dog"]
    assert (torch.bincount(y).tolist(), torch.bincount(test_y).tolist()) == ([16, 16], [4, 4])
    assert x.shape == (32, 3)  # size, blue, red
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(3))
    other = read_from(f"csv:{tmp_path}/t.csv", "colour")
    assert other.classes == ["blue", "red"]
    numbers = read_from(f"csv:{tmp_path}/t.csv", "size")
    assert numbers.classes == []
    values = torch.cat([numbers.train[1], numbers.test[1]]).sort().values
    assert torch.equal(values, torch.arange(40) + 0.5)
    for (_, targets), names in zip((numbers.train, numbers.test), numbers.names, strict=True):
        assert names == [f"line {int(size) + 2}" for size in targets]


def test_a_sample_of_a_table_is_named_by_its_line_in_the_file(tmp_path):
    lines = ["size,kind", "1.5,cat", "", '"2\n.5",cat', '"3.5","dog\n', 'gy"', "4.5,cat"]
    (tmp_path / "t.csv").write_text("\n".join(lines).replace("2\n.5", "2.5") + "\n")
    found = read_from(f"csv:{tmp_path}/t.csv")
    assert found.classes == ["cat", "dog\n\ngy"]
    assert sorted([*found.names[0], *found.names[1]]) == ["line 2", "line 4", "line 5", "line 8"]


def test_written_arrays_are_a_task_for_classes_and_for_numbers(tmp_path, capsys):
    write_table(tmp_path / "t.csv")
    out = tmp_path / "t.npz"
    assert main(["data", "--from", f"csv:{tmp_path}/t.csv", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 (cat: 16, dog: 16)" in said
    assert f"--task {ARRAYS}" in said
    again, data = read_arrays(out), run_data(out)
    assert again.names == read_from(f"csv:{tmp_path}/t.csv").names
    assert data.problem.class_names == ["cat", "dog"]
    assert data.problem.sample_names == again.names[0]
    for part, same in zip(
        (*again.train, *again.test), (*data.problem.train, *data.problem.test), strict=True
    ):
        assert torch.equal(part.float(), same.float())
    assert (data.classes, data.score.name, data.new_model()[-1].out_features) == (2, "accuracy", 2)
    main(["data", "--from", f"csv:{tmp_path}/t.csv", "--label", "size", "--out", str(out)])
    data = run_data(out)
    assert (data.classes, data.score.name) == (0, "loss")
    assert data.new_model()(data.micro_batch(0, 0)[0]).shape == (2,)


def save_pictures(folder, sizes=((8, 8),), mode="L"):
    for label, name in enumerate(["ant", "bee"]):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            fill = 100 * label + i
            picture = Image.new(mode, sizes[i % len(sizes)], fill if mode == "L" else (fill, 0, 0))
            picture.save(folder / name / f"{i}.png")


def test_pictures_in_folders_are_grey_or_coloured_and_of_one_size(tmp_path):
    save_pictures(tmp_path / "grey")
    found = read_from(f"folder:{tmp_path}/grey")
    x, y = found.train
    assert (x.shape, x.dtype, found.classes) == ((16, 1, 8, 8), torch.uint8, ["ant", "bee"])
    assert torch.equal(x[:, 0, 0, 0].long() // 100, y)
    for (x_part, _), names in zip((found.train, found.test), found.names, strict=True):
        fills = x_part[:, 0, 0, 0].tolist()
        assert names == [f"{['ant', 'bee'][fill // 100]}/{fill % 100}.png" for fill in fills]
    save_pictures(tmp_path / "red" / "train", ((8, 8), (12, 9)), "RGB")
    save_pictures(tmp_path / "red" / "test", ((8, 8),), "RGB")
    with pytest.raises(
        DataError,
        match=r"one size; these have 2, such as 8 x 8 \(train/ant/0.png\) and 12 x 9 .*--size",
    ):
        read_from(f"folder:{tmp_path}/red")
    split = read_from(f"folder:{tmp_path}/red", size=8)
    assert (split.train[0].shape, split.test[0].shape) == ((20, 3, 8, 8), (20, 3, 8, 8))
    assert [names[11] for names in split.names] == ["train/bee/1.png", "test/bee/1.png"]
    np.savez(tmp_path / "p.npz", x=x.numpy(), y=y.numpy())
    data = run_data(tmp_path / "p.npz", model="convnet", augment=True)
    assert data.new_model()(data.micro_batch(0, 0)[0]).shape == (2, 2)


def test_pictures_of_any_mode_have_the_colours_that_a_viewer_shows(tmp_path):
    """Transparent parts are white."""
    folder = tmp_path / "one"
    folder.mkdir()
    red = (200, 10, 20)
    pink = tuple(round(0.4 * channel + 0.6 * 255) for channel in red)
    seen = {
        "RGB": ("RGB", red, red),
        "L": ("L", 70, (70, 70, 70)),
        "1": ("1", 1, (255, 255, 255)),
        "LA": ("LA", (0, 102), (153, 153, 153)),
        "RGBA": ("RGBA", (*red, 102), pink),
        "clear": ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        "P": ("P", None, red),
    }
    for name, (mode, fill, _) in seen.items():
        picture = Image.new("RGB" if mode == "P" else mode, (2, 2), red if fill is None else fill)
        (picture.convert("P") if mode == "P" else picture).save(folder / f"{name}.png")
    (tmp_path / ".hidden").mkdir()
    found = read_folders(tmp_path, None)
    for (x, _), names in zip((found.train, found.test), found.names, strict=True):
        for picture, name in zip(x, names, strict=True):
            expected = seen[name[4:-4]][2]
            tolerance = 20 if name == "one/P.png" else 1  # the palette is that of the web
            for channel, value in zip(picture[:, 0, 0].tolist(), expected, strict=True):
                assert abs(channel - value) <= tolerance, name


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_pictures_stand_as_a_viewer_shows_them_whatever_way_they_are_stored(tmp_path, suffix):
    """Stored on their side, with EXIF orientation 6: column 0 is the top."""
    exif, stored = Image.Exif(), np.full((24, 16), 30, dtype=np.uint8)
    exif[0x0112] = 6
    stored[:, :8] = 200
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.fromarray(stored).save(tmp_path / name / f"1.{suffix}", exif=exif)
        for other in ("2.png", "3.png"):
            Image.fromarray(np.rot90(stored, -1)).save(tmp_path / name / other)
    found = read_from(f"folder:{tmp_path}")
    pictures = torch.cat([found.train[0], found.test[0]])
    assert (len(pictures), pictures.shape[2:]) == (6, (16, 24))
    for picture in pictures[:, 0].int():
        assert (picture[:8] - 200).abs().max() <= 3  # what JPEG and WebP lose
        assert (picture[8:] - 30).abs().max() <= 3


def deep(folder):
    Image.new("I;16", (8, 8), 40_000).save(folder / "ant" / "deep.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "cow").mkdir(), "cow: a class's folder must hold pictures; it"),
        (deep, r"ant/deep.png: a picture must have 8 bits per channel; it has the mode 'I;16'"),
        (
            lambda folder: (folder / "ant" / "no.png").write_text("no"),
            "no.png: must be a picture; its format is none that is known. Take it out",
        ),
    ],
)
def test_pictures_that_are_none_are_refused(tmp_path, change, message):
    save_pictures(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        read_from(f"folder:{tmp_path}")
    save_pictures(tmp_path / "own" / "train")
    save_pictures(tmp_path / "own" / "test")
    (tmp_path / "own" / "test" / "wasp").mkdir()
    with pytest.raises(DataError, match="wasp: must be a class of the training .* of ant, bee"):
        read_from(f"folder:{tmp_path}/own")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a line of column names and rows beneath it; it has 0 lines"),
        ("a,b\n1,2\n3\n", "every line must have 2 values.*; line 3 has 1"),
        ("a,b\n1,x\n,y\n", "every value must be there; column 'a' lacks 1, the first in line 3"),
        ("b\n1\n2\n", "must have a column beside 'b'"),
        ("a,b\n1,x\n\n2,y\n,y\n", "column 'a' lacks 1, the first in line 5"),
        ("a,b\n1,x\n2,y\n3,y\nnull,y\n", "'a' is numbers but for 1, the first 'null' in line 5"),
        ("a,b\n1,x\n2,y\ninf,y\n", "must hold finite numbers or words; 'a' is .* 'inf' in line 4"),
        ("1,2\n1,2\n3,4\n", "the first line must name the columns, each differently; it is 1, 2"),
        ("a,a,b\n1,2,x\n1,2,y\n", "must name the columns, each differently; it is a, a, b"),
        ("a;b\n1;x\n0,5;y\n", "with digits and a decimal point alone; 'a' has '0,5' in line 3"),
        ('a,b\n"1,000.5",x\n"30",y\n', "decimal point alone; 'a' has '1,000.5' in line 2"),
        ("a,b\n10%,x\n20%,y\n", "decimal point alone; 'a' has '10%' in line 2. Write them so"),
        ("a;b\n1;0,5\n2;0,25\n", "decimal point alone; 'b' has '0,5' in line 2"),
        ("a,b\n1,x\n2,x\n3,x\n4,x\n", "training samples must be of two classes at least"),
        ("a,b\n1,5\n2,6\n3,7\n4,8\n", "to train on and to test on; it has 4 and 0"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_from(f"csv:{tmp_path}/t.csv")


def test_words_of_digits_and_signs_stay_words(tmp_path):
    rows = [
        f"{'10-20' if i % 3 else '20-30'},1.2.{i % 2},{'x' if i % 2 else 'y'}\n" for i in range(30)
    ]
    (tmp_path / "t.csv").write_text("".join(["age,version,kind\n", *rows]))
    assert read_from(f"csv:{tmp_path}/t.csv").train[0].shape == (24, 4)


def test_whole_numbers_are_numbers_to_predict_if_one_says_so(tmp_path, capsys):
    rows = [f"{i},{3 * i}\n" for i in range(20)]
    (tmp_path / "t.csv").write_text("".join(["a,b\n", *rows]))
    out = tmp_path / "t.npz"
    assert main(["data", "--from", f"csv:{tmp_path}/t.csv", "--numbers", "--out", str(out)]) == 0
    assert "numbers, " in capsys.readouterr().out
    found = read_arrays(out)
    both = torch.cat([found.train[1], found.test[1]])
    assert torch.equal(both.sort().values, 3.0 * torch.arange(20))
    assert found.classes == []
    (tmp_path / "t.csv").write_text("a,b\n1,2\n2,x\n3,1\n")
    with pytest.raises(DataError, match="finite numbers with --numbers; 'b' has 'x' in line 3"):
        read_from(f"csv:{tmp_path}/t.csv", numbers=True)


def test_bytes_are_pictures_wherever_their_channels_stand(tmp_path):
    bytes_of = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 6), dtype=np.uint8)
    forms = {
        "first": (bytes_of, bytes_of),
        "last": (bytes_of.transpose(0, 2, 3, 1), bytes_of),
        "grey": (bytes_of[:, 0], bytes_of[:, :1]),
        "grey, last": (bytes_of[:, 0, :, :, None], bytes_of[:, :1]),
        "rows": (bytes_of[:, 0, 0], bytes_of[:, 0, 0]),
    }
    for name, (given, expected) in forms.items():
        np.savez(
            tmp_path / "a.npz", x_train=given, y_train=HALVES, x_test=given[:2], y_test=HALVES[:2]
        )
        found = read_from(f"npz:{tmp_path}/a.npz")
        assert torch.equal(found.train[0], torch.from_numpy(expected)), name
        assert torch.equal(found.test[0], torch.from_numpy(expected[:2])), name


ROWS, HALVES = np.zeros((12, 2)), np.arange(12) % 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "must hold arrays x and y, or x_train, .*; it has a"),
        ({"x": ROWS, "y": np.zeros(2)}, "a target for each input; got 12 inputs and 2 targets"),
        ({"x": ROWS, "y": np.zeros((12, 2))}, r"one number for each sample; got \(12, 2\)"),
        ({"x": ROWS, "y": np.float32(1)}, r"one number for each sample; got \(\) of float32"),
        (
            {"x": np.float32(1), "y": HALVES},
            r"inputs must be real numbers, .*; got \(\) of float32",
        ),
        ({"x": ROWS.astype(str), "y": HALVES}, r"inputs must be real .*; got \(12, 2\) of <U32"),
        ({"x": ROWS + 1j, "y": HALVES}, r"inputs must be real numbers, .*; got .* of complex128"),
        ({"x": np.full((12, 2), np.nan), "y": HALVES}, "must be finite; 10 of 10 training samples"),
        (
            {"x": ROWS, "y": HALVES - 1},
            "two classes at least, with numbers from 0 on; got classes -1, 0",
        ),
        (
            {"x": ROWS, "y": 0 * HALVES},
            "two classes at least, .*; got class 0 alone. Are these the labels",
        ),
        ({"x": ROWS[:4], "y": HALVES[:4]}, "to train on and to test on; it has 4 and 0. A fifth"),
        (
            {"x_train": ROWS, "y_train": HALVES, "x_test": ROWS[:0], "y_test": HALVES[:0]},
            "to train on and to test on; it has 12 and 0. A fifth",
        ),
        (
            {"x_train": ROWS, "y_train": HALVES, "x_test": ROWS[:, :1], "y_test": HALVES},
            r"must have the shape of those to train on, \(2,\); got \(1,\)",
        ),
        (
            {"x_train": ROWS, "y_train": HALVES, "x_test": ROWS, "y_test": 3 * HALVES},
            "6 test samples are of others, the first of class 3. Leave them out",
        ),
        (
            {"x": ROWS, "y": 2_000_000_000 * HALVES},
            r"labels must be numbers of classes, from 0 on; they go up to 2,000,000,000 for \d+ "
            "training samples. Number the classes without gaps",
        ),
        (
            {"x": ROWS, "y": 5 * HALVES, "classes": np.array(["a", "b"])},
            "labels must be places in the list of the 2 classes, from 0 on; got 5. Name every",
        ),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_from(f"npz:{tmp_path}/a.npz")


def test_classes_without_training_samples_are_warned_of(tmp_path):
    np.savez(tmp_path / "a.npz", x=ROWS, y=HALVES + 1)
    with pytest.warns(UserWarning, match=r"1 of 3 classes have no .* is class 0: .* \[1, 2\]"):
        read_from(f"npz:{tmp_path}/a.npz")
    labels = torch.tensor([0, 3] * 3)
    with pytest.warns(UserWarning, match=r"gaf: 2 of 4 classes have no .* the first is class 1"):
        assert count_by_labels(labels, labels) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_by_labels(labels % 2, labels % 2) == 2


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("cvs:a", ConfigError, "from must be folder:PATH, csv:PATH.*Did you mean 'csv'"),
        ("csv:none.csv", DataError, "must be a CSV file; it is not there"),
        ("folder:none", DataError, "must be a folder of pictures; it is not"),
        ("npz:none.npz", DataError, "must be an .npz file; it is not there"),
        ("npz:.", DataError, "data .: must be an .npz file; it is a folder. gaf data --from"),
        (f"npz:{__file__}", DataError, "must be an .npz file; it is none. gaf data --from"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        read_from(source)
    with pytest.raises(DataError, match="Give it with --data FILE"):
        read_arrays(None)


def test_data_takes_a_name_or_a_source(capsys):
    assert main(["data"]) == 2
    assert main(["data", "digits", "--from", "csv:a"]) == 2
    assert "needs the name of a data set, or --from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--out", "d.npz"], "out goes with --from alone; got it with 'digits'"),
        (["--from", "folder:a", "--label", "b"], "label goes with csv and hf alone; got 'b' with"),
        (["--from", "csv:a", "--size", "8"], "size goes with folder and hf alone; got 8 with csv"),
        (["--from", "folder:a", "--size", "0"], "size must be at least 1; got 0"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, message, capsys):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_table_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("a,b\n1,Käse\n".encode("latin-1"))
    with pytest.raises(DataError, match="must be text in UTF-8; .* Save it in UTF-8"):
        read_from(f"csv:{tmp_path}/t.csv")


def test_a_class_without_training_samples_is_listed(tmp_path):
    arrays = {"x_train": np.zeros((4, 2)), "y_train": [0, 0, 1, 1]}
    arrays |= {"x_test": np.zeros((1, 2)), "y_test": [0], "classes": ["ant", "bee", "cow"]}
    np.savez(tmp_path / "a.npz", **{name: np.asarray(values) for name, values in arrays.items()})
    facts = describe_arrays(read_arrays(tmp_path / "a.npz"))
    assert facts["classes"] == "3 (ant: 2, bee: 2, cow: 0)"

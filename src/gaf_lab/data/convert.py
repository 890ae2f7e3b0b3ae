"""Data of the user's own, by where they are: "csv:FILE", "folder:DIR", "npz:FILE" or "hf:DIR"."""

from pathlib import Path

from gaf_lab.data.arrays import Arrays, read_arrays
from gaf_lab.data.check_arrays import check_arrays
from gaf_lab.data.convert_hugging_face import read_hugging_face
from gaf_lab.data.convert_pictures import read_folders
from gaf_lab.data.convert_table import read_table
from gaf_lab.settings.checks import ConfigError, nearest

FORMS = ("folder", "csv", "npz", "hf")
USES = {
    "label": ("csv", "hf"),
    "size": ("folder", "hf"),
    "numbers": ("csv",),
}  # which forms an option goes with


def read_from(
    source: str, label: str | None = None, size: int | None = None, numbers: bool = False
) -> Arrays:
    """The arrays of a source.

    Args:
        source: "csv:FILE", a table with a line of column names; "folder:DIR", pictures in folders
            of classes; "npz:FILE", arrays x and y; "hf:DIR", a Hugging Face dataset on disk.
        label: of a table or dataset, the column of labels; None for its last, or only, one.
        size: of pictures, height and width to scale to; None if they have one size.
        numbers: of a table, the labels are numbers to predict, although all of them may be whole.

    Raises:
        ConfigError, DataError: if there are no such data.
    """
    form, colon, place = source.partition(":")
    if not colon or form not in FORMS or not place:
        raise ConfigError(
            f"from must be {', '.join(f'{name}:PATH' for name in FORMS)}; got {source!r}."
            f"{nearest(form.lower(), FORMS)}"
        )
    given = {"label": label, "size": size, "numbers": numbers or None}
    for name, value in given.items():
        if value is not None and form not in USES[name]:
            raise ConfigError(
                f"{name} goes with {' and '.join(USES[name])} alone; got {value!r} with {form}. "
                "Leave it out."
            )
    if size is not None and size < 1:
        raise ConfigError(f"size must be at least 1; got {size}. 64 is usual.")
    path = Path(place)
    if form == "npz":
        return read_arrays(path)
    if form == "folder":
        found = read_folders(path, size)
    elif form == "csv":
        found = read_table(path, label, numbers)
    else:
        found = read_hugging_face(path, label, size)
    check_arrays(found.train, found.test, place, found.classes)
    return found

"""Data of the user's own, by where they are: "csv:FILE", "folder:DIR", "npz:FILE" or "hf:DIR"."""

from pathlib import Path

from gaf_lab.data.arrays import Arrays, read_arrays
from gaf_lab.data.convert_hugging_face import read_hugging_face
from gaf_lab.data.convert_pictures import read_folders
from gaf_lab.data.convert_table import read_table
from gaf_lab.settings.checks import ConfigError, nearest

FORMS = ("folder", "csv", "npz", "hf")
USES = {"label": ("csv", "hf"), "size": ("folder", "hf")}  # which forms an option goes with


def read_from(source: str, label: str | None = None, size: int | None = None) -> Arrays:
    """The arrays of a source.

    Args:
        source: "csv:FILE", a table with a line of column names; "folder:DIR", pictures in folders
            of classes; "npz:FILE", arrays x and y; "hf:DIR", a Hugging Face dataset on disk.
        label: of a table or dataset, the column of labels; None for its last, or only, one.
        size: of pictures, height and width to scale to; None if they have one size.

    Raises:
        ConfigError, DataError: if there are no such data.
    """
    form, colon, place = source.partition(":")
    if not colon or form not in FORMS or not place:
        raise ConfigError(
            f"from must be {', '.join(f'{name}:PATH' for name in FORMS)}; got {source!r}."
            f"{nearest(form, FORMS)}"
        )
    for name, value in {"label": label, "size": size}.items():
        if value is not None and form not in USES[name]:
            raise ConfigError(
                f"{name} goes with {' and '.join(USES[name])} alone; got {value!r} with {form}. "
                "Leave it out."
            )
    if size is not None and size < 1:
        raise ConfigError(f"size must be at least 1; got {size}. 64 is usual.")
    if form == "csv":
        return read_table(Path(place), label)
    if form == "folder":
        return read_folders(Path(place), size)
    return read_hugging_face(Path(place), label, size) if form == "hf" else read_arrays(Path(place))

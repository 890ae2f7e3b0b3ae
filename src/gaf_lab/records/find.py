"""The runs at a place: a run's folder, a folder of runs, or a pack."""

from pathlib import Path

from gaf_lab.records import packs
from gaf_lab.records.run import FILE, Run, read


def find_runs(places: list[Path]) -> list[Run]:
    """All runs at the places: first those of folders, in order of their paths, then those of packs.

    Raises:
        ValueError: without places, for a place that does not exist or holds no run, and for a
            broken file.
    """
    if not places:
        raise ValueError(
            "runs: must have at least one place; got none. "
            f"Give the folder of a run, which has a file {FILE}."
        )
    folders = sorted({folder for place in places for folder in run_folders(place)})
    files = [place for place in places if place.is_file() and place.name != FILE]
    return [*map(read, folders), *(run for file in files for run in runs_in_pack(file))]


def run_folders(place: Path) -> list[Path]:
    """The folders of runs at a place; none for a pack."""
    if not place.exists():
        raise ValueError(
            f"{place}: must exist; it does not. "
            f"Give a folder of runs, a {FILE}, or a file of results/."
        )
    if place.is_file():
        return [place.parent] if place.name == FILE else []
    found = [file.parent for file in place.rglob(FILE)]
    if not found:
        raise ValueError(
            f"{place}: must hold at least one run (a file {FILE}); none was found. "
            "Give the folder that `gaf train --out` wrote."
        )
    return found


def runs_in_pack(file: Path) -> list[Run]:
    runs = packs.read_pack(file)
    if not runs:
        raise ValueError(
            f"{file}: must hold at least one run; none was found. Give another file of results/."
        )
    return runs

"""A table for other programs: as CSV, and as LaTeX with the rules of the package booktabs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

# text, a whole number, or a mean with its deviation ("± 0.3", or nothing)
SheetCell = str | int | tuple[str, str]

EMPTY = ("", "\N{EN DASH}")  # no value
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"\N{MINUS SIGN}": "$-$", "τ": r"$\tau$", "±": r"$\pm$", "\N{EN DASH}": "--"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def write_sheets(
    headings: Sequence[str], rows: Sequence[Sequence[SheetCell]], stem: Path
) -> list[str]:
    """Writes the table as `stem`.csv and `stem`.tex; returns the files' names."""
    found = {".csv": as_csv(headings, rows), ".tex": as_latex(headings, rows)}
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in found.items():
        stem.with_suffix(suffix).write_text(text, encoding="utf-8")
    return [stem.with_suffix(suffix).name for suffix in found]


def as_csv(headings: Sequence[str], rows: Sequence[Sequence[SheetCell]]) -> str:
    """Mean and deviation have columns of their own; a missing value is empty."""
    pairs = [any(isinstance(row[i], tuple) for row in rows) for i in range(len(headings))]
    heads = [
        name
        for heading, pair in zip(headings, pairs, strict=True)
        for name in ([heading, f"{heading}, deviation"] if pair else [heading])
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        writer.writerow([value for cell in row for value in split_cell(cell)])
    return out.getvalue()


def split_cell(cell: SheetCell) -> list[str]:
    if not isinstance(cell, tuple):
        return [str(cell)]
    mean, deviation = cell
    return [plain_number(mean), plain_number(deviation.removeprefix("± "))]


def plain_number(text: str) -> str:
    return "" if text in EMPTY else text.replace("\N{MINUS SIGN}", "-")


def as_latex(headings: Sequence[str], rows: Sequence[Sequence[SheetCell]]) -> str:
    """A tabular; it needs \\usepackage{booktabs}. Text is left-aligned, numbers are not."""
    first = rows[0] if rows else [""] * len(headings)
    sides = "".join("l" if isinstance(cell, str) else "r" for cell in first)
    lines = [
        " & ".join(map(escape, line)) + r" \\" for line in [headings, *map(joined_cells, rows)]
    ]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def joined_cells(row: Sequence[SheetCell]) -> list[str]:
    return [" ".join(cell).strip() if isinstance(cell, tuple) else str(cell) for cell in row]


def escape(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))

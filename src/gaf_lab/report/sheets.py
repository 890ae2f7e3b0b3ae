"""A table for other programs: as CSV, and as LaTeX with the rules of the package booktabs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

Cell = (
    str | int | tuple[str, str]
)  # text, a whole number, or a mean with its deviation ("± 0.3", or nothing)

NOTHING = ("", "\N{EN DASH}")  # no value
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"\N{MINUS SIGN}": "$-$", "τ": r"$\tau$", "±": r"$\pm$", "\N{EN DASH}": "--"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def write(headings: Sequence[str], rows: Sequence[Sequence[Cell]], stem: Path) -> list[str]:
    """Writes the table beside each other as `stem`.csv and `stem`.tex; returns the files' names."""
    found = {".csv": as_csv(headings, rows), ".tex": as_latex(headings, rows)}
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in found.items():
        stem.with_suffix(suffix).write_text(text, encoding="utf-8")
    return [stem.with_suffix(suffix).name for suffix in found]


def as_csv(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Mean and deviation in columns of their own; empty where there is no value."""
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
        writer.writerow([value for cell in row for value in plain(cell)])
    return out.getvalue()


def plain(cell: Cell) -> list[str]:
    if not isinstance(cell, tuple):
        return [str(cell)]
    mean, deviation = cell
    return [number(mean), number(deviation.removeprefix("± "))]


def number(text: str) -> str:
    return "" if text in NOTHING else text.replace("\N{MINUS SIGN}", "-")


def as_latex(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A tabular; it needs \\usepackage{booktabs}. Text to the left, numbers to the right."""
    first = rows[0] if rows else [""] * len(headings)
    sides = "".join("l" if isinstance(cell, str) else "r" for cell in first)
    lines = [" & ".join(map(escape, line)) + r" \\" for line in [headings, *map(texts, rows)]]
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


def texts(row: Sequence[Cell]) -> list[str]:
    return [" ".join(cell).strip() if isinstance(cell, tuple) else str(cell) for cell in row]


def escape(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))

"""A table for other programs holds the same cells as the page."""

import csv

import pytest

from gaf_lab.report import sheets

HEADS = ["arm", "seeds", "accuracy (%)"]
ROWS = [
    ["a & b_1", 3, ("82.3", "± 3.5")],
    ["τ, 50%", 1, ("\N{EN DASH}", "")],
    ["c", 2, ("\N{MINUS SIGN}1.0", "")],
]


def test_csv_has_mean_and_deviation_in_columns_and_nothing_where_there_is_no_value():
    assert list(csv.reader(sheets.as_csv(HEADS, ROWS).splitlines())) == [
        ["arm", "seeds", "accuracy (%)", "accuracy (%), deviation"],
        ["a & b_1", "3", "82.3", "3.5"],
        ["τ, 50%", "1", "", ""],
        ["c", "2", "-1.0", ""],
    ]


def test_latex_is_a_tabular_with_its_special_characters_escaped():
    assert sheets.as_latex(HEADS, ROWS).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"arm & seeds & accuracy (\%) \\",
        r"\midrule",
        r"a \& b\_1 & 3 & 82.3 $\pm$ 3.5 \\",
        r"$\tau$, 50\% & 1 & -- \\",
        r"c & 2 & $-$1.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\\input{x}", r"\textbackslash{}input\{x\}"),
        ("a\nb ~^", r"a b \textasciitilde{}\textasciicircum{}"),
        ("$#", r"\$\#"),
    ],
)
def test_what_latex_would_act_on_is_text(text, escaped):
    assert sheets.escape(text) == escaped


def test_both_files_stand_beside_each_other(tmp_path):
    assert sheets.write_sheets(HEADS, ROWS, tmp_path / "new" / "report") == [
        "report.csv",
        "report.tex",
    ]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.csv", "report.tex"}

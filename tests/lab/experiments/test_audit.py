"""The audit: that it only watches, that wrong labels are found, what is written, the page's tables.

`python tests/lab/experiments/test_audit.py` prints the tables.
"""

import csv
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch import nn

from gaf.samples.report import separation_of
from gaf_lab.commands.main import main
from gaf_lab.data.arrays import read_arrays
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.sets import load_dataset
from gaf_lab.experiments import audit_figures
from gaf_lab.experiments.audit import audit_labels, find_head
from gaf_lab.experiments.audit_report import SCORES, closing_words, mean_and_deviation
from gaf_lab.experiments.audit_result import AuditResult
from gaf_lab.report.figures import canvas
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.run import train
from helpers.fakes import Silent

ROOT = Path(__file__).parents[3]
WHICH = ("given", "predicted")
SMALL = TrainConfig(dataset="digits", policy="mean", k=1, b=32, passes=6.0, eval_every=1.0)


def audit(**changes: Any) -> AuditResult:
    return audit_labels(dataclasses.replace(SMALL, **changes), None, lambda *at: None)


def test_it_watches_the_run_of_gaf_train_without_effect(tmp_path: Path) -> None:
    config: dict[str, Any] = {"policy": "gaf", "k": 4, "b": 8, "passes": 2.0, "loss": "gce"}
    run = train(dataclasses.replace(SMALL, **config), tmp_path / "run", Silent())
    assert audit(**config).selected == run.selected["heldout_accuracy"]


@pytest.mark.parametrize("limit", [0, 300])
def test_the_list_names_samples_as_the_data_set_does(limit: int) -> None:
    problem = make_run_data(dataclasses.replace(SMALL, limit=limit), None, torch.device("cpu"))
    data = load_dataset("digits", None)
    torch.testing.assert_close(data.train_x[problem.origin], problem.train.x, rtol=0, atol=0)
    assert data.train_y[problem.origin].equal(problem.train.clean)


@pytest.mark.parametrize("rate", [0.4, 0.1, 0.0])
def test_wrong_labels_are_found_and_counted(rate: float) -> None:
    found = audit(noise_rate=rate)
    line = found.line()
    assert line["samples"] == len(found.problem.train)
    if rate:
        assert line["flipped"] == pytest.approx(rate * line["samples"], rel=0.1)
        assert line["issues"]["count"] == pytest.approx(line["flipped"], rel=0.5)
        assert line["issues"]["precision"] > 0.7 and line["issues"]["recall"] > 0.9
        assert line["auroc"]["quality"] > 0.97
        assert line["first100"]["quality"] > 0.95
    else:
        assert line["issues"]["count"] < 0.1 * line["samples"]
        assert line["issues"]["precision"] is line["auroc"]["quality"] is None


OWN = """
import torch
from torch import nn

from gaf_lab import Problem


def clusters(config):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (400,), generator=draw)
    x = {"points": torch.randn(400, 4, generator=draw) + 3 * torch.eye(3, 4)[y]}
    return Problem(model=Net, train=({"points": x["points"][:300]}, y[:300]),
                   test=({"points": x["points"][300:]}, y[300:]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x["points"])


def plane(config):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    clean = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    y = clean.clone()
    y[:200:10] += 9.0
    return Problem(model=nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), train=(x[:200], y[:200]),
                   test=(x[200:], y[200:]), loss=lambda out, target: (out - target) ** 2,
                   clean=clean[:200])
"""


@pytest.mark.parametrize("task", ["clusters", "plane"])
def test_a_task_of_ones_own_is_judged_too(tmp_path: Path, task: str) -> None:
    """Classes by prototypes, other targets by their loss; neither has pictures for a sheet."""
    (tmp_path / "own.py").write_text(OWN)
    words = f"audit --task {tmp_path / 'own.py'}:{task} --b 20 --passes 12 --heldout 0".split()
    words += (
        ["--noise", "symmetric", "--noise-rate", "0.4"] if task == "clusters" else ["--lr", "0.01"]
    )
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "samples.csv").open()))
    assert len(rows) == (300 if task == "clusters" else 200)
    assert ("given_label" in rows[0]) == (task == "clusters")
    (line,) = lines(tmp_path / "out" / "audit.jsonl")
    assert line["auroc"]["quality"] > 0.9 and line["issues"]["recall"] > 0.8
    assert not (tmp_path / "out" / "suspects.png").exists()


def test_a_line_is_what_the_report_says_of_the_truth() -> None:
    found = audit(passes=2.0)
    line, rows = found.line(), range(len(found.index))
    wrong = [found.report["given_label"][row] != found.truth[row] for row in rows]
    issues = [row for row in rows if found.report["is_label_issue"][row]]
    assert line["flipped"] == sum(wrong)
    assert line["separation"] == separation_of(found.report, "prototype") > 0
    right = sum(wrong[row] for row in issues)
    assert line["issues"]["precision"] == pytest.approx(right / len(issues))
    assert line["issues"]["recall"] == pytest.approx(right / sum(wrong))
    by_loss = sorted(rows, key=lambda row: -found.report["loss"][row])[:100]
    assert line["first100"]["loss"] == pytest.approx(
        statistics.fmean(wrong[row] for row in by_loss)
    )


def test_the_head_gives_a_number_for_each_class() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    assert find_head(model, 5) is model[2]
    assert find_head(model, 3) is model[0]
    assert find_head(model, 4) is None


def test_the_command_writes_a_ranked_list_figures_and_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dataset digits --b 32 --passes 2 --eval-every 1 --seeds 2"
    assert main(["audit", *words.split(), "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "samples.csv").open()))
    columns = "index given_label predicted_label label_quality is_label_issue prototype loss"
    columns += " disagreement visits doubt true_label flipped"
    assert list(rows[0]) == columns.split()
    quality = [float(row["label_quality"]) for row in rows]
    assert quality == sorted(quality) and all(0 <= value <= 1 for value in quality)
    data = load_dataset("digits", None).train_y.tolist()
    for row in rows:
        assert int(row["true_label"]) == data[int(row["index"])]
        assert (row["given_label"] != row["true_label"]) == (row["flipped"] == "1")
        assert (row["given_label"] != row["predicted_label"]) == (row["is_label_issue"] == "1")
    assert len({row["index"] for row in rows}) == len(rows)
    assert imread(tmp_path / "audit.png").shape[1] == 1500  # two panels
    assert (tmp_path / "suspects.png").read_bytes().startswith(b"\x89PNG")
    found = lines(tmp_path / "audit.jsonl")
    assert [line["seed"] for line in found] == [0, 1]
    assert found[0]["issues"]["count"] == sum(row["is_label_issue"] == "1" for row in rows)
    out = capsys.readouterr().out
    assert out.startswith("digits, 40% symmetric label noise; mlp; averaging, k = 1, b = 32\n")
    assert "samples.csv is ranked by label quality: AUROC 0." in out
    assert f"The 50 first as pictures: {tmp_path / 'suspects.png'}" in out


def test_without_known_flips_the_ranking_is_written_and_called_unproven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dataset digits --noise none --b 32 --passes 1 --eval-every 1"
    assert main(["audit", *words.split(), "--out", str(tmp_path)]) == 0
    assert imread(tmp_path / "audit.png").shape[1] == 750  # one panel: none that would be empty
    assert {row["flipped"] for row in csv.DictReader((tmp_path / "samples.csv").open())} == {""}
    assert "so the ranking cannot be checked" in " ".join(capsys.readouterr().out.split())


def line_of(**auroc: float) -> dict[str, Any]:
    return {
        "auroc": dict.fromkeys(SCORES, 0.6) | auroc,
        "first100": dict.fromkeys(SCORES, 0.97),
        "issues": {"count": 40, "precision": 0.9, "recall": 0.75},
        "samples": 80,
    }


def test_the_closing_words_by_hand() -> None:
    assert closing_words([line_of(quality=0.98, loss=0.944)]) == (
        "samples.csv is ranked by label quality: AUROC 0.980; "
        "97% of the first 100 labels are wrong. The mean loss has 0.944. "
        "is_label_issue marks 40 lines. 90% of these are wrong. "
        "They hold 75% of all wrong labels."
    )
    line = line_of()
    line["issues"] = {"count": 0, "precision": None, "recall": 0.0}
    assert closing_words([line]).endswith(" is_label_issue marks no line.")


@pytest.mark.parametrize(
    ("separations", "words"),
    [
        (
            [0.825, 0.815],
            " The scores of the marked stand apart from the others' (separation 0.820).",
        ),
        (
            [0.5],
            " The scores of the marked do not stand apart from the others' (separation 0.500, "
            "below 0.7): few labels are wrong, or the features are too weak to tell.",
        ),
        ([None], " They hold 75% of all wrong labels."),
    ],
)
def test_the_closing_words_say_whether_the_marked_stand_apart(
    separations: list[float | None], words: str
) -> None:
    found = closing_words([line_of() | {"separation": each} for each in separations])
    end = " These are means of 2 seeds; samples.csv is of the first one alone."
    assert found.removesuffix(end).endswith(words)


def test_the_closing_words_doubt_the_marks_if_they_are_over_half() -> None:
    line = line_of() | {"samples": 50}
    assert closing_words([line]).endswith(
        " The marked are 80% of all: over half mostly means that the features do not tell the "
        "classes apart: go by the ranking, and train longer (--passes)."
    )


@pytest.mark.parametrize(
    "changes", [{}, {"dataset": "noise", "limit": 40, "noise": "none", "b": 4}]
)
def test_the_sheet_has_a_picture_for_each_suspect_with_both_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Of one channel and of three; also where there are fewer samples than places."""
    kept: list[Any] = []
    monkeypatch.setattr(
        audit_figures, "canvas", lambda *size: kept.append(canvas(*size)) or kept[-1]
    )
    found = audit(passes=2.0, **changes)
    assert audit_figures.draw_suspects(found, tmp_path / "suspects.png")
    shown = [ax for ax in kept[0].axes if ax.images]
    assert len(shown) == min(audit_figures.SUSPECTS, len(found.index))
    for ax, row in zip(shown, found.order, strict=False):
        train, i = found.problem.train, found.index[row]
        predicted = found.report["predicted_label"][row]
        assert ax.get_title() == f"{int(train.observed[i])} → {predicted}"
        assert ax.texts[0].get_text() == f"#{int(found.problem.origin[i])}"
        pixels = torch.as_tensor(ax.images[0].get_array().filled())
        assert pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).equal(train.x[i])


def test_own_pictures_are_listed_by_file_and_class(tmp_path: Path, capsys: Any) -> None:
    """Three classes of squares in folders; three files of each lie in the wrong one."""
    shades, wrong = {"cat": 40, "dog": 120, "West Highland terrier": 220}, []
    for name in shades:
        (tmp_path / "own" / name).mkdir(parents=True)
    for i, (name, shade) in enumerate(shades.items()):
        for j in range(40):
            place = name if j >= 3 else list(shades)[(i + 1) % 3]
            file = Path(place) / f"{name[:3]} {j:02d}.png"
            Image.new("L", (6, 6), shade + j // 2).save(tmp_path / "own" / file)
            wrong += [file.as_posix()] if j < 3 else []
    out, npz = tmp_path / "audit", tmp_path / "own.npz"
    assert main(["data", "--from", f"folder:{tmp_path}/own", "--out", str(npz)]) == 0
    words = ["--task", "gaf_lab.tasks.arrays:arrays", "--data", str(npz), "--b", "10"]
    assert main(["audit", *words, "--heldout", "0", "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "samples.csv").open()))
    kept = read_arrays(npz)
    assert {row["sample"] for row in rows} == set(kept.names[0])
    for row in rows:
        assert row["sample"] == kept.names[0][int(row["index"])]
        assert row["sample"].split("/")[0] == row["given_class"]
        assert kept.classes[int(row["predicted_label"])] == row["predicted_class"]
    moved = {row["sample"] for row in rows} & set(wrong)
    assert {row["sample"] for row in rows[: len(moved)]} == moved
    said = capsys.readouterr().out
    assert "The first suspects" in said
    assert rows[0]["sample"] in " ".join(said.split())
    assert (out / "suspects.png").exists()


def test_names_above_a_picture_fit_and_keep_what_tells_them_apart() -> None:
    found = audit(passes=1.0, limit=300)
    row, (given, other) = found.order[0], (found.report[f"{w}_label"] for w in WHICH)
    assert audit_figures.labels_of(found, row) == f"{given[row]} → {other[row]}"
    assert audit_figures.name_of(found, row) == f"#{found.origin[row]}"
    names = [f"class number {i}, of ten" for i in range(10)]
    files = [f"train/{i}/holiday picture {i:04d}.jpg" for i in range(1500)]
    named = dataclasses.replace(found.problem.problem, class_names=names, sample_names=files)
    found = AuditResult(dataclasses.replace(found.problem, problem=named), found.report, None, 0.0)
    first, second = audit_figures.labels_of(found, row).split("\n")
    assert len(first) <= 16 and len(second) <= 16 and second.startswith("→ class")
    assert audit_figures.name_of(found, row) == f"…icture {found.origin[row]:04d}.jpg"


def test_what_mixes_samples_or_repeats_them_is_refused() -> None:
    for change in ({"mixup": 0.2}, {"sam": 0.05}, {"audit_passes": 2.0}):
        with pytest.raises(ConfigError, match="mixup, sam and audit_passes must be 0 for an audit"):
            audit(**change)


# --- the page


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == "audit"]


def by_setting(found: list[dict[str, Any]], *settings: str) -> list[list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for line in found:
        groups.setdefault(tuple(line[name] for name in settings), []).append(line)
    return list(groups.values())


def noise_of(line: dict[str, Any]) -> str:
    return f"{line['dataset']}, {100 * line['noise_rate']:.0f}% {line['noise']}"


def issue_cells(group: list[dict[str, Any]]) -> list[str]:
    shares = [
        statistics.fmean(line["issues"][n] for line in group) for n in ("precision", "recall")
    ]
    count = statistics.fmean(line["issues"]["count"] for line in group)
    return [f"{count:.0f}", *(f"{100 * share:.0f}%" for share in shares)]


LAST = ["marked", "of these wrong", "of the wrong marked"]


def head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def table() -> str:
    """What `gaf audit` finds."""
    aurocs = (f"AUROC, {name}" for name in SCORES)
    firsts = ("first 100, quality", "first 100, loss")
    rows = head(["data, label noise", "n", *aurocs, *firsts, *LAST])
    for group in by_setting(
        lines(ROOT / "results" / "audit.jsonl"), "dataset", "noise", "noise_rate"
    ):
        cells = [mean_and_deviation([line["auroc"][name] for line in group]) for name in SCORES]
        for name in ("quality", "loss"):
            cells.append(mean_and_deviation([line["first100"][name] for line in group]))
        cells += issue_cells(group)
        rows.append(f"| {noise_of(group[0])} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(rows)


MICRO_BATCHES = {  # scores of the records of micro-batches
    "quality": "label quality, mean over evaluations",
    "loss": "loss, mean over evaluations",
    "loss_selected": "loss, at the selected evaluation",
    "loss_averaging": "loss, mean over evaluations, plain averaging",
    "distance": "distance, this filter",
    "rejection": "rejection, this filter",
}


def micro_batch_table() -> str:
    """What the filter's own scores, and others in the same runs, find."""
    rows = head(["data, label noise", "b", "n", *MICRO_BATCHES.values()])
    settings = ("dataset", "noise", "noise_rate", "b")
    for group in by_setting(lines(ROOT / "results" / "audit-micro-batches.jsonl"), *settings):
        cells = [mean_and_deviation([line["auroc"][n] for line in group]) for n in MICRO_BATCHES]
        start = f"{noise_of(group[0])} | {group[0]['b']} | {len(group)}"
        rows.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_pages_tables_are_the_records() -> None:
    text = (ROOT / "docs" / "audit.md").read_text()
    assert table() in text and micro_batch_table() in text


if __name__ == "__main__":
    print(table(), micro_batch_table(), sep="\n\n")

"""Accuracy by class: the figures, the table, the JSON, the page, and the word about unbalanced data."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import schemas
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.data import ImageSet
from prunekit.evaluation.answers import Answers
from prunekit.evaluation.score import EvalResult, Score, evaluate
from prunekit.metric import ACCURACY
from prunekit.report.pages.classes import class_parts
from prunekit.report.pages.comparison import comparison_page
from prunekit.report.terminal.classes import class_cells, unbalanced
from prunekit.report.terminal.tables import result_cells
from prunekit.spec import InputSpec
from prunekit.workflows.sweeps.points import result_from_json

Capture = pytest.CaptureFixture[str]


def answers(*pairs: tuple[int, int, int], classes: tuple[str, ...] = ("cat", "dog", "owl", "none")) -> Answers:
    """For each (class, named, count)."""
    labels = torch.cat([torch.full((count,), label) for label, _, count in pairs])
    return Answers(classes, labels, torch.cat([torch.full((count,), named) for _, named, count in pairs]))


MIXED = answers((0, 0, 6), (0, 1, 2), (1, 1, 1), (1, 0, 2), (1, 2, 1), (2, 2, 8))


def result(found: Answers, name: str = "a.pt") -> EvalResult:
    accuracy = float((found.labels == found.named).double().mean())
    plain = EvalResult(name, None, None, None, 0, 10, 20, 30, None)
    return plain.scored(Score(ACCURACY, {"accuracy": accuracy, "loss": 0.5}, len(found.labels), found))


def test_the_figures_of_each_class() -> None:
    cat, dog, owl, none = MIXED.per_class
    assert (cat.name, cat.images, cat.accuracy, cat.precision) == ("cat", 8, 0.75, 0.75)
    assert (dog.images, dog.accuracy, dog.precision) == (4, 0.25, 1 / 3)
    assert (owl.accuracy, owl.precision) == (1, 8 / 9)
    assert (none.images, none.accuracy, none.precision) == (0, None, None)
    assert MIXED.balanced_accuracy == pytest.approx((0.75 + 0.25 + 1) / 3)
    assert MIXED.confusion().tolist() == [[6, 2, 0, 0], [2, 1, 1, 0], [0, 0, 8, 0], [0, 0, 0, 0]]
    assert dict(MIXED.mistakes()) == {(0, 1): 2, (1, 0): 2, (1, 2): 1}


def test_they_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    pixels, labels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 3, (50,))
    data = ImageSet("noise", "test", pixels, labels, ("a", "b", "c"), InputSpec((1, 8, 8)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    found = evaluate(model, data, batch_size=16)
    with torch.no_grad():
        named = model(data.normalise(pixels)).argmax(1)
    assert found.answers is not None
    assert torch.equal(found.answers.named, named)
    assert found.accuracy == pytest.approx(float((named == labels).double().mean()))
    recalls = [float((named[labels == i] == i).double().mean()) for i in range(3)]
    assert found.balanced_accuracy == pytest.approx(sum(recalls) / 3)
    again = result_from_json(found.to_json())
    assert again == found
    old = {key: value for key, value in found.to_json().items() if key != "balanced_accuracy"}
    assert result_from_json(old).accuracy == found.accuracy


@pytest.mark.parametrize(
    ("counts", "is_so"),
    [((65, 35), True), ((60, 40), False), ((40, *(7,) * 9), True), ((10,) * 10, False), ((30, *(8,) * 9), False)],
)
def test_when_data_are_unbalanced(counts: tuple[int, ...], is_so: bool) -> None:
    names = tuple(f"class {i}" for i in range(len(counts)))
    found = answers(*((i, 0, count) for i, count in enumerate(counts)), classes=names)
    assert found.unbalanced is is_so
    said = unbalanced(found, 0.65)
    assert (said is not None) is is_so
    assert ("balanced" in result_cells([result(found)])[0]) is is_so
    if said:
        assert f"{100 * counts[0] / sum(counts):.0f} % of the images are of one class, 'class 0'" in said


def test_one_network_shows_more_than_several() -> None:
    columns, rows = class_cells([result(MIXED)])
    assert columns == ["class", "images", "accuracy", "precision", "mostly taken for"]
    assert rows[1] == ("dog", "4", "25.00 %", "33.33 %", "cat (2)")
    assert rows[3] == ("none", "0", "–", "–", "–")
    columns, rows = class_cells([result(MIXED), result(answers((0, 0, 8)), "b.pt")])
    assert columns == ["class", "images", "a.pt", "b.pt"]
    assert rows[0] == ("cat", "8", "75.00 %", "100.00 %")


class Cells(HTMLParser):
    """The texts of a page's elements, and the notes that hovering shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.notes: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.notes += [str(value) for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_has_the_matrix_with_names_that_are_text() -> None:
    nasty = '<img src="x">'
    found = answers((0, 0, 6), (0, 1, 2), (1, 1, 1), classes=(nasty, "b"))
    page = comparison_page("t", [result(found, nasty), result(found, "b.pt")], "")
    cells = Cells(page)
    assert "img" not in cells.tags
    assert f"{nasty}, named b: 2 of 8 (25.0 %)" in cells.notes
    assert cells.text.count("6") == 2
    assert class_parts([EvalResult("a", None, None, None, 0, 1, 1, 1, None)]) == []


def test_of_many_classes_a_page_has_the_mistakes() -> None:
    found = answers((0, 1, 5), (3, 2, 7), (4, 4, 90), classes=tuple(f"class {i}" for i in range(1000)))
    text = " ".join(Cells("".join(class_parts([result(found)]))).text)
    assert "class 3 class 2 7 class 0 class 1 5" in text
    assert "88\xa0% of the images are of one class, class 4" in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images of one class and five of each of nine others, in a folder a class."""
    for label in range(10):
        place = tmp_path / "data" / f"{label}"
        place.mkdir(parents=True)
        for i in range(40 if not label else 5):
            Image.new("L", (8, 8), 25 * label + i % 3).save(place / f"{i}.png")
    return tmp_path / "data"


def test_the_command(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    checkpoint.save(models.build("vgg_digits", {"config": "8-M-16"}), path)
    command = ["eval", str(path), "--data", str(folder), "--no-latency"]
    assert run([*command, "--per-class", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    schemas.check(facts)
    assert [entry["class"] for entry in facts["per_class"]] == [f"{i}" for i in range(10)]
    assert [entry["images"] for entry in facts["per_class"]] == [40, *[5] * 9]
    assert facts["balanced_accuracy"] == pytest.approx(sum(e["accuracy"] for e in facts["per_class"]) / 10)
    assert "47 % of the images are of one class, '0'" in captured.err
    assert run([*command, "--per-class"]) == 0
    out = capsys.readouterr().out
    assert "mostly taken for" in out
    assert "balanced" in out
    assert run([*command, "--json"]) == 0
    assert "per_class" not in json.loads(capsys.readouterr().out)
    assert run(["eval", str(path), "--per-class"]) == 2
    assert "--per-class needs --data" in capsys.readouterr().err

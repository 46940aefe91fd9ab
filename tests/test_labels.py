"""Labels and outputs: folders that are some of a classifier's classes, in another order, or none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import prunekit as pk
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.cli.commands.export import _batches as batches_of
from prunekit.data import ImageSet, labelled_for, open_data
from prunekit.errors import InputError
from prunekit.files.class_names import checked_class_names, read_class_names
from prunekit.methods.manidp.gate_report import portray
from prunekit.report.terminal.output import Output
from prunekit.spec import InputSpec, classes_of, remember_classes
from prunekit.surgery.copying import copied

Capture = pytest.CaptureFixture[str]
# Brightest first, so that no order of the names is that of the alphabet.
NAMES = ("white", "pale", "grey", "dark", "black")


def brightness(name: str) -> int:
    return 250 - 60 * NAMES.index(name)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A classifier that is always right: its outputs, in the order of `NAMES`, say how near an image is to each."""
    network = models.build("vgg_digits", {"config": "8-8", "num_classes": 5}).eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for module in network.features:
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight[0, 0, 1, 1], 1.0)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    levels = torch.tensor([brightness(name) / 255 for name in NAMES])
    network.fc.weight.data[:, 0] = 2 * levels
    network.fc.bias.data = -(levels**2)
    return network


def folder(place: Path, names: Sequence[str], count: int = 10) -> Path:
    """A folder with pictures of each of these classes, of the brightness that its name says."""
    for name in names:
        (place / name).mkdir(parents=True)
        for i in range(count):
            level = brightness(name) if name in NAMES else 0
            Image.new("L", (8, 8), level + i % 2).save(place / name / f"{i}.png")
    return place


SPEC = InputSpec((1, 8, 8), (0.0,), (1.0,))


def labelled(names: Sequence[str]) -> ImageSet:
    """The same in memory."""
    pixels = torch.stack([torch.full((1, 8, 8), brightness(name), dtype=torch.uint8) for name in names])
    return ImageSet("made", "test", pixels, torch.arange(len(names)), tuple(names), SPEC)


@pytest.fixture
def named(model: nn.Module) -> nn.Module:
    return remember_classes(copied(model), NAMES)


@given(st.permutations(NAMES), st.integers(1, 5))
def test_any_classes_in_any_order_are_scored_by_name(model: nn.Module, order: list[str], count: int) -> None:
    data = labelled(order[:count])
    found = data.relabelled(NAMES)
    assert [found.classes[label] for label in found.labels.tolist()] == order[:count]
    assert found.images is data.images
    assert data.labels.tolist() == list(range(count))
    assert found.relabelled(NAMES) is found
    assert pk.evaluate(model, found).accuracy == 1


def test_a_network_that_knows_its_classes_is_scored_on_some_of_them(named: nn.Module) -> None:
    for names in (NAMES[::-1], ("dark", "white"), NAMES):
        found = pk.evaluate(named, labelled(names))
        assert found.accuracy == 1
        assert found.answers is not None
        assert found.answers.classes == NAMES
        assert {score.name for score in found.answers.per_class if score.images} == set(names)
        assert not found.answers.unbalanced


def test_one_that_does_not_takes_the_order_of_the_data(model: nn.Module) -> None:
    assert pk.evaluate(model, labelled(NAMES[::-1])).accuracy == pytest.approx(0.2)
    with pytest.raises(InputError, match="2 classes, labels 0 to 1, but the classifier has 5 outputs") as error:
        pk.evaluate(model, labelled(NAMES[:2]))
    assert "classes (--classes FILE)" in str(error.value.hint)


@pytest.mark.parametrize(
    ("classes", "names", "message", "hint"),
    [
        (("whit", "dark"), NAMES, "none of the network's 5 outputs is named after: 'whit'; .* 'white'", "'white'"),
        ([*"abcdef"], NAMES, "'a', 'b', 'c', 'd' and 2 more", "as the data names"),
        (("crane", "dog"), ("crane", "dog", "crane"), "has the class 'crane', and 2 outputs", "apart"),
    ],
)
def test_what_does_not_fit_is_told(classes: tuple[str, ...], names: tuple[str, ...], message: str, hint: str) -> None:
    pixels = torch.zeros(len(classes), 1, 8, 8, dtype=torch.uint8)
    data = ImageSet("made", "test", pixels, torch.arange(len(classes)), tuple(classes), SPEC)
    with pytest.raises(InputError, match=message) as error:
        data.relabelled(names)
    assert hint in str(error.value.hint)


def test_a_name_that_two_outputs_share_matters_only_where_it_is_used() -> None:
    assert labelled(["dark"]).relabelled(["crane", "dark", "crane"]).labels.tolist() == [1]


def test_names_of_another_number_than_outputs_are_told(model: nn.Module) -> None:
    wrong = remember_classes(copied(model), (*NAMES, "blue"))
    with pytest.raises(InputError, match="5 outputs, and 6 class names"):
        pk.evaluate(wrong, labelled(NAMES))


def test_training_matches_labels_and_remembers_the_classes(named: nn.Module) -> None:
    config = pk.TrainConfig(epochs=1, lr=0, weight_decay=0, device="cpu")
    some = labelled(["dark", "white"] * 4)
    some = ImageSet("made", "train", some.images, torch.tensor([0, 1] * 4), ("dark", "white"), SPEC)
    assert pk.train(named, config, some, some).accuracy == 1
    assert classes_of(named) == NAMES
    fresh = models.build("vgg_digits", {"config": "8", "num_classes": 2})
    pk.train(fresh, config, some)
    assert classes_of(fresh) == ("dark", "white")
    other = ImageSet("made", "train", some.images, some.labels, ("cat", "dog"), SPEC)
    with pytest.raises(InputError, match="'cat', 'dog'"):
        pk.train(fresh, config, other)


def test_a_teacher_of_classes_in_another_order_is_refused(named: nn.Module) -> None:
    config = pk.TrainConfig(epochs=1, device="cpu")
    teacher = remember_classes(copied(named), NAMES[::-1])
    with pytest.raises(InputError, match="in another order"):
        pk.train(copied(named), config, labelled(NAMES), teacher=teacher)
    pk.train(copied(named), config, labelled(NAMES), teacher=remember_classes(teacher, NAMES))


def test_files_keep_the_names(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    checkpoint.save(model, path, classes=NAMES)
    assert classes_of(model) == ()
    assert pk.evaluate(pk.load(path), labelled(NAMES[::-1])).accuracy == 1
    assert classes_of(pk.load(path, classes=["a", "b", "c", "d", "e"])) == ("a", "b", "c", "d", "e")
    small, _ = pk.slim(pk.load("prunekit:vgg_digits", classes=[*"0123456789"]), ratio=0.5)
    assert classes_of(small) == (*"0123456789",)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\nb b \nc\n\n", ("a", "b b", "c")),
        ("\ufeffa\r\nb\r\n", ("a", "b")),
        ('["a", "b, c"]', ("a", "b, c")),
        ("a\n\nb\n", "class 1 of .*names.txt"),
        ("", "no class names"),
        ('{"0": "a"}', "not a list"),
        ("[1, 2]", "class 0 of .* is 1"),
        ('["a",', "begins like JSON"),
    ],
)
def test_names_are_read_from_lines_or_json(text: str, found: tuple[str, ...] | str, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())
    if isinstance(found, tuple):
        assert read_class_names(path) == found
    else:
        with pytest.raises(InputError, match=found):
            read_class_names(path)


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the text 'cat', expected a list"):
        checked_class_names("cat")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_class_names(tmp_path / "missing.txt")
    (tmp_path / "model.pt").write_bytes(b"\x80\x02\xff")
    with pytest.raises(InputError, match="not a text file"):
        read_class_names(tmp_path / "model.pt")


@pytest.fixture
def here(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `model.pt`, `names.txt` and folders of images."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(model, "model.pt")
    Path("names.txt").write_text("\n".join(NAMES))
    folder(tmp_path / "all", NAMES)
    folder(tmp_path / "some", NAMES[1:4])
    folder(tmp_path / "strange", ["dark", "blue"])
    return tmp_path


READING = ("--mean", "0", "--std", "1")


def accuracy(capsys: Capture, *arguments: str) -> float:
    capsys.readouterr()
    assert run(["eval", *arguments, *READING, "--no-latency", "--split", "test", "--json"]) == 0
    share: float = json.loads(capsys.readouterr().out)["accuracy"]
    return share


@pytest.mark.usefixtures("here")
def test_the_option_names_the_outputs_and_a_file_keeps_them(capsys: Capture) -> None:
    assert accuracy(capsys, "model.pt", "--data", "all", "--classes", "names.txt") == 1
    assert accuracy(capsys, "model.pt", "--data", "some", "--classes", "names.txt") == 1
    assert accuracy(capsys, "model.pt", "--data", "all") < 1
    assert run(["convert", "model.pt", "--classes", "names.txt", "-o", "named.pt"]) == 0
    assert accuracy(capsys, "named.pt", "--data", "some") == 1
    assert run(["merge", "named.pt", "--ratio", "0.5", "-o", "small.pt", "--data", "some"]) == 0
    assert classes_of(pk.load("small.pt")) == NAMES
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["eval", "--data", "some"], "some has 3 classes, labels 0 to 2, but the classifier has 5 outputs"),
        (["eval", "--data", "strange", "--classes", "names.txt"], "none of the network's 5 outputs .*: 'blue'"),
        (["train", "--data", "some", "--epochs", "1", "-o", "t.pt"], "some has 3 classes"),
        (["slim", "--ratio", ".5", "--data", "some", "--epochs", "1", "-o", "t.pt"], "some has 3 classes"),
        (["sweep", "--data", "some", "--ratios", ".5", "-o", "s.json"], "some has 3 classes"),
        (["inspect", "--data", "some", "--sensitivity"], "some has 3 classes"),
        (["eval", "--data", "all", "--classes", "absent.txt"], "class names in absent.txt cannot be read"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_mismatch_is_told_by_every_command(capsys: Capture, arguments: list[str], found: str) -> None:
    command, *rest = arguments
    assert run([command, "model.pt", *rest]) == 2
    assert re.search(found, capsys.readouterr().err)
    assert not Path("t.pt").exists()


@pytest.mark.usefixtures("here")
def test_training_on_some_of_the_classes_keeps_all(capsys: Capture) -> None:
    tuning = ["--epochs", "1", "--lr", "0", "--weight-decay", "0", "--device", "cpu"]
    command = ["train", "model.pt", "--data", "some", "--classes", "names.txt", "-o", "tuned.pt", *tuning, *READING]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    assert classes_of(pk.load("tuned.pt")) == NAMES


@pytest.mark.usefixtures("here")
def test_a_new_network_gets_an_output_for_each_named_class() -> None:
    command = ["train", "--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--data", "some", "--device", "cpu"]
    Path("more.txt").write_text(json.dumps([*NAMES, "blue"]))
    assert run([*command, "--epochs", "1", "-o", "new.pt", "--classes", "more.txt"]) == 0
    trained = pk.load("new.pt")
    assert classes_of(trained) == (*NAMES, "blue")
    assert trained.fc.out_features == 6


def test_an_export_is_compared_on_images_of_other_classes_without_their_labels(
    model: nn.Module, capsys: Capture
) -> None:
    def labels(network: nn.Module, data: ImageSet) -> list[list[int] | None]:
        example = (torch.zeros(1, 1, 8, 8),)
        batches = batches_of(network, example, data, Output(quiet=True))
        return [None if found is None else found.tolist() for _, found in batches]

    some = labelled(["dark", "white"])
    assert labels(model, some) == [None]
    assert "made has 2 classes" in capsys.readouterr().err
    assert labels(remember_classes(copied(model), NAMES), some) == [[3, 0]]
    assert labels(model, labelled(NAMES)) == [[0, 1, 2, 3, 4]]
    assert not capsys.readouterr().err


def test_gates_are_watched_on_some_of_the_classes(named: nn.Module, tmp_path: Path) -> None:
    gated = pk.manidp.add_gates(named, pk.manidp.GateRecipe(keep=0.6)).eval()
    view = pk.manidp.GatedView.of(gated)
    data = open_data(folder(tmp_path / "some", NAMES[1:4], 30), input_spec=SPEC)
    assert portray(view, data).record.accuracy == 1
    with pytest.raises(InputError, match="3 classes"):
        portray(pk.manidp.GatedView.of(remember_classes(gated, ())), data)
    pk.manidp.calibrate(view, data.batches, view.cost.dense, "all")  # which reads no labels


def test_labelled_for_leaves_data_alone_where_nothing_is_known(model: nn.Module) -> None:
    data = labelled(NAMES[:2])
    assert labelled_for(model, data) is data

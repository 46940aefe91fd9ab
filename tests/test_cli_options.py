"""Settings objects as flags: what the help says, what the parser accepts, and what comes out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer

from prunekit.cli.app import run
from prunekit.cli.framework.build import Command, build
from prunekit.cli.framework.fields import collect, number, options_of
from prunekit.cli.framework.options import OutputOptions, ReadingOptions, input_spec, parse_size
from prunekit.cli.models import output_path
from prunekit.errors import InputError
from prunekit.methods.base import Config
from prunekit.methods.budget import check_budget
from prunekit.report.terminal.output import Output
from prunekit.spec import InputSpec, stated


@dataclass(frozen=True)
class Settings:
    ratio: float | dict[str, float] | None = field(default=None, metadata={"help": "Share of channels."})
    target: str | float | None = None
    criterion: str = field(default="l1-norm", metadata={"choices": ("l1-norm", "l2-norm", "l2-GM")})
    min_channels: int = 1
    absorb: bool = True
    refit: bool = field(default=False, metadata={"flag": "--refit-bn,-r"})
    milestones: tuple[float, ...] = (0.5, 0.75)
    layers: dict[str, list[float]] | None = None
    secret: int = field(default=3, metadata={"hidden": True})


def parse(arguments: list[str]) -> tuple[Settings, Any]:
    """Run a command made of `Settings`; its settings and its `Output`."""
    seen: dict[str, Any] = {}

    def run(output: Output, name: Annotated[str, typer.Argument()], settings: Settings) -> None:
        seen.update(name=name, settings=settings, output=output)

    build("probe", "A probe.", Command(run, ("probe x",))).main(args=arguments, standalone_mode=False)
    return seen["settings"], seen["output"]


def test_defaults_come_from_the_dataclass() -> None:
    settings, output = parse(["x"])
    assert settings == Settings()
    assert not output.json


def test_each_field_is_a_flag() -> None:
    settings, output = parse(
        [
            "x",
            "--ratio",
            ".25",
            "--target",
            "50%",
            "--criterion",
            "l2-GM",
            "--min-channels=8",
            "--no-absorb",
            "-r",
            "--json",
            "-q",
        ]
    )
    assert settings == Settings(0.25, "50%", "l2-GM", 8, absorb=False, refit=True)
    assert output.json
    assert output.quiet


def test_several_values_have_commas_between() -> None:
    assert parse(["x", "--milestones", ".3, .6,.9"])[0].milestones == (0.3, 0.6, 0.9)
    with pytest.raises(InputError, match="--milestones 'soon' is not a list of numbers"):
        parse(["x", "--milestones", "soon"])


def test_fields_without_a_form_on_the_command_line_stay_away() -> None:
    assert [option.name for option in options_of(Settings)] == [
        "ratio",
        "target",
        "criterion",
        "min_channels",
        "absorb",
        "refit",
        "milestones",
    ]


def test_a_value_outside_the_choices_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown criterion 'l1norm'") as caught:
        collect(Settings, {"criterion": "l1norm"})
    assert caught.value.hint is not None
    assert "l1-norm" in caught.value.hint


def test_help_leads_with_examples_and_keeps_its_sections(capsys: pytest.CaptureFixture[str]) -> None:
    def run(output: Output, name: Annotated[str, typer.Argument()], settings: Settings) -> None:
        raise AssertionError((output, name, settings))

    command = Command(run, ("prunekit probe x", "prunekit probe y --ratio .5"), {"settings": "Pruning"})
    build("probe", "A probe.", command).main(args=["--help"], standalone_mode=False)
    text = capsys.readouterr().out
    order = ["A probe.", "Examples:", "  prunekit probe x\n", "Arguments:", "Pruning:", "Common options:"]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)
    assert "l1-norm|l2-norm|l2-GM" in text
    assert "--no-absorb" in text
    assert "--secret" not in text


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("224", (3, 224, 224)),
        ("32x48", (3, 32, 48)),
        ("1x28x28", (1, 28, 28)),
        ("3,32,32", (3, 32, 32)),
    ],
)
def test_sizes(text: str, shape: tuple[int, ...]) -> None:
    found = stated(None, size=parse_size(text))
    assert found is not None
    assert found.shape == shape


@pytest.mark.parametrize("text", ["", "abc", "0", "3x", "-4", "1x2x3x4", "3.5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


def test_input_flags_replace_only_what_they_name() -> None:
    known = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert input_spec(ReadingOptions(), known) == known
    assert input_spec(ReadingOptions(), None) is None
    resized = input_spec(ReadingOptions(input_size="64"), known)
    assert resized == InputSpec((3, 64, 64), known.mean, known.std)
    shifted = input_spec(ReadingOptions(mean=".1,.2,.3"), known)
    assert shifted == InputSpec(known.shape, (0.1, 0.2, 0.3), known.std)
    assert input_spec(ReadingOptions(input_size="1x8x8", mean=".5", std=".25"), None) == InputSpec(
        (1, 8, 8), (0.5,), (0.25,)
    )


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (ReadingOptions(mean="a,b,c"), "not a list of numbers"),
        (ReadingOptions(mean=".1,.2"), "2 values, the images have 3 channels"),
        (ReadingOptions(std="0,1,1"), "must be positive"),
        (ReadingOptions(input_size="big"), "is not a size"),
    ],
)
def test_input_flags_that_make_no_sense(reading: ReadingOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        input_spec(reading, InputSpec((3, 32, 32)))


def test_statistics_need_a_size() -> None:
    with pytest.raises(InputError, match="need an input size"):
        input_spec(ReadingOptions(mean=".5"), None)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("models/net.pt", "models/net-slim.pt"),
        ("a/ResNet.original.56.pth.tar", "a/ResNet.original.56-slim.pt"),
        ("torchvision:resnet50@IMAGENET1K_V2", "resnet50-slim.pt"),
        ("prunekit:resnet56", "resnet56-slim.pt"),
    ],
)
def test_an_artefact_is_named_after_its_source(source: str, path: str) -> None:
    assert output_path(source, OutputOptions(), "slim", Output()) == path


def test_a_model_from_a_pipe_has_no_name() -> None:
    with pytest.raises(InputError, match="has no name"):
        output_path("-", OutputOptions(), "slim", Output())
    assert output_path("-", OutputOptions(out="-"), "slim", Output()) == "-"


def test_two_things_cannot_go_to_standard_output() -> None:
    with pytest.raises(InputError, match="both want standard output"):
        output_path("m.pt", OutputOptions(out="-"), "slim", Output(json=True))


@dataclass(frozen=True)
class Seeded:
    seed: int = field(default=3, metadata={"help": "Of the draw."})


@dataclass(frozen=True)
class AlsoSeeded:
    seed: int = 0
    more: int = 1


@dataclass(frozen=True)
class SeededOtherwise:
    seed: float = 0.0


@dataclass(frozen=True)
class SameFlag:
    sprout: int = field(default=0, metadata={"flag": "--seed"})


def test_settings_of_one_name_share_a_flag() -> None:
    seen: list[tuple[Seeded, AlsoSeeded]] = []

    def run(output: Output, one: Seeded, two: AlsoSeeded) -> None:
        del output
        seen.append((one, two))

    command = build("probe", "A probe.", Command(run))
    command.main(args=["--seed", "7", "--more", "2"], standalone_mode=False)
    command.main(args=[], standalone_mode=False)
    assert seen == [(Seeded(7), AlsoSeeded(7, 2)), (Seeded(3), AlsoSeeded(3, 1))]


@pytest.mark.parametrize(
    ("other", "message"), [(SeededOtherwise, "of another type"), (SameFlag, "want the flag --seed")]
)
def test_settings_that_cannot_share_a_flag_are_said(other: type, message: str) -> None:
    def run(output: Output, one: Seeded, two: Any) -> None:
        raise AssertionError((output, one, two))

    run.__annotations__["two"] = other
    with pytest.raises(InputError, match=message):
        build("probe", "A probe.", Command(run))


@pytest.mark.parametrize(("text", "value"), [("50%", 0.5), ("0.5", 0.5), ("1e-3", 1e-3), (" 12.5 %", 0.125)])
def test_a_number_may_be_a_percentage(text: str, value: float) -> None:
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("budget", "hint"),
    [
        ({"ratio": 50.0}, "write 50%"),
        ({"target_macs": "50"}, "did you mean --target-macs 50%?"),
        ({"target_params": "0.3"}, "did you mean --target-params 30%?"),
        ({"target_macs": "120%"}, "between 0 and 100%"),
        ({}, "for example --ratio 0.5"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_told_with_what_is(budget: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)):
        check_budget(Config(**budget))
    assert check_budget(Config(target_macs="101")) == "target_macs"


def test_ways_to_ask_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["slim", "--help"]) == 0
    expected = capsys.readouterr().out
    assert run(["help", "slim"]) == 0
    assert capsys.readouterr().out == expected
    assert run(["help"]) == 0
    assert "Commands" in capsys.readouterr().out
    assert run(["prune", "m.pt"]) == 2
    assert "prunekit slim or prunekit merge" in capsys.readouterr().err

"""Exports of networks with several outputs and inputs: every output is in the file, by name, and compared."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.errors import CheckFailed, InputError, SurgeryError
from prunekit.exporting.interface import Example, named_outputs, plain
from prunekit.exporting.parity import compare, require, sized
from prunekit.exporting.runtimes import OnnxModel, stranger
from prunekit.exporting.writer import ExportOptions, written

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Form = Callable[[Tensor, Tensor, Tensor], Any]


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclasses.dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor
    hidden: tuple[Tensor | None, ...]


class Own:
    """An object that leads back to itself."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.one, self.inner, self.me = one, types.SimpleNamespace(other=other), self


class Heads(nn.Module):
    """Two heads on one convolution; `form` puts (5 scores, 4 numbers, the input) into a container."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        pooled = self.conv(x).mean((2, 3))
        return self.form(self.first(pooled), self.second(pooled), x)


class Inputs(nn.Module):
    """An image, six numbers, and words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.numbers, self.words, self.last = nn.Linear(6, 8), nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, m: Tensor, words: Tensor) -> Tensor:
        image = self.norm(self.conv(x)).mean((2, 3))
        return self.last(image + self.numbers(m) + self.words(words).mean(1))


M, WORDS = torch.randn(1, 6), torch.tensor([[7, 49, 7]])
FORMS: dict[str, tuple[Form, tuple[str, ...]]] = {
    "tensor": (lambda a, *_: a, ("output",)),
    "tuple": (lambda a, b, _: (a, b), ("output_0", "output_1")),
    "list of one": (lambda a, *_: [a], ("output_0",)),
    "ordered_dict": (lambda a, b, _: collections.OrderedDict([("out", a), ("0", b)]), ("out", "output_0")),
    "named_tuple": (lambda a, b, _: Named(a, b), ("logits", "features")),
    "dataclass": (lambda a, b, _: Answer(None, a, (b, None, a)), ("logits", "hidden.0", "hidden.2")),
    "object": (lambda a, b, _: Own(a, b), ("one", "inner.other")),
    "detector": (
        lambda a, b, _: [{"boxes": b, "labels": a.argmax(1), "scores": a.amax(1)}],
        ("output_0.boxes", "output_0.labels", "output_0.scores"),
    ),
    "twice": (lambda a, _, x: (a, a, x.shape[0], {"input": x}), ("output_0", "output_1", "output_3.input")),
    "no_batch": (lambda a, b, _: {"sum": a.sum(), "none": b[:0], "mask": a > 0}, ("sum", "none", "mask")),
}


@pytest.mark.parametrize("kind", FORMS)
def test_outputs_are_found_and_named_in_every_container(kind: str) -> None:
    form, names = FORMS[kind]
    found = named_outputs(Heads(form)(X))
    assert tuple(found) == names
    assert all(isinstance(tensor, Tensor) for tensor in found.values())


def everything(a: Tensor, b: Tensor, x: Tensor) -> dict[str, Any]:
    return {kind: form(a, b, x) for kind, (form, _) in FORMS.items() if " " not in kind}


def test_every_output_is_in_an_onnx_file_by_its_name(tmp_path: Path) -> None:
    model = Heads(everything).eval()
    done = pk.export(model, tmp_path / "x.onnx", X)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = named_outputs(model(x))
    assert done.outputs == tuple(output.name for output in done.parity.outputs) == tuple(wanted)
    assert len(wanted) == 21
    assert {output.name for output in done.parity.outputs if output.exact} == {"detector.0.labels", "no_batch.mask"}
    found = OnnxModel(done.content)(x)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_pt2_keeps_the_containers_where_their_classes_are_not_known(tmp_path: Path) -> None:
    model = Heads(lambda a, b, x: {"half": b.bfloat16(), **everything(a, b, x)}).eval()
    done = written(model, X, "pt2", ExportOptions())
    x = torch.randn(3, 3, 8, 8)
    with stranger(done.content, ["torchvision", "onnx"]) as runtime, torch.no_grad():
        parity = compare(model, runtime, [(x, None)])
        found = runtime(x)
    require(parity)
    assert tuple(output.name for output in parity.outputs) == done.outputs
    assert (type(found["tuple"]), type(found["dataclass"]), found["dataclass"]["hidden"][1]) == (tuple, dict, None)
    assert found["half"].dtype == torch.bfloat16
    (tmp_path / "x.pt2").write_bytes(done.content)
    again = named_outputs(pk.load(tmp_path / "x.pt2")(x))
    assert [tensor.shape for tensor in again.values()] == [t.shape for t in named_outputs(found).values()]


@pytest.mark.parametrize("batch", [None, 3])
def test_several_inputs_have_one_free_batch(batch: int | None, tmp_path: Path) -> None:
    import onnxruntime

    model = Inputs().eval()
    done = pk.export(model, tmp_path / "x.onnx", (X, M, WORDS), fixed_batch=batch, fold_bn=batch is None)
    assert (done.inputs, done.outputs, done.parity.agreement) == (("x", "m", "words"), ("output",), 1.0)
    assert done.folded == (("norm",) if batch is None else ())
    entries = onnxruntime.InferenceSession(str(tmp_path / "x.onnx")).get_inputs()
    assert [entry.shape[0] for entry in entries] == [batch or "batch"] * 3
    inputs = torch.randn(3, 3, 8, 8), torch.randn(3, 6), torch.randint(50, (3, 3))
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(done.content)(*inputs), model(*inputs), rtol=1e-3, atol=1e-5)


def test_a_pt2_takes_several_inputs_in_containers() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Inputs()

        def forward(self, x: dict[str, Tensor], *rest: Tensor, scale: float = 2.0) -> Tensor:
            return scale * self.net(x["image"], *rest)

    model = Wrapped().eval()
    done = written(model, ({"image": X}, M, WORDS), "pt2", ExportOptions())
    assert done.inputs == ("x.image", "rest.0", "rest.1")
    program = torch.export.load(io.BytesIO(done.content)).module()
    inputs = {"image": torch.randn(5, 3, 8, 8)}, torch.randn(5, 6), torch.randint(50, (5, 3))
    require(compare(model, program, [(inputs, None)]))


def test_images_in_a_list_have_no_batch(tmp_path: Path) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": self.conv(image[None]).flatten(2)[0].T} for image in images]

    done = pk.export(Detector().eval(), tmp_path / "x.onnx", ([X[0], X[0, :, :6]],))
    assert (done.inputs, done.outputs) == (("images.0", "images.1"), ("output_0.boxes", "output_1.boxes"))
    assert done.parity.images == 8  # runs
    with pytest.raises(InputError, match="--fixed-batch"):
        pk.export(Detector().eval(), tmp_path / "y.onnx", ([X[0]],), fixed_batch=2)


def test_sizes_that_a_forward_remembers_are_not_those_of_the_export(tmp_path: Path) -> None:
    class Remembers(Heads):
        shape: tuple[int, ...] | None = None

        def forward(self, x: Tensor) -> Any:
            if self.shape != x.shape:  # as detectors keep their anchors
                self.shape = x.shape
            return super().forward(x)

    assert pk.export(Remembers(lambda a, *_: a).eval(), tmp_path / "x.onnx", X).parity.agreement == 1


class NoMaximum(nn.Module):
    """Decides by how many values are left over, as non-maximum suppression does."""

    def forward(self, x: Tensor) -> Tensor:
        left = x[x > 0.5]
        return left * 2 if left.numel() > 10 else left


@pytest.mark.parametrize(
    ("model", "x", "error", "message", "hint"),
    [
        (Inputs(), X, InputError, "does not take 1 input: missing a required argument: 'm'", r"is \(x, m, words\)"),
        (Inputs(), (X, M, M, M), InputError, "does not take 4 inputs", r"forward is \(x, m, words\)"),
        (Inputs(), (X, X, X), InputError, "forward fails on inputs like the example", r"is \(x, m, words\)"),
        (Heads(lambda *_: None), X, InputError, "NoneType, holds no tensor", "expected tensors"),
        (NoMaximum(), X, SurgeryError, "decides by values that it computes", "in front of that"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(
    model: nn.Module,
    x: Any,
    error: type[Exception],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error, match=message) as said:
        pk.export(model.eval(), tmp_path / "x.onnx", x)
    assert said.match(hint)
    assert not list(tmp_path.iterdir())
    assert not any(capsys.readouterr())  # torch prints the whole graph


def test_a_type_that_onnxruntime_cannot_give_is_said(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"does not run in onnxruntime: .*bfloat16"):
        pk.export(Heads(lambda a, *_: a.bfloat16()).eval(), tmp_path / "x.onnx", X)


class Gives(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Tensor) -> Any:
        return self.output


A, B = torch.zeros(2, 3), torch.full((2, 3), 1000.0)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": A, "b": B + 1, "n": torch.tensor([2**60, 5])}, "output 'b' differs from the model's by 1.0e\\+00"),
        # a large output does not excuse a small one
        ({"a": A + 5e-3, "b": B, "n": torch.tensor([2**60, 5])}, "output 'a' differs .* 1.0e-04 is allowed"),
        # whole numbers are equal or not, those beyond float64 too
        ({"a": A, "b": B, "n": torch.tensor([2**60 + 1, 5])}, "output 'n' differs .* must be equal"),
        ({"a": A, "b": B}, "gives 2 outputs instead of 3"),
        ({"a": A, "b": B, "n": torch.tensor([5.0, 5.0])}, "output 'n' of type torch.float32 instead of torch.int64"),
        ({"a": A, "b": B[:, :1], "n": torch.tensor([2**60, 5])}, "output 'b' of shape"),
        ({"a": A * torch.nan, "b": B, "n": torch.tensor([2**60, 5])}, "output 'a' differs from the model's by inf"),
    ],
)
def test_each_output_has_its_own_tolerance(found: Any, message: str) -> None:
    wanted = {"a": A, "b": B, "n": torch.tensor([2**60, 5])}
    batches = [((X.repeat(2, 1, 1, 1), torch.zeros(2, 6)), None)]
    require(compare(Gives(wanted), Gives(wanted), batches))
    with pytest.raises(CheckFailed, match=message):
        require(compare(Gives(wanted), Gives(found), batches))


def test_the_worst_output_is_named_and_equal_infinities_are_equal() -> None:
    inf = torch.tensor([[torch.inf, -torch.inf, 1.0]] * 2)
    parity = compare(Gives((inf, B)), Gives((inf, B + 0.05)), [(torch.zeros(2, 1), None)])
    assert (parity.worst, round(parity.difference, 3), parity.scale) == ("output_1", 0.05, 1000.0)
    require(parity)
    assert [output["name"] for output in parity.to_json()["outputs"]] == ["output_0", "output_1"]


def test_the_classes_are_the_logits() -> None:
    labels, boxes, logits = torch.tensor([0, 1]), torch.zeros(2, 4), torch.eye(2)
    named, unnamed = Gives({"boxes": boxes, "logits": logits}), Gives((labels, logits))
    assert compare(named, named, [(torch.zeros(2, 1), labels)]).accuracy == 1
    assert compare(unnamed, unnamed, [(torch.zeros(2, 1), labels)]).accuracy is None


def test_names_are_plain_and_no_two_are_equal() -> None:
    names = list(named_outputs({"a b\n<i>": A, "a_b__i_": A, "": A, "7": (A, [A])}))
    assert names == ["a_b__i_", "a_b__i__", "output_", "output_7.0", "output_7.1.0"]
    assert list(named_outputs(A)) == ["output"]
    assert plain((A, 3, None, {"x": "y"})) == (A, None, None, {})


def test_whole_numbers_stay_those_of_the_example() -> None:
    example = Example.of(Inputs(), (X, torch.tensor([[7, 9, 7]]), "text"))
    x, words, text = example.random(4, torch.Generator().manual_seed(0), shuffled=True)
    assert (x.shape, words.shape, text) == ((4, 3, 8, 8), (4, 3), "text")
    assert sorted(words.flatten().tolist()) == [7] * 8 + [9] * 4


def test_several_inputs_are_cut_to_the_one_batch_size() -> None:
    batches = [((torch.arange(n)[:, None], {"m": torch.arange(n)}), torch.arange(n)) for n in (5, 2)]
    cut = list(sized(batches, 3))
    assert [labels.tolist() for _, labels in cut if labels is not None] == [[0, 1, 2], [3, 4, 0]]
    assert all(x.flatten().tolist() == m["m"].tolist() == y.tolist() for (x, m), y in cut if y is not None)


def test_the_repr_of_a_result_is_short() -> None:
    done = dataclasses.replace(written(Heads(lambda a, *_: a).eval(), X, "onnx", ExportOptions()), content=b"x" * 10000)
    assert len(repr(done)) < 300
    assert done.size == 10000
    small = pk.prune(
        "slim", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval(), X, ratio=0.5
    )
    assert len(repr(small)) < 3000


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.numbers, self.words = nn.Conv2d(3, 8, 3), nn.Linear(6, 8), nn.Embedding(2, 8)

    def forward(self, x, m, words):
        return {"sum": self.conv(x).mean((2, 3)) + self.numbers(m), "embedded": self.words(words)}
"""


def test_the_command_takes_several_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    weights, target = tmp_path / "net.pt", tmp_path / "x.onnx"
    torch.save(space["Net"]().state_dict(), weights)
    command = ["export", str(weights), "--arch", f"{tmp_path / 'net.py'}:Net", "-o", str(target)]
    assert run([*command, "--inputs", "3x8x8,6,5:int64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    schemas.check(facts)
    assert (facts["inputs"], facts["outputs"]) == (["x", "m", "words"], ["sum", "embedded"])
    assert facts["parity"]["worst"] in facts["outputs"]
    assert set(facts["latency_ms"]) == {"model", "exported"}
    found = OnnxModel(target.read_bytes())(
        torch.zeros(2, 3, 8, 8), torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.long)
    )
    assert found["embedded"].shape == (2, 5, 8)
    for sizes, message in (
        ("3x8x8,6", "missing a required argument: 'words'"),
        ("3x8x8,six", "'six', which is no size"),
    ):
        assert run([*command, "--inputs", sizes, "--force"]) == 2
        assert message in capsys.readouterr().err
    assert run([*command, "--inputs", "3x8x8,6,5:int64", "--force", "--no-latency"]) == 0
    assert "the worst of 2 outputs" in capsys.readouterr().err

"""What a file claims is bounded by what it holds, before anything is allocated; nothing is fetched, nothing crashes."""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
import random
import re
import resource
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import test_checkpoint_hostile as files
from prunekit import checkpoint, models
from prunekit.errors import InputError, PrunekitError
from prunekit.files.pickles import load_tensors
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates
from prunekit.nn.buckets import BucketTable
from prunekit.programs.allowed import ALLOWED
from prunekit.spec import InputSpec
from test_checkpoint_hostile import Runs, argument, calls, program, torch_file, zipped

HUGE = 6_000_000_000
ROOM = 300 << 20  # bytes that the process may grow by while a file is refused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux does it")


@contextmanager
def bounded() -> Iterator[None]:
    """Allocations beyond `ROOM` fail inside."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(content: bytes) -> str | None:
    """What a file is refused with; None where it can be used. Never for want of memory: it was asked for, then."""
    said = None
    try:
        with bounded():
            model = checkpoint.load(io.BytesIO(content))
            pk.inspect(model)  # and what loads can be looked at
    except PrunekitError as error:
        said = error.message
    assert not re.search("alloc|out of memory|MemoryError", said or ""), said
    return said


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file makes us ask for anything elsewhere."""
    asked: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def raw(data: bytes, **members: bytes) -> bytes:
    """A torch file around a pickle."""
    rest = {f"net/{name}": content for name, content in members.items()}
    return zipped({"net/data.pkl": data, "net/version": b"3\n", "net/byteorder": b"little", **rest})


def storage(numel: int, *, held: int = 4, kind: str = "FloatStorage", then: bytes = b"") -> bytes:
    """A torch file with a storage that claims `numel` elements."""
    claim = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return raw(claim + pickle.dumps(numel, 2)[2:-1] + b"tQ" + then + b".", **{"data/0": bytes(held)})


def rebuilt(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor on a storage of as many zeros."""
    held = torch.zeros(numel).untyped_storage()
    hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
    typed = torch.storage.TypedStorage(wrap_storage=held, dtype=torch.float32, _internal=True)
    return torch_file({"a": Runs(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, hooks)})


def nested(depth: int) -> bytes:
    """A tuple of the tuple before, twice, as often: as a key of a dict it is hashed 2**depth times."""
    return b"\x80\x02}(K\x00" + b"q\x00h\x00\x86" * depth + b"K\x01u."


PICKLES: dict[str, Callable[[], bytes]] = {
    "a bytearray": lambda: torch_file(Runs(bytearray, HUGE)),
    "a bytearray, legacy": lambda: torch_file(Runs(bytearray, HUGE), legacy=True),
    "a bytearray among weights": lambda: torch_file({"state_dict": files.state(), "z": Runs(bytearray, HUGE)}),
    "bytes as text of another encoding": lambda: torch_file(Runs(__import__("codecs").encode, "a", "idna")),
    "a storage that is called": lambda: torch_file(Runs(torch.FloatStorage, HUGE)),
    "an untyped storage that is called": lambda: torch_file(Runs(torch.UntypedStorage, HUGE)),
    "a tensor that is called": lambda: torch_file(Runs(torch.FloatTensor, HUGE)),
    "a size of billions": lambda: torch_file(Runs(torch.Size, Runs(bytearray, HUGE))),
    "a storage beyond its record": lambda: storage(HUGE),
    "an untyped storage beyond its record": lambda: storage(HUGE, kind="UntypedStorage"),
    "a storage a little beyond its record": lambda: storage(2),
    "a storage of no record": lambda: storage(1).replace(b"data/0", b"data/1"),
    "a storage of negative size": lambda: storage(-1),
    "a storage of an unknown kind": lambda: storage(1, kind="OddStorage"),
    "strides beyond the storage": lambda: rebuilt(4, (2, 2), (1 << 40, 1)),
    "sizes beyond the storage": lambda: rebuilt(4, (HUGE,), (1,)),
    "an offset beyond the storage": lambda: rebuilt(4, (1,), (1,), HUGE),
    "an offset before the storage": lambda: rebuilt(4, (1,), (1,), -1),
    "sizes and strides that differ": lambda: rebuilt(4, (1, 1), (1,)),
    "repeated elements": lambda: rebuilt(4, (HUGE, 4), (0, 1)),
    "too many dimensions": lambda: rebuilt(4, (1,) * 100, (1,) * 100),
    "a wrapper of any size": lambda: torch_file(
        Runs(torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (HUGE,), (1,), 0, None, "cpu", False)
    ),
    "a nested tensor": lambda: torch_file(
        Runs(
            torch._utils._rebuild_nested_tensor,
            torch.zeros(2),
            torch.tensor([[HUGE]]),
            torch.tensor([[1]]),
            torch.zeros(1),
        )
    ),
    "a tensor with other methods": lambda: torch_file(
        {
            "a": Runs(
                torch._tensor._rebuild_from_type_v2,
                torch._utils._rebuild_parameter,
                nn.Parameter,
                (torch.zeros(2), False, collections.OrderedDict()),
                {"numel": torch.Size},
            )
        }
    ),
    "a key that takes for ever": lambda: raw(nested(60)),
    "a set of what takes for ever": lambda: raw(
        b"\x80\x02c__builtin__\nset\n](K\x00" + b"q\x00h\x00\x86" * 60 + b"e\x85R."
    ),
    "a call of a list": lambda: raw(b"\x80\x02](" + b"K\x00" + b"q\x00h\x00\x86" * 60 + b"e)R."),
    "a memo of billions": lambda: raw(b"\x80\x02}r\xff\xff\xff\xffh\x00."),
    "a string of billions": lambda: raw(b"\x80\x02X\xff\xff\xff\xffab."),
    "a frame of billions": lambda: raw(b"\x80\x04\x95" + b"\xff" * 7 + b"\x00}."),
    "bytes of billions": lambda: raw(b"\x80\x05\x96" + b"\xff" * 4 + bytes(4) + b"ab."),
    "an empty stack": lambda: raw(b"\x80\x02R."),
    "marks alone": lambda: raw(b"\x80\x02" + b"(" * 1000 + b"t."),
    "legacy storages beyond the file": lambda: torch_file({"a": torch.zeros(4)}, legacy=True).replace(
        b"cpuq\x06K\x04", b"cpuq\x06J\x00\x00\x00\x70"
    ),
}

ZIPS: dict[str, Callable[[], bytes]] = {
    "two members of one name": lambda: zipped({"net/data.pkl": b"\x80\x02}.", "other/data.pkl": b"\x80\x02}."}),
    "bytes before the archive": lambda: b"PK\x03\x04" + files.own(),
    "a bomb in an archive of weights": lambda: zipped(
        {"net/data.pkl": pickle.dumps({}, 2), "net/data/0": bytes(20_000_000)}, zipfile.ZIP_DEFLATED
    ),
}


@pytest.mark.parametrize("name", [*PICKLES, *ZIPS])
def test_pickles_are_bounded_by_what_they_hold(name: str) -> None:
    content = {**PICKLES, **ZIPS}[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(content) is not None


def test_what_training_scripts_save_is_read() -> None:
    saved: dict[Any, Any] = {
        "state_dict": collections.OrderedDict(nn.BatchNorm2d(3).state_dict()),
        "history": list(range(2000)),
        "rng": torch.get_rng_state(),
        "half": torch.ones(3, dtype=torch.float16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "counts": collections.Counter("abca"),
        "names": {"a", "b"},
        "bytes": b"a\xff",
        "array": bytearray(b"a\xff"),
        "spread": torch.zeros(1).expand(5, 5),
        "turned": torch.arange(6).reshape(2, 3).t(),
        "none": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.ones(2)),
        "marked": nn.Parameter(torch.ones(2)),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "complex": 1j,
        "big": 1 << 100,
        ("a", 1): None,
    }
    saved["marked"].note = "kept"
    for legacy in (False, True):
        if legacy:  # torch does not write it so
            del saved["float8"]
        found = load_tensors(io.BytesIO(torch_file(saved, legacy=legacy)), "a file")
        assert found.keys() == saved.keys()
        assert torch.equal(found["turned"], saved["turned"])
        assert found["counts"] == saved["counts"]
        assert found["marked"].note == "kept"
        assert found["array"] == saved["array"]


def gated() -> bytes:
    torch.manual_seed(0)
    model = models.build("vgg_digits", files.ARGS)
    gates = add_gates(model, GateRecipe())
    channels = sum(m.norm.num_features for m in gates.modules() if type(m).__name__ == "GatedConv")
    gates.add_module("buckets", BucketTable(2, channels, 1))
    stream = io.BytesIO()
    checkpoint.save(gates, stream)
    return stream.getvalue()


def test_weights_of_another_kind_are_refused() -> None:
    content = torch.load(io.BytesIO(files.own()), weights_only=True)
    for key, tensor in content["state_dict"].items():
        for dtype in (torch.bool, torch.int64, torch.complex64) if tensor.is_floating_point() else (torch.float32,):
            state = {**content["state_dict"], key: tensor.to(dtype)}
            assert outcome(torch_file({**content, "state_dict": state})) is not None


def zoo(**args: Any) -> bytes:
    return files.with_header(arch="torchvision:resnet18", arch_args=args)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))
    if not isinstance(tree, dict | list):
        yield path


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    other = copy.deepcopy(tree)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return other


VALUES: tuple[Any, ...] = (10**9, 1 << 40, 1 << 62, 1 << 70, -1, 0, 1e300, float(1 << 33), True, None)
VALUES += ("a", [], [HUGE], {}, [[1], 2] * 3)


@pytest.mark.parametrize("make", [files.own, gated])
def test_no_number_of_a_header_is_believed(make: Callable[[], bytes]) -> None:
    """Every value of the header, replaced by each of many: refused, or a network of the size that the file holds."""
    content = torch.load(io.BytesIO(make()), weights_only=True)
    header = json.loads(content["prunekit"])
    chosen = random.Random(0)
    places = list(leaves(header))
    for path in places:
        for value in chosen.sample(VALUES, 1 if len(places) > 60 else 3):
            outcome(torch_file({**content, "prunekit": json.dumps(changed(header, path, value))}))


def test_gates_and_tables_are_measured_by_their_weights() -> None:
    content = torch.load(io.BytesIO(gated()), weights_only=True)
    header = json.loads(content["prunekit"])
    assert outcome(torch_file(content)) is None
    for path in (("gates", 0, "hidden"), ("buckets", "buckets"), ("buckets", "channels"), ("buckets", "images")):
        for value in (10**8, HUGE, 1 << 70, 0, -3):
            text = json.dumps(changed(header, ("structure", *path), value))
            assert outcome(torch_file({**content, "prunekit": text})) is not None


ARGUMENTS: dict[str, dict[str, Any]] = {
    "pretrained": {"pretrained": True},
    "pretrained, not": {"pretrained": False},
    "weights": {"weights": "DEFAULT"},
    "weights of its backbone": {"weights_backbone": "DEFAULT"},
    "pretrained backbone": {"pretrained_backbone": True},
    "progress": {"progress": True},
    "an unknown argument": {"colour": "red"},
    "Python's own": {"self": 1, "__class__": 2},
    "classes": {"num_classes": 1 << 50},
    "no groups": {"groups": 0},
    "a width": {"width_per_group": 1 << 40},
    "a layer of text": {"norm_layer": "torch.nn.BatchNorm2d"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_an_architecture_are_checked_by_name(name: str) -> None:
    assert outcome(zoo(**ARGUMENTS[name])) is not None


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("regnet_x_400mf", {"num_classes": 1 << 34}),
        ("regnet_x_400mf", {"stem_width": 1 << 34}),
        ("mobilenet_v2", {"inverted_residual_setting": [[6, 64, 10**9, 2]]}),
        ("mobilenet_v2", {"width_mult": float("1e300")}),
        ("mnasnet0_5", {"alpha": 1e300}),
        ("vit_b_16", {"image_size": 0}),
        ("vit_b_16", {"image_size": 1 << 40}),
        ("densenet121", {"num_init_features": 1 << 60}),
        ("swin_t", {"num_classes": 1 << 50}),
    ],
)
def test_architectures_of_any_size_take_no_memory(arch: str, args: dict[str, Any]) -> None:
    assert outcome(files.with_header(arch=f"torchvision:{arch}", arch_args=args)) is not None


def test_an_input_of_any_size_is_not_believed() -> None:
    shapes: tuple[Any, ...] = ([3, 1 << 20, 1 << 20], [1 << 62, 8, 8], [1] * 50, [1, 1.5], ["a"], {})
    for shape in shapes:
        assert outcome(files.with_header(input={"shape": shape, "mean": [], "std": []})) is not None
    large = files.with_header(input={"shape": [1, 4096, 4096], "mean": [], "std": []})
    with pytest.raises(InputError, match="1x4096x4096"):
        checkpoint.load(io.BytesIO(large))
    checkpoint.load(io.BytesIO(large), input_spec=InputSpec((1, 4096, 4096)))


def number(value: float) -> dict[str, Any]:
    return {"as_int": value} if isinstance(value, int) else {"as_float": value}


def numbers(*values: int) -> dict[str, Any]:
    return {"as_ints": list(values)}


def tensors(*names: str) -> dict[str, Any]:
    return {"as_tensors": [{"name": name} for name in names]}


X, W, NONE = {"as_tensor": {"name": "x"}}, {"as_tensor": {"name": "p_w"}}, {"as_none": True}

# Operators that would print, read, write, crash, hang or allocate, and what they are called with.
PROGRAMS: dict[str, tuple[Any, ...]] = {
    "lists of different lengths": ("aten._foreach_copy.default", tensors(), tensors("x", "x")),
    "lists of different lengths, in place": ("aten._foreach_add_.List", tensors(), tensors("x")),
    "a print": ("aten._print.default", {"as_string": "hello"}),
    "a result given": ("aten.add.out", X, W, number(1), X),
    "another storage": ("aten.set_.source_Tensor", X, W),
    "another size": ("aten.resize_.default", X, numbers(HUGE)),
    "a dtype that is a number": ("aten.to.dtype", X, number(-7)),
    "a dtype of a reduction": ("aten.log_softmax.int", X, number(0), number(-7)),
    "a memory format that is a number": ("aten.contiguous.default", X, number(99)),
    "TorchScript's": ("aten.to.prim_Device", X, NONE, NONE),
    "TorchScript's lists": ("aten.mul.left_t", numbers(1), number(HUGE)),
    "TorchScript's numbers": ("aten.remainder.int", number(1), number(0)),
    "full": ("aten.full.default", numbers(HUGE), number(1.0)),
    "full, a little less": ("aten.full.default", numbers(200_000_000), number(1.0)),
    "zeros": ("aten.zeros.default", numbers(1 << 20, 1 << 20)),
    "empty": ("aten.empty.memory_format", numbers(HUGE)),
    "empty by strides": ("aten.empty_strided.default", numbers(2), numbers(HUGE)),
    "arange": ("aten.arange.default", number(HUGE)),
    "arange by steps": ("aten.arange.start_step", number(0), number(1.0), number(1e-12)),
    "linspace": ("aten.linspace.default", number(0.0), number(1.0), number(HUGE)),
    "eye": ("aten.eye.default", number(1 << 20)),
    "random numbers": ("aten.rand.default", numbers(HUGE)),
    "new_full": ("aten.new_full.default", X, numbers(HUGE), number(0.0)),
    "triangles": ("aten.tril_indices.default", number(1 << 20), number(1 << 20)),
    "repeat": ("aten.repeat.default", X, numbers(HUGE, 1)),
    "tile": ("aten.tile.default", X, numbers(1 << 20, 1 << 20)),
    "expand": ("aten.expand.default", X, numbers(HUGE, 3)),
    "repeat_interleave": ("aten.repeat_interleave.self_int", X, number(HUGE)),
    "pad": ("aten.pad.default", X, numbers(HUGE, HUGE)),
    "constant_pad_nd": ("aten.constant_pad_nd.default", X, numbers(HUGE, 0)),
    "a convolution's padding": ("aten.conv1d.default", X, W, NONE, numbers(HUGE), numbers(HUGE)),
    "windows without a step": ("aten.unfold.default", X, number(1), number(1), number(0)),
    "a shuffle whose square is zero": ("aten.pixel_shuffle.default", X, number(1 << 32)),
    "a transform's length": ("aten.fft_fft.default", X, number(HUGE)),
    "a transform's normalisation": ("aten._fft_r2c.default", X, numbers(0), number(1 << 31), {"as_bool": True}),
    "a transform's last size": ("aten._fft_c2r.default", X, numbers(0), number(0), number(1 << 20)),
    "strides": ("aten.as_strided.default", X, numbers(10, 10), numbers(1 << 20, 1)),
    "strides before the beginning": ("aten.as_strided.default", X, numbers(1), numbers(1), number(-1000)),
    "parts": ("aten.unbind.int", X, number(9)),
    "parts of nothing": ("aten.split.Tensor", X, number(0)),
    "group norm's sizes": (
        *("aten.native_group_norm.default", X, NONE, NONE),
        *(number(1000), number(3), number(1000), number(3), number(1e-5)),
    ),
    "keys of another length": ("aten._scaled_dot_product_flash_attention_for_cpu.default", X, X, W),
    "a power": ("aten.matrix_power.default", X, number(1 << 62)),
    "a histogram": ("aten.histc.default", X, number(HUGE)),
    "counts": ("aten.bincount.default", X, NONE, number(HUGE)),
    "combinations": ("aten.combinations.default", X, number(50)),
    "a recurrent network without weights": ("aten.lstm.input", X, tensors(), tensors()),
    "a gradient's kernel": ("aten.embedding_dense_backward.default", X, X, number(HUGE), number(0), {"as_bool": False}),
    "quantised": ("aten.quantize_per_tensor.default", X, number(1.0), number(0), {"as_scalar_type": 2}),
    "C++ of torchvision": ("torchvision.nms.default", X, X, number(0.5)),
    "text, repeated": ("_operator.mul", {"as_string": "x"}, number(HUGE)),
    "text, formatted": ("_operator.mod", {"as_string": "%6000000000d"}, number(1)),
    "lists, repeated": ("_operator.mul", numbers(1), number(HUGE)),
    "numbers without end": ("_operator.mul", number(1 << 62), number(1 << 62)),
    "nothing, divided by": ("_operator.floordiv", number(1), number(0)),
    "an item of text": ("_operator.getitem", {"as_string": "x"}, number(0)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_call_what_their_weights_and_inputs_justify(name: str) -> None:
    target, *given = PROGRAMS[name]
    full = target if target.startswith("_") else f"torch.ops.{target}"
    assert outcome(program(calls(full, *given))) is not None


def test_no_number_of_a_program_is_believed() -> None:
    """As for headers: in the graph, and in what is said about its weights."""
    with zipfile.ZipFile(io.BytesIO(program())) as archive:
        whole = json.loads(archive.read("net/models/model.json"))
        config = json.loads(archive.read("net/data/weights/model_weights_config.json"))
    chosen = random.Random(0)
    for path in leaves(whole):
        for value in chosen.sample(VALUES, 5):
            outcome(program(members={"models/model.json": json.dumps(changed(whole, path, value)).encode()}))
    for path in leaves(config):
        for value in chosen.sample(VALUES, 8):
            text = json.dumps(changed(config, path, value)).encode()
            outcome(program(members={"data/weights/model_weights_config.json": text}))


def test_weights_of_a_program_are_held_by_its_archive() -> None:
    """One number over and over by its strides, one member of the archive under many names."""
    repeated = files.meta(sizes=[number(1 << 30), number(3)], strides=[number(0), number(1)])
    assert outcome(program(members=repeated)) is not None
    members = files.weights_config()
    ((path, text),) = members.items()
    entry = json.loads(text)["config"]["w"]
    members[path] = json.dumps({"config": {"w": entry, **{f"w{i}": entry for i in range(400)}}}).encode()
    assert outcome(program(members={**members, "data/weights/weight_0": bytes(12 << 20)})) is not None


def doubling(times: int) -> Callable[[dict[str, Any]], None]:
    """Every node joins the one before to itself."""

    def change(whole: dict[str, Any]) -> None:
        graph = whole["graph_module"]["graph"]
        names = ["x", *(f"d{i}" for i in range(times))]
        graph["nodes"][:0] = [
            {
                "target": "torch.ops.aten.cat.default",
                "inputs": [argument("tensors", tensors(before, before))],
                "outputs": [{"as_tensor": {"name": after}}],
            }
            for before, after in pairwise(names)
        ]

    return change


def test_many_small_steps_are_one_large_one() -> None:
    assert outcome(program(doubling(10))) is None
    assert outcome(program(doubling(40))) is not None


def free_sizes(whole: dict[str, Any]) -> None:
    """A program of any batch, that makes the batch's size to the fourth power of numbers."""
    graph = whole["graph_module"]["graph"]
    graph["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": "s0", "hint": {"as_int": 2}}}
    size, names = {"as_sym_int": {"as_name": "s"}}, ["s", "s2", "s4"]
    made = [
        {
            "target": "_operator.mul",
            "inputs": [argument(side, {"as_sym_int": {"as_name": before}}) for side in "ab"],
            "outputs": [{"as_sym_int": {"as_name": after}}],
        }
        for before, after in pairwise(names)
    ]
    graph["nodes"][:0] = [
        {
            "target": "torch.ops.aten.sym_size.int",
            "inputs": [argument("self", X), argument("dim", number(0))],
            "outputs": [size],
        },
        *made,
        {
            "target": "torch.ops.aten.full.default",
            "inputs": [argument("size", {"as_sym_ints": [{"as_name": "s4"}]}), argument("fill_value", number(1.0))],
            "outputs": [{"as_tensor": {"name": "f"}}],
        },
    ]


def test_sizes_that_a_program_leaves_open_are_judged_when_they_are_known() -> None:
    model = checkpoint.load(io.BytesIO(program(free_sizes)))
    assert model(torch.zeros(5, 3)).shape == (5, 3)
    with bounded(), pytest.raises(InputError, match="full with a result"):
        model(torch.zeros(400, 3))


class Reader(nn.Module):
    """A convolution whose columns a recurrent network reads, resampled and normalised on the way."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.rnn, self.fc = kind(32, 6, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = nn.functional.interpolate(self.norm(self.conv(x)), scale_factor=0.5, mode="bilinear")
        left, right = y.split([2, 2], 3)
        columns = torch.cat((left, right), 3).permute(0, 3, 1, 2).flatten(2)
        return self.fc(self.rnn(columns)[0][:, -1])


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_programs_run_on_their_own_weights_alone(kind: type[nn.RNNBase]) -> None:
    model, x = Reader(kind).eval(), torch.randn(2, 1, 8, 8)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), stream)
    assert torch.equal(checkpoint.load(io.BytesIO(stream.getvalue()))(x), model(x))
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("models/model.json"))
    whole = json.loads(members[name])
    (node,) = (node for node in whole["graph_module"]["graph"]["nodes"] if ".input" in node["target"])
    (params,) = (item["arg"] for item in node["inputs"] if item["name"] == "params")
    for change in (params["as_tensors"].pop, params["as_tensors"].clear):
        change()
        assert outcome(zipped({**members, name: json.dumps(whole).encode()})) is not None


def test_the_list_of_operators_holds_none_that_acts() -> None:
    words = (
        "file",
        "print",
        "foreach",
        "backward",
        "cuda",
        "cudnn",
        "mkldnn",
        "quant",
        "resize",
        "set_data",
        "assert_async",
    )
    assert not [name for name in ALLOWED if any(word in name for word in words)]

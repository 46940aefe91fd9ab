"""Damaged, foreign and hostile files: one clear error each, nothing executed, nothing written."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from prunekit import checkpoint, models
from prunekit.errors import InputError

ARGS = {"config": "4-M-6", "num_classes": 3}
MARK = "hostile-code-ran"


class Runs:
    """Pickles to a call: unpickling it runs `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


SHELL = Runs(os.system, f"touch {MARK}")
PYTHON = Runs(exec, f"import pathlib; pathlib.Path({MARK!r}).touch()")


class Net(nn.Linear):
    """A class of somebody's own."""


def own() -> bytes:
    stream = io.BytesIO()
    checkpoint.save(models.build("vgg_digits", ARGS), stream)
    return stream.getvalue()


def torch_file(content: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def state() -> dict[str, Tensor]:
    return dict(models.build("vgg_digits", ARGS).state_dict())


def with_header(**changes: Any) -> bytes:
    """prunekit's own file, its header changed; `...` takes an entry out."""
    content = torch.load(io.BytesIO(own()), weights_only=True)
    header = {**json.loads(content["prunekit"]), **changes}
    text = json.dumps({key: value for key, value in header.items() if value is not ...})
    return torch_file({**content, "prunekit": text})


def with_attribute(module: str, name: str, value: Any) -> bytes:
    """prunekit's own file, whose structure sets one more attribute of a module."""
    structure = json.loads(torch.load(io.BytesIO(own()), weights_only=True)["prunekit"])["structure"]
    structure["attributes"].setdefault(module, {})[name] = value
    return with_header(structure=structure)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("net.pt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def safe(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_entry(shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def program(
    change: Callable[[dict[str, Any]], object] = lambda _: None,
    members: dict[str, bytes] | None = None,
) -> bytes:
    """An exported program of `x -> -x + w`: its JSON changed, members added or replaced."""
    value = {"dtype": 7, "sizes": [{"as_int": 1}, {"as_int": 3}], "strides": [{"as_int": 3}, {"as_int": 1}]}
    meta = {**value, "storage_offset": {"as_int": 0}, "requires_grad": True, "layout": 7}
    x, w, neg, add = ({"as_tensor": {"name": name}} for name in ("x", "p_w", "neg", "add"))
    nodes = [
        {"target": "torch.ops.aten.neg.default", "inputs": [argument("self", x)], "outputs": [neg]},
        {
            "target": "torch.ops.aten.add.Tensor",
            "inputs": [argument("self", neg), argument("other", w)],
            "outputs": [add],
        },
    ]
    signature = {
        "input_specs": [
            {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "w"}},
            {"user_input": {"arg": x}},
        ],
        "output_specs": [{"user_output": {"arg": add}}],
    }
    graph = {"nodes": nodes, "tensor_values": {"x": copy.deepcopy(value)}}
    whole = {"schema_version": {"major": 8}, "graph_module": {"graph": graph, "signature": signature}}
    weight = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": meta}
    change(whole)
    default = {
        "archive_format": b"pt2",
        "models/model.json": json.dumps(whole).encode(),
        "data/weights/model_weights_config.json": json.dumps({"config": {"w": weight}}).encode(),
        "data/weights/weight_0": struct.pack("<3f", 1, 2, 3),
        "data/constants/model_constants_config.json": b'{"config": {}}',
    }
    return zipped({f"net/{name}": content for name, content in {**default, **(members or {})}.items()})


def argument(name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "arg": value, "kind": 1}


def calls(target: str, *arguments: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Let the program's first node call something else."""

    def change(whole: dict[str, Any]) -> None:
        node = whole["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [argument("a", value) for value in arguments] or node["inputs"]

    return change


def weights_config(**changes: Any) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(program())) as archive:
        config = json.loads(archive.read("net/data/weights/model_weights_config.json"))
    config["config"]["w"].update(changes)
    return {"data/weights/model_weights_config.json": json.dumps(config).encode()}


def meta(**changes: Any) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(program())) as archive:
        config = json.loads(archive.read("net/data/weights/model_weights_config.json"))
    return weights_config(tensor_meta={**config["config"]["w"]["tensor_meta"], **changes})


def constant(path: str, content: bytes) -> dict[str, bytes]:
    config = {"config": {"c": {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    return {
        "data/constants/model_constants_config.json": json.dumps(config).encode(),
        f"data/constants/{path}": content,
    }


def torchscript() -> bytes:
    return zipped({"net/data.pkl": b"\x80\x02}.", "net/constants.pkl": b"\x80\x02).", "net/code/net.py": b""})


FOREIGN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"P",
    "zeros": lambda: bytes(1000),
    "noise": lambda: random.Random(3).randbytes(4000),
    "text": lambda: b"these are my weights",
    "json": lambda: b'{"state_dict": {}}',
    "web page": lambda: b"<!DOCTYPE html><title>404</title>",
    "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(50),
    "jpeg": lambda: b"\xff\xd8\xff\xe0" + bytes(50),
    "pdf": lambda: b"%PDF-1.7",
    "keras": lambda: b"\x89HDF\r\n\x1a\n" + bytes(50),
    "gguf": lambda: b"GGUF" + bytes(50),
    "numpy": lambda: b"\x93NUMPY\x01\x00" + bytes(50),
    "program": lambda: b"\x7fELF" + bytes(50),
    "lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "gzip": lambda: gzip.compress(own()),
    "bzip2": lambda: bz2.compress(own()),
    "xz": lambda: lzma.compress(own()),
    "tar": lambda: tarred(own()),
    "zip of files": lambda: zipped({"net/readme.txt": b"hello"}),
    "empty zip": lambda: zipped({}),
    "torchscript": torchscript,
    "old export": lambda: zipped({"serialized_exported_program.json": b"{}", "version": b"8.1"}),
    "a tensor": lambda: torch_file(torch.zeros(3)),
    "a list": lambda: torch_file([torch.zeros(3)]),
    "no weights": lambda: torch_file({"epoch": 3, "lr": 0.1}),
    "an empty dict": lambda: torch_file({}),
    "an empty state dict": lambda: torch_file({"state_dict": {}}),
    "other keys": lambda: torch_file({"encoder.weight": torch.zeros(3, 3)}),
    "numbered keys": lambda: torch_file({0: torch.zeros(3)}),
    "sparse": lambda: torch_file({**state(), "fc.weight": torch.zeros(3, 6).to_sparse()}),
}

DAMAGED: dict[str, Callable[[], bytes]] = {
    "half": lambda: own()[: len(own()) // 2],
    "no end": lambda: own()[:-30],
    "no beginning": lambda: own()[100:],
    "a flipped bit in the weights": lambda: flipped(own(), own().index(b"archive/data/0") + 100),
    "a flipped bit in the pickle": lambda: flipped(own(), own().index(b"state_dict") + 3),
    "a flipped bit in the directory": lambda: flipped(own(), len(own()) - 60),
    "the header's bytes only": lambda: own()[:64],
    "legacy, half": lambda: torch_file(state(), legacy=True)[:1500],
    "legacy, no end": lambda: torch_file(state(), legacy=True)[:-10],
    "legacy, the magic number": lambda: torch_file(state(), legacy=True)[:20],
    "legacy, noise": lambda: torch_file(state(), legacy=True)[:60] + random.Random(1).randbytes(2000),
    "a pickle that ends": lambda: b"\x80\x02}q\x00",
    "a pickle of noise": lambda: b"\x80\x04" + random.Random(2).randbytes(500),
    "safetensors, half": lambda: safetensors.torch.save(state())[:300],
    "safetensors, a long header": lambda: struct.pack("<Q", 1 << 60) + b'{"a":1}',
    "safetensors, broken JSON": lambda: safe(b'{"a": [[[}'),
    "safetensors, beyond the end": lambda: safe({"a": tensor_entry([1000], 0, 4000)}),
    "safetensors, another size": lambda: safe({"a": tensor_entry([1000], 0, 8)}, bytes(8)),
    "safetensors, overlapping": lambda: safe({"a": tensor_entry([2], 0, 8), "b": tensor_entry([2], 4, 12)}, bytes(12)),
    "header, no text": lambda: torch_file({"prunekit": 3, "state_dict": state()}),
    "header, no JSON": lambda: torch_file({"prunekit": "{", "state_dict": state()}),
    "header, no object": lambda: torch_file({"prunekit": "[1]", "state_dict": state()}),
    "header, deep JSON": lambda: torch_file({"prunekit": "[" * 100_000, "state_dict": state()}),
    "header, newer": lambda: with_header(format=99),
    "header, format of text": lambda: with_header(format="one"),
    "header, format before the first": lambda: with_header(format=-1),
    "header, no architecture": lambda: with_header(arch=...),
    "header, unknown architecture": lambda: with_header(arch="vgg_digit"),
    "header, another architecture": lambda: with_header(arch="lenet_300_100", arch_args={}),
    "header, other arguments": lambda: with_header(arch_args={"depth": 3}),
    "header, arguments of another type": lambda: with_header(arch_args=[1]),
    "header, classes of another type": lambda: with_header(classes=[1, 2]),
    "header, history of another type": lambda: with_header(history=["slim"]),
    "header, input of another type": lambda: with_header(input=7),
    "header, no structure": lambda: with_header(structure={}),
    "header, another structure": lambda: with_header(structure={"parameters": {"a": [1]}, "attributes": {}}),
    "no weights": lambda: torch_file({"prunekit": "{}"}),
    "weights of another type": lambda: torch_file({**torch.load(io.BytesIO(own())), "state_dict": [1]}),
    "pt2, half": lambda: program()[: len(program()) // 2],
    "pt2, a flipped bit": lambda: flipped(program(), program().index(struct.pack("<3f", 1, 2, 3))),
    "pt2, no JSON": lambda: program(members={"models/model.json": b"{"}),
    "pt2, deep JSON": lambda: program(members={"models/model.json": b"[" * 100_000}),
    "pt2, no program": lambda: program(members={"models/model.json": b"{}"}),
    "pt2, another schema": lambda: program(lambda whole: whole.update(schema_version={"major": 99})),
    "pt2, a value from nowhere": lambda: program(calls("torch.ops.aten.neg.default", {"as_tensor": {"name": "y"}})),
    "pt2, a missing weight": lambda: program(members=weights_config(path_name="weight_7")),
    "pt2, a weight beyond its bytes": lambda: program(members=meta(sizes=[{"as_int": 1 << 40}, {"as_int": 3}])),
    "pt2, a weight before its bytes": lambda: program(members=meta(storage_offset={"as_int": -9})),
}

HOSTILE: dict[str, Callable[[], bytes]] = {
    "shell, plain pickle": lambda: pickle.dumps(SHELL, protocol=2),
    "shell, protocol 4": lambda: pickle.dumps(SHELL, protocol=4),
    "shell, protocol 0 behind a marker": lambda: b"\x80\x02" + pickle.dumps(SHELL, protocol=0),
    "shell, zip": lambda: torch_file(SHELL),
    "shell, legacy": lambda: torch_file(SHELL, legacy=True),
    "python, zip": lambda: torch_file(PYTHON),
    "python, legacy": lambda: torch_file(PYTHON, legacy=True),
    "among weights": lambda: torch_file({"state_dict": {**state(), "z": PYTHON}}),
    "as a key's neighbour": lambda: torch_file({"optimizer": SHELL, "state_dict": state()}),
    "in our header": lambda: torch_file({"prunekit": PYTHON, "state_dict": state()}),
    "behind torch.load": lambda: torch_file(Runs(torch.load, io.BytesIO(torch_file(SHELL)), None)),
    "a pickled module": lambda: torch_file(Net(2, 2)),
    "a pickled module, legacy": lambda: torch_file(Net(2, 2), legacy=True),
    "a zip bomb": lambda: zipped({"net/data.pkl": bytes(20_000_000)}, zipfile.ZIP_DEFLATED),
    "a zip bomb of many": lambda: zipped(
        {f"net/data/{index}": bytes(1_000_000) for index in range(20)}, zipfile.ZIP_DEFLATED
    ),
    "a tensor without data": lambda: torch_file({"fc.weight": torch.zeros(1).expand(1 << 40, 6)}),
    "classes without data": lambda: torch_file({**state(), "fc.weight": torch.zeros(1, 6).expand(1 << 40, 6)}),
    "an impossible architecture": lambda: with_header(arch_args={**ARGS, "width": 1e300}),
    "an enormous torchvision network": lambda: with_header(
        arch="torchvision:resnet18", arch_args={"num_classes": 1 << 60}
    ),
    "attributes that are methods": lambda: with_attribute("", "eval", 3),
    "attributes that are private": lambda: with_attribute("features.0", "_parameters", {}),
    "a download": lambda: with_header(arch="torchvision:resnet18", arch_args={"weights": "DEFAULT"}),
    "another download": lambda: with_header(arch="torchvision:resnet18@DEFAULT", arch_args={}),
    "an architecture that is a shell": lambda: with_header(arch="os:system", arch_args={"command": f"touch {MARK}"}),
    "an architecture that is a file": lambda: with_header(arch=f"{MARK}.py:net", arch_args={}),
    "terminal escapes in a key": lambda: torch_file({"\x1b[2J\nok": torch.zeros(1)}),
    "a long key": lambda: torch_file({"a" * 100_000: torch.zeros(1)}),
    "pt2, pickled weights": lambda: program(
        members={**weights_config(use_pickle=True), "data/weights/weight_0": torch_file(SHELL)}
    ),
    "pt2, weights of old": lambda: program(members={"data/weights/model.pt": torch_file(PYTHON)}),
    "pt2, a constant": lambda: program(members=constant("tensor_0", torch_file(SHELL))),
    "pt2, an opaque constant": lambda: program(members=constant("opaque_obj_0", pickle.dumps(SHELL))),
    "pt2, a custom constant": lambda: program(members=constant("custom_obj_0", pickle.dumps(SHELL))),
    "pt2, compiled code": lambda: program(members={"data/aotinductor/model/net.so": b"\x7fELF"}),
    "pt2, a shell": lambda: program(calls("torch.os.system", {"as_string": f"touch {MARK}"})),
    "pt2, torch.load": lambda: program(calls("torch.load", {"as_string": MARK})),
    "pt2, a library": lambda: program(calls("torch.ops.load_library", {"as_string": MARK})),
    "pt2, a file": lambda: program(
        calls("torch.ops.aten.from_file.default", {"as_string": MARK}, {"as_bool": True}, {"as_int": 9})
    ),
    "pt2, a function of Python": lambda: program(calls("_operator.methodcaller", {"as_string": "sort"})),
    "pt2, a hidden attribute": lambda: program(calls("torch.ops.aten.__class__.__init__")),
    "pt2, a custom operator": lambda: program(calls("torch.ops.their_own.neg.default")),
    "pt2, an argument of another kind": lambda: program(
        calls("torch.ops.aten.neg.default", {"as_custom_obj": {"name": "x"}})
    ),
    "pt2, a weight in a method's place": lambda: program(
        lambda whole: whole["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name="forward"
        ),
        members={
            "data/weights/model_weights_config.json": weights_config()[
                "data/weights/model_weights_config.json"
            ].replace(b'"w"', b'"forward"')
        },
    ),
}

FILES = {
    f"{kind}: {name}": make
    for kind, table in (("foreign", FOREIGN), ("damaged", DAMAGED), ("hostile", HOSTILE))
    for name, make in table.items()
}


@pytest.mark.parametrize("name", FILES)
def test_one_clear_error_and_nothing_happens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content = FILES[name]()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pt"
    path.write_bytes(content)
    capfd.readouterr()
    for source in (path, io.BytesIO(content)):
        for arch in (None, "vgg_digits"):
            if arch and name.startswith(("damaged: header, ", "hostile: a")):
                continue
            with pytest.raises(InputError) as caught:
                checkpoint.load(source, arch=arch)
            lines = str(caught.value).splitlines()
            assert 1 <= len(lines) <= 2
            assert all(line.isprintable() for line in lines)
            assert len(str(caught.value)) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["given.pt"]
    assert path.read_bytes() == content
    assert capfd.readouterr() == ("", "")


def test_the_control_of_these_files_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unharmed, the same bytes load; and unpickled, the hostile ones do run."""
    x = torch.randn(1, 3)
    assert torch.equal(checkpoint.load(io.BytesIO(program()))(x), -x + torch.tensor([1.0, 2.0, 3.0]))
    checkpoint.load(io.BytesIO(with_header()))
    monkeypatch.chdir(tmp_path)
    for thing in (SHELL, PYTHON):
        pickle.loads(pickle.dumps(thing))
        (tmp_path / MARK).unlink()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("shell, plain pickle", "posix.system"),
        ("shell, protocol 4", "posix.system"),
        ("shell, zip", "posix.system"),
        ("shell, legacy", "posix.system"),
        ("among weights", "builtins.exec"),
        ("a pickled module", f"{__name__}.Net"),
        ("an architecture that is a shell", "os:system"),
        ("pt2, a shell", "torch.os.system"),
        ("pt2, a file", "torch.ops.aten.from_file.default"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the shell has another name elsewhere")
def test_what_a_hostile_file_wanted_is_named(name: str, wanted: str) -> None:
    wanted = wanted.replace("builtins.exec", "exec")
    with pytest.raises(InputError) as caught:
        checkpoint.load(io.BytesIO(HOSTILE[name]()))
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "is empty"),
        ("gzip", "a gzip archive"),
        ("tar", "a tar archive"),
        ("web page", "a download may have failed"),
        ("lfs pointer", "git lfs pull"),
        ("torchscript", "a TorchScript program"),
        ("old export", "export it again"),
        ("a list", "holds list, expected a state dict"),
        ("no weights", "holds no state dict, but the keys epoch, lr"),
    ],
)
def test_foreign_files_are_recognised(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        checkpoint.load(io.BytesIO(FOREIGN[name]()))


def test_code_hidden_in_a_programs_names_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, guards, expressions and sample inputs that `torch.export.load` would compile or unpickle."""
    monkeypatch.chdir(tmp_path)
    evil = f"__import__('os').system('touch {MARK}')"

    def change(whole: dict[str, Any]) -> None:
        whole["guards_code"] = [evil]
        graph = whole["graph_module"]["graph"]
        graph["nodes"][0]["outputs"][0]["as_tensor"]["name"] = evil
        graph["nodes"][0]["name"] = evil
        graph["nodes"][1]["inputs"][0]["arg"]["as_tensor"]["name"] = evil
        graph["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": evil}}

    content = program(change, {"data/sample_inputs/model.pt": torch_file(SHELL)})
    x = torch.randn(4, 3)
    assert torch.equal(checkpoint.load(io.BytesIO(content))(x), -x + torch.tensor([1.0, 2.0, 3.0]))
    assert list(tmp_path.iterdir()) == []


def test_an_enormous_architecture_takes_no_memory() -> None:
    enormous = {**ARGS, "width": 1e5}
    with pytest.raises(InputError, match="of another shape"):
        checkpoint.load(io.BytesIO(torch_file(state())), arch="vgg_digits", arch_args=enormous)
    # our own file's structure says how wide the network is now
    own_net = models.build("vgg_digits", ARGS)
    small = checkpoint.load(io.BytesIO(with_header(arch_args=enormous)))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in own_net.parameters())


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="cannot read"):
        checkpoint.load("a\0b")
    with pytest.raises(InputError, match="is a device"):
        checkpoint.load(os.devnull)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    with subprocess.Popen([sys.executable, "-c", code, pipe], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        writer.stdin.write(own())
        writer.stdin.close()
        checkpoint.load(pipe)


@pytest.mark.parametrize("make", [own, program, lambda: torch_file(state(), legacy=True)])
def test_any_flipped_byte_is_an_error_or_harmless(make: Callable[[], bytes]) -> None:
    """Whatever byte is damaged: an `InputError`, or a network, never another exception."""
    content = make()
    for at in random.Random(0).sample(range(len(content)), 150):
        try:
            checkpoint.load(io.BytesIO(flipped(content, at)))
        except InputError:
            continue

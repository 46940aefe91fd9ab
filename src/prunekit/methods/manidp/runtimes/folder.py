"""A folder that `export --buckets` wrote, read to be measured: its files in their runtime, behind their router."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.errors import InputError
from prunekit.exporting.onnx_files import OnnxClassifier, read_onnx
from prunekit.exporting.runtimes import ExportedClassifier
from prunekit.methods.manidp.runtimes.buckets import Bucketed
from prunekit.methods.manidp.runtimes.files import INDEX, OURS
from prunekit.programs.program import ExportedProgram, filled
from prunekit.spec import InputSpec, Origin, remember
from prunekit.surgery import cost_of, trace


class _File(NamedTuple):
    network: OnnxClassifier | ExportedProgram
    params: int
    macs: int


class BucketFolder(ExportedClassifier):
    """The classifier in a folder of files: a router, and the networks that it chooses among.

    `costs` are the MACs of one image in each network, `router_macs` the router's.
    """

    macs = None  # they depend on the image

    def __init__(self, files: Sequence[_File], costs: Sequence[int], size: int, runtime: str) -> None:
        super().__init__()
        router, *networks = files
        self.runner = Bucketed(router.network, [one.network for one in networks], costs)
        self.params, self.router_macs = sum(one.params for one in files), router.macs
        self.size, self.runtime = size, runtime
        self.batch, self.sizes = router.network.batch, router.network.sizes[-3:]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, `(N, classes)`."""
        logits: Tensor = self.runner(images)
        return logits

    def mean_macs(self, batches: Iterable[tuple[Tensor, Any]]) -> float:
        """Return the mean cost of these images, `(n, C, H, W)` each batch: the router's and their networks'."""
        with torch.inference_mode():
            routes = torch.cat([self.runner.router(images).argmax(1) for images, _ in batches])
        return self.router_macs + float(torch.tensor(self.runner.macs, dtype=torch.float64)[routes].mean())


def is_bucket_folder(source: str) -> bool:
    """Return whether `source` is a folder that says how sub-networks go together."""
    return (Path(source) / INDEX).is_file()


def read_buckets(path: str | Path) -> BucketFolder:
    """Return the classifier in a folder; its origin has the input and the classes that its index tells.

    Raises:
        InputError: The index or a file is damaged or missing, or a package that runs the files is.
    """
    folder = Path(path)
    index = _index(folder / INDEX)
    origin = Origin("", input=InputSpec.from_json(index["input"]), classes=tuple(map(str, index["classes"])))
    names = [index["router"], *(bucket["file"] for bucket in index["buckets"])]
    open_file = _onnx if index["format"] == "onnx" else _program
    model = BucketFolder(
        [open_file(folder / name, origin) for name in names],
        [bucket["macs"] for bucket in index["buckets"]],
        sum((folder / name).stat().st_size for name in (*names, INDEX)),
        "onnxruntime" if index["format"] == "onnx" else "pt2",
    )
    remember(model, origin)
    return model.eval()


def _onnx(path: Path, _origin: Origin) -> _File:
    model = read_onnx(str(path))
    return _File(model, model.params, model.macs or 0)


def _program(path: Path, origin: Origin) -> _File:
    model = checkpoint.load(path)
    if not isinstance(model, ExportedProgram) or origin.input is None:
        raise InputError(f"{path} is no exported program")
    cost = cost_of(model, trace(model, filled(model, torch.zeros(1, *origin.input.shape)), probe=False))
    return _File(model, cost.params, cost.macs)


def _index(path: Path) -> dict[str, Any]:
    """Return the content of `buckets.json`, checked: what it names lies beside it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != "prunekit.buckets":
            raise ValueError("its schema is not prunekit.buckets")
        if found["version"] > 1:
            raise InputError(f"{path} was written by a newer prunekit", hint="update prunekit")
        if found["format"] not in ("onnx", "pt2"):
            raise ValueError(f"its format is {found['format']!r}")
        InputSpec.from_json(found["input"])
        _check_files([found["router"], *(bucket["file"] for bucket in found["buckets"])])
        if len(found["buckets"]) < 1 or not all(_is_cost(bucket) for bucket in found["buckets"]):
            raise ValueError("its networks are not told with their MACs")
        list(found["classes"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        hint = "prunekit export MODEL --buckets --force -o FOLDER writes it anew"
        raise InputError(f"{path} does not say how the files go together: {error}", hint=hint) from error
    index: dict[str, Any] = found
    return index


def _check_files(names: list[Any]) -> None:
    strange = [name for name in names if not (isinstance(name, str) and OURS.fullmatch(name) and name != INDEX)]
    if strange:
        raise ValueError(f"{strange[0]!r} is none of an export's files")


def _is_cost(bucket: Mapping[str, Any]) -> bool:
    return type(bucket["macs"]) is int and bucket["macs"] >= 0

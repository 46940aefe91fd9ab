"""Runtimes of exported files as users run them: onnxruntime, and torch in a process without prunekit.

Both are modules that are called as the network is, so that whatever measures a network can measure them.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import InputError, SurgeryError

# Runs in the other process. It receives positional inputs and sends outputs, in any containers, each preceded by its
# length; what must not be importable there is blocked before torch is imported.
_STRANGER = """
import io, struct, sys
path, threads, blocked = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for name in blocked:
    sys.modules[name] = None
import torch
torch.set_num_threads(threads)
program = torch.export.load(path).module()
def whole(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return type(value)(map(whole, value)) if isinstance(value, (list, tuple)) else value
with torch.no_grad():
    while length := sys.stdin.buffer.read(8):
        content = sys.stdin.buffer.read(struct.unpack("<q", length)[0])
        output = program(*torch.load(io.BytesIO(content), weights_only=True))
        answer = io.BytesIO()
        torch.save(whole(output), answer)
        sys.stdout.buffer.write(struct.pack("<q", answer.tell()) + answer.getvalue())
        sys.stdout.buffer.flush()
"""


class OnnxModel(nn.Module):
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, content: bytes | str) -> None:
        """Load the file of this content or path.

        Raises:
            InputError: onnxruntime is missing or cannot read the file.
        """
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                "ONNX files are run by onnxruntime, which is not installed", hint="pip install 'prunekit[onnx]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its parser and its checks raise types of their own
            file = content if isinstance(content, str) else "the file"
            raise InputError(f"onnxruntime refuses {file}: {' '.join(str(error).split())[:200]}") from error
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def signature(self) -> tuple[str, tuple[int | str | None, ...]]:
        """Return the type of the first input, such as `tensor(float)`, and its shape: a name or None is any size."""
        first = self._session.get_inputs()[0]
        return first.type, tuple(first.shape)

    def notes(self, key: str) -> str | None:
        """Return an entry of the file's metadata; None where there is none."""
        found: str | None = self._session.get_modelmeta().custom_metadata_map.get(key)
        return found

    def forward(self, *inputs: Any) -> Any:
        """Return the file's output, or all by name where there are several; `inputs` may nest lists and dicts."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        try:
            feed = {name: x.contiguous().numpy() for name, x in zip(self.inputs, tensors, strict=True)}
            found = [torch.from_numpy(np.asarray(array)) for array in self._session.run(None, feed)]
        except Exception as error:  # its own errors, and NumPy's for dtypes that it lacks
            raise SurgeryError(f"the file does not run in onnxruntime: {' '.join(str(error).split())[:200]}") from error
        return found[0] if len(found) == 1 else dict(zip(self.outputs, found, strict=True))


class ExportedClassifier(nn.Module):
    """Classifier of images `(N, C, H, W)`, for any N, in one file or several.

    `params` counts parameters, `macs` multiply-accumulates for one image (None where they are unknown or depend on the
    image), `size` the bytes of all files. `batch` is the only batch size that the files take and `sizes` are those of
    an image, each None where any will do. `runtime` is what runs them: "onnxruntime" or "pt2".
    """

    params: int
    macs: int | None
    size: int
    batch: int | None
    sizes: tuple[int | None, ...]
    runtime: str


class StrangerModel(nn.Module):
    """A `.pt2` file, loaded in another process that can import neither prunekit nor the model's code."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        super().__init__()
        self._process, self._errors = process, errors

    def forward(self, *inputs: Any) -> Any:
        """Return the program's output, in its containers."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        content = io.BytesIO()
        # copies: a view would be written with its whole storage
        torch.save(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs), content)
        try:
            into.write(content.tell().to_bytes(8, "little") + content.getvalue())
            into.flush()
            answer = _exactly(out, int.from_bytes(_exactly(out, 8), "little"))
        except (BrokenPipeError, EOFError):
            raise SurgeryError(f"the exported program fails in a process of its own: {self._last_words()}") from None
        return torch.load(io.BytesIO(answer), weights_only=True)

    def _last_words(self) -> str:
        self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit status {self._process.returncode}"


@contextlib.contextmanager
def stranger(content: bytes, blocked: Iterable[str] = ()) -> Iterator[StrangerModel]:
    """Start the process on the `content` of a `.pt2`; it cannot import prunekit or the packages in `blocked`."""
    names = ["prunekit", "torchvision.models", *blocked]
    with tempfile.TemporaryDirectory(prefix="prunekit-") as folder:
        path, errors = Path(folder) / "program.pt2", Path(folder) / "errors.txt"
        path.write_bytes(content)
        # -I: neither the working folder nor PYTHONPATH is searched for code
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-I", "-W", "ignore", "-c", _STRANGER, str(path), threads, *names]
        with (
            errors.open("wb") as log,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
        ):
            try:
                yield StrangerModel(process, errors)
            finally:
                process.kill()
                with contextlib.suppress(BrokenPipeError):  # unflushed data has no reader any more
                    if process.stdin is not None:
                        process.stdin.close()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content

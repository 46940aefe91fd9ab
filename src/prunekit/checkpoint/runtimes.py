"""What runs an exported file as its users will: onnxruntime, and torch in a process that knows nothing of prunekit.

Both are modules that map images `(N, ...)` to outputs, so that whatever measures a network measures them.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import InputError, SurgeryError

# Runs in the other process. It gets batches and gives outputs as NumPy arrays, each behind its length; what must not
# be importable there is blocked before torch is imported.
_STRANGER = """
import io, struct, sys
path, threads, blocked = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for name in blocked:
    sys.modules[name] = None
import numpy, torch
torch.set_num_threads(threads)
program = torch.export.load(path).module()
with torch.no_grad():
    while length := sys.stdin.buffer.read(8):
        content = sys.stdin.buffer.read(struct.unpack("<q", length)[0])
        output = program(torch.from_numpy(numpy.load(io.BytesIO(content), allow_pickle=False)))
        answer = io.BytesIO()
        numpy.save(answer, output.numpy())
        sys.stdout.buffer.write(struct.pack("<q", answer.tell()) + answer.getvalue())
        sys.stdout.buffer.flush()
"""


class OnnxModel(nn.Module):
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, content: bytes) -> None:
        """Raises `InputError` where onnxruntime is missing or cannot read the file."""
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError("checking ONNX needs onnxruntime", hint="pip install 'prunekit[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its parser and its checks raise types of their own
            raise InputError(f"onnxruntime refuses the file: {' '.join(str(error).split())[:200]}") from error
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """The first output."""
        return torch.from_numpy(self._session.run(None, {self._input: images.contiguous().numpy()})[0])


class StrangerModel(nn.Module):
    """A `.pt2` file, loaded in another process that can import neither prunekit nor the model's code."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        super().__init__()
        self._process, self._errors = process, errors

    def forward(self, images: Tensor) -> Tensor:
        """The program's output."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        content = io.BytesIO()
        np.save(content, images.contiguous().numpy())
        try:
            into.write(content.tell().to_bytes(8, "little") + content.getvalue())
            into.flush()
            answer = _exactly(out, int.from_bytes(_exactly(out, 8), "little"))
        except (BrokenPipeError, EOFError):
            raise SurgeryError(f"the exported program fails in a process of its own: {self._last_words()}") from None
        return torch.from_numpy(np.load(io.BytesIO(answer), allow_pickle=False))

    def _last_words(self) -> str:
        self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit status {self._process.returncode}"


@contextlib.contextmanager
def stranger(content: bytes, blocked: Iterable[str] = ()) -> Iterator[StrangerModel]:
    """Start the process on a `.pt2` file's `content`; prunekit and the packages in `blocked` do not exist there."""
    names = ["prunekit", "torchvision.models", *blocked]
    with tempfile.TemporaryDirectory(prefix="prunekit-") as folder:
        path, errors = Path(folder) / "program.pt2", Path(folder) / "errors.txt"
        path.write_bytes(content)
        # -I: neither the present folder nor PYTHONPATH are searched for code
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
                with contextlib.suppress(BrokenPipeError):  # what was not flushed has nobody to read it
                    if process.stdin is not None:
                        process.stdin.close()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content

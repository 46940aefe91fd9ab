"""The second device of the tests in Python: built once, then loaded, and there only while it is wanted.

Its memory is the host's, its results are the CPU's, bit for bit, but its tensors and those of the CPU do not mix. The
library is kept in the user's cache, by the version of torch and the source.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NAME = "second"
_SOURCE = Path(__file__).with_suffix(".cpp")
_KEY = hashlib.sha256(f"{torch.__version__} {sys.version}".encode() + _SOURCE.read_bytes()).hexdigest()[:16]


def why_not() -> str | None:
    """Why there is no such device here; None where it was loaded."""
    try:
        _load()
    except _NoDeviceError as error:
        return str(error)
    return None


@contextmanager
def present(*, double: bool = True, memory: int | None = None) -> Iterator[None]:
    """Let the device be there; by choice without float64, or with so many bytes of memory free."""
    own = torch.ops.second_device
    if memory is not None:
        gc.collect()  # what tests before have left is not to become free meanwhile
    own.set_available(True)
    own.set_double(double)
    own.set_free_memory(1 << 30 if memory is None else memory)
    try:
        yield
    finally:
        own.set_available(False)
        own.set_double(True)
        own.set_current(0)


class _NoDeviceError(Exception):
    pass


def _load() -> None:
    if hasattr(torch, NAME):
        return
    torch.ops.load_library(str(_built()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_module=False, for_packed_sequence=False)


def _built() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prunekit-tests" / _KEY
    library = folder / "second_device.so"
    if library.is_file():
        return library
    if os.name != "posix":
        raise _NoDeviceError("the second device of the tests is built on Linux and macOS alone")
    if not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")):
        raise _NoDeviceError("the second device of the tests needs a C++ compiler and ninja, and one is not found here")
    from torch.utils.cpp_extension import load

    folder.mkdir(parents=True, exist_ok=True)
    try:
        load(
            "second_device",
            [str(_SOURCE)],
            extra_cflags=["-O0", "-w"],
            build_directory=str(folder),
            is_python_module=False,
            is_standalone=False,
        )
    except (RuntimeError, OSError, ImportError) as error:
        raise _NoDeviceError(f"the second device of the tests cannot be built: {str(error)[-500:]}") from error
    return library


def _module() -> Any:
    """What `torch.second` is, as `torch.cuda` is for GPUs."""
    own = torch.ops.second_device

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return int(own.get_current()) if found is None else found

    def seed_all(seed: int) -> None:
        for number in range(2):
            own.default_generator(number).manual_seed(seed)

    @contextmanager
    def chosen(device: Any) -> Iterator[None]:
        before = own.get_current()
        own.set_current(index(device))
        try:
            yield
        finally:
            own.set_current(before)

    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=own.is_available,
        is_initialized=lambda: True,
        is_bf16_supported=lambda: True,
        device=chosen,
        device_count=lambda: 2,
        current_device=own.get_current,
        set_device=lambda device: own.set_current(index(device)),
        synchronize=lambda _=None: torch.accelerator.synchronize(),
        manual_seed=lambda seed: own.default_generator(index(None)).manual_seed(seed),
        manual_seed_all=seed_all,
        get_rng_state=lambda device=None: own.default_generator(index(device)).get_state(),
        set_rng_state=lambda state, device=None: own.default_generator(index(device)).set_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        get_device_name=lambda _=None: "second device",
        _is_in_bad_fork=lambda: False,
    )
    return module

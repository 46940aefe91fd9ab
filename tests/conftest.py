"""What many tests share: the real inputs, where they are at hand, and one seed for every test."""

from __future__ import annotations

import io
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor

# Networks this small are slower on several threads, and much slower on a busy machine.
torch.set_num_threads(1)

# The same examples every time: nobody's change fails by chance. Slow tests take `derandomize=False` to find new ones.
settings.register_profile("prunekit", derandomize=True, deadline=None, database=None)
settings.load_profile("prunekit")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None, which is a worker a core, except for single tests: these run sooner than a worker has imported torch."""
    return 0 if config.args and all("::" in argument for argument in config.args) else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or changes what this machine's user has named before."""
    monkeypatch.setenv("PRUNEKIT_STATE", str(tmp_path_factory.getbasetemp() / "state" / secrets.token_hex(8)))


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real checkpoints and images: `$PRUNEKIT_ASSETS`, or `../shared/assets` beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("PRUNEKIT_ASSETS", beside))
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}; $PRUNEKIT_ASSETS says where they are")
    return folder


@pytest.fixture(scope="session")
def cifar_test(assets: Path) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Every n-th test image of CIFAR-10: uint8 `(N, 3, 32, 32)`, and labels `(N,)`."""
    archive = assets / "cifar10" / "test.zip"
    if not archive.is_file():
        pytest.skip(f"no CIFAR-10 test images at {archive}")

    def read(every: int) -> tuple[Tensor, Tensor]:
        with zipfile.ZipFile(archive) as images:
            members = sorted(name for name in images.namelist() if name.endswith(".png"))
            classes = sorted({Path(name).parent.name for name in members})
            chosen = members[::every]
            pixels = [np.asarray(Image.open(io.BytesIO(images.read(name))).convert("RGB")) for name in chosen]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(
            [classes.index(Path(name).parent.name) for name in chosen]
        )

    return read

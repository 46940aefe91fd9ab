"""Tensors that wait in a file come back as they were, and no file outlives what has made it."""

from __future__ import annotations

import errno
import mmap
import platform
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunekit as pk
from prunekit import surgery
from prunekit.restoration import frontier, spilling
from prunekit.restoration.images import gather
from prunekit.restoration.memory import size_in_words
from prunekit.restoration.spilling import Spill


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """The temporary files that are made from now on."""
    made: list[IO[bytes]] = []
    make = tempfile.TemporaryFile

    def noted(*args: Any, **kwargs: Any) -> IO[bytes]:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    return made


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings with which images wait in a file, three of them at a time."""
    monkeypatch.setattr(frontier, "BATCH", 3)
    return {"x": torch.zeros(1, 3, 8, 8), "images": torch.randn(20, 3, 8, 8), "ratio": 0.5, "memory": "1"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(3)), nn.Flatten())


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_tensors_and_their_views_come_back_and_places_are_used_again(moves: list[tuple[int, bool]]) -> None:
    spill = Spill()
    bases = [torch.randn(3 + n % 2, 4, dtype=torch.float64) for n in range(6)]
    views, wanted = [base.t()[1:] for base in bases], [base.clone() for base in bases]
    for n, put in moves:
        if put and bases[n].untyped_storage().nbytes():
            spill.put([bases[n], views[n]])
            assert bases[n].untyped_storage().nbytes() == 0
        else:
            spill.fetch(views[n])
            assert torch.equal(views[n], wanted[n].t()[1:])
    assert spill._end <= sum(base.numel() * 8 for base in bases)  # so large is the file
    spill.close()
    assert all(torch.equal(base, want) for base, want in zip(bases, wanted, strict=True))


def test_the_place_of_a_tensor_that_is_gone_is_used_again() -> None:
    spill = Spill()
    for _ in range(5):
        spill.put([torch.randn(100)])
    assert spill._end == 400
    spill.close()


def test_more_than_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "_PART", 64)
    spill, x = Spill(), torch.randn(33)
    want = x.clone()
    spill.put([x])
    spill.fetch(x)
    assert torch.equal(x, want)
    spill.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of another C library")
def test_the_holes_that_moved_tensors_leave_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "_HOLES", 16 << 20)
    torch.empty(30 << 20, dtype=torch.uint8)  # once so large a block is freed, smaller ones come from the heap
    tensors = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(96)]
    spill, before = Spill(), resident()
    for tensor in tensors[::2]:  # the others stay in between
        spill.put([tensor])
    assert before - resident() > 40 << 20
    spill.close()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * mmap.PAGESIZE


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any op makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_checking_images_takes_no_memory_of_their_size() -> None:
    model, images = network(), torch.randn(200, 3, 8, 8)
    graph = surgery.trace(model, images[:1])
    with Largest() as largest:
        gather(images, model, graph)
    assert largest.numbers <= images.numel() // 10
    images[-1, -1, -1, -1] = torch.nan
    with pytest.raises(pk.InputError, match="not finite"):
        gather(images, model, graph)


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_file_stays_open(
    interrupted: bool, files: list[IO[bytes]], tight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    if interrupted:
        monkeypatch.setattr("prunekit.restoration.layerwise_refit.refit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pk.merge(network(), **tight)
    else:
        pk.merge(network(), **tight)
    assert [file.closed for file in files] == [True]
    assert threading.active_count() == threads


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_too_little_disk_is_told_before_anything_waits(
    files: list[IO[bytes]], tight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    said = rf"take up to 0\.\d MiB on disk, and {tempfile.gettempdir()} has 0.0 MiB left"
    with pytest.raises(pk.InputError, match=said) as error:
        pk.merge(network(), **tight)
    assert "TMPDIR" in str(error.value.hint)
    assert not files


def test_a_disk_that_fills_up_is_told(tight: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spill, "_move", full)
    model, threads = network(), threading.active_count()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pk.InputError, match="fails: No space left on device"):
        pk.merge(model, **tight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert threading.active_count() == threads


class Halves(nn.Module):
    """Holds views of what it has computed over several layers, and changes one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        left, right = self.second(x).chunk(2, 1)
        y = self.third(x)
        left.add_(1)
        return torch.cat([left.transpose(2, 3), right.transpose(2, 3) + y[:, :4]], 1)


def test_views_and_changes_in_place_survive(tight: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Halves().double()
    tight |= {name: tight[name].double() for name in ("x", "images")}
    waiting = pk.merge(model, **tight)
    held = pk.merge(model, **tight | {"memory": "1GiB"})
    for name, value in held.model.state_dict().items():
        assert torch.allclose(waiting.model.state_dict()[name], value, atol=1e-9), name


@pytest.mark.parametrize(("size", "said"), [(3 << 29, "1.5 GiB"), (1 << 40, "1,024.0 GiB"), (300_000, "0.3 MiB")])
def test_sizes_in_words(size: int, said: str) -> None:
    assert size_in_words(size) == said

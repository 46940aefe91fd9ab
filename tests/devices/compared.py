"""Small networks, and what they and plans are made of, brought to one form in which two devices can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import gated, lively
from prunekit.spec import InputSpec, Origin, remember

CPU = torch.device("cpu")


def digits(split: Any = "test", count: int = 48) -> pk.ImageSet:
    """A few of the digits."""
    return pk.open_data("digits", split).sample(count)


def small_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolutions with batch norms, for the digits."""
    torch.manual_seed(0)
    return lively(pk.load("prunekit:vgg_digits", arch_args={"config": "8-8-M-8", "width": 1})).to(dtype)


class Branches(nn.Module):
    """An addition, a concatenation, groups, dropout, a constant buffer, and layers without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.third = nn.BatchNorm2d(8), nn.Conv2d(16, 8, 1)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(8, 10)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() * self.scale[:, None, None]
        y = self.norm(self.second(x)).relu() + x
        z = self.third(torch.cat([x, y], 1)).relu().mean((2, 3))
        return self.last(self.drop(z))


def branches() -> nn.Module:
    torch.manual_seed(1)
    return remember(lively(Branches()).float(), Origin("", input=InputSpec((1, 8, 8))))


def network_with_gates() -> nn.Module:
    return gated(small_network(), 8, channels=1)


def same(found: Any, wanted: Any, device: torch.device | None, path: str = "result") -> None:
    """Assert that what came of the device is what came of the CPU, bit for bit, and where its tensors are."""
    if isinstance(wanted, nn.Module):
        same(found.state_dict(), wanted.state_dict(), device, path)
        assert found.training == wanted.training
    elif isinstance(wanted, Tensor):
        assert torch.equal(found.cpu(), wanted.cpu()), f"{path} differs by {(found.cpu() - wanted.cpu()).abs().max()}"
        assert found.dtype == wanted.dtype
        if device is not None:
            assert found.device.type == device.type, f"{path} is on {found.device}"
    elif isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(found, wanted, err_msg=path)
    elif isinstance(wanted, Mapping):
        assert list(found) == list(wanted), path
        for key in wanted:
            same(found[key], wanted[key], device, f"{path}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), path
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, device, f"{path}[{number}]")
    elif is_dataclass(wanted) and not isinstance(wanted, type):
        for item in fields(wanted):
            if "second" not in item.name and "latency" not in item.name:
                same(getattr(found, item.name), getattr(wanted, item.name), None, f"{path}.{item.name}")
    else:
        assert found == wanted or (found != found and wanted != wanted), f"{path}: {found} and {wanted}"

"""A second device for these tests. It is loaded before any test runs: autograd counts devices at its first use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import second_device
import torch

REASON = second_device.why_not()


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The second device, there for this test."""
    if REASON is not None:
        pytest.skip(REASON)
    with second_device.present():
        yield torch.device(second_device.NAME, 0)

"""Devices, as `torch.accelerator` knows them: CUDA, MPS (Apple), XPU (Intel) and others are asked for in one way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError, TrainingError

CPU = torch.device("cpu")
AUTO = "auto"

# What gradients are summed by, between processes. Others have Gloo, which works on the host.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


def chosen(asked: str | None) -> torch.device:
    """Return the device of this name, checked; for `auto` or None the accelerator of this process, or else the CPU.

    Raises:
        InputError: There is no such device.
        TrainingError: torchrun has started more processes here than there are accelerators.
    """
    if asked in (None, AUTO):
        kind = torch.accelerator.current_accelerator(check_available=True)
        return CPU if kind is None else _own(kind)
    try:
        device = torch.device(str(asked))
        if device.type == "meta":
            raise RuntimeError("it has no memory")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(
            f"device '{asked}' cannot be used: {str(error).splitlines()[0]}", hint=f"there are {', '.join(present())}"
        ) from error
    return device if device.type == "cpu" or device.index is not None else _own(device)


def present() -> list[str]:
    """Return the names of the devices that are here."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    found = [] if kind is None else [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())]
    return ["cpu", *found]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the weights, or else of the buffers; the CPU for a network without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return tensor.device if tensor is not None else CPU


def check_whole(model: nn.Module) -> None:
    """Raise `InputError` for a network whose weights are divided among devices."""
    first: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(parameter.device, name)
    if len(first) > 1:
        found = ", ".join(f"{device} ('{name}')" for device, name in first.items())
        raise InputError(
            f"the network is divided among devices: {found}", hint=f"bring it to one: model.to('{next(iter(first))}')"
        )


def check_types(model: nn.Module, device: torch.device) -> None:
    """Raise `InputError` where a network in float64 is to go to a device that has none."""
    tensors = ((name, t) for name, t in model.state_dict().items() if isinstance(t, Tensor))
    wide = next((name for name, tensor in tensors if tensor.dtype == torch.float64), None)
    if wide is not None and not has_double(device):
        raise InputError(
            f"'{wide}' is in float64, which {device} does not have", hint="--device cpu has it; or model.float()"
        )


def has_double(device: torch.device) -> bool:
    """Return whether a device computes in float64; Apple's do not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def sums_in(device: torch.device) -> torch.dtype:
    """Return the most precise type of the device, to add up in."""
    return torch.float64 if has_double(device) else torch.float32


def precise(values: Tensor) -> Tensor:
    """Return values in the most precise type of their device."""
    return values.to(sums_in(values.device))


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU does at once."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def name_of(device: torch.device) -> str:
    """Return what people call a device: that of the product where it is known."""
    if device.type == "cpu":
        return str(device)
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named is not None else str(device)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on an accelerator; None where it does not say."""
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError, ValueError):
        return torch.accelerator.get_memory_info(device)[0]
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):  # MPS shares the host's memory
        module: Any = torch.get_device_module(device)
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    return None


def process_group_for(device: torch.device) -> str:
    """Return the backend of `torch.distributed` that suits a device."""
    return _BACKENDS.get(device.type, "gloo")


@contextlib.contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """Restore the state of the CPU's generator, and of the device's, at the end."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng([]):
            yield
        return
    with torch.random.fork_rng([_index(device)], device_type=device.type):
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the CPU's generator and that of one device, unlike `torch.manual_seed`, which seeds those of all devices.

    It leaves seeds for devices that are not in use yet, too.
    """
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
            module.manual_seed(seed)


def _own(kind: torch.device) -> torch.device:
    """Return the device of this kind that torchrun means for this process; the current one without torchrun."""
    count = torch.accelerator.device_count()
    if "LOCAL_RANK" not in os.environ:
        return torch.device(kind.type, torch.accelerator.current_device_index())
    local = int(os.environ["LOCAL_RANK"])
    if local >= count:
        raise TrainingError(f"process {local} has no device: there are {count} of the kind '{kind.type}'")
    return torch.device(kind.type, local)


def _index(device: torch.device) -> int:
    return torch.accelerator.current_device_index() if device.index is None else device.index


def lay_channels_last(model: nn.Module) -> None:
    """Lay the weights of a network out channels-last, **in place**; not those of volumes, whose order is another."""
    if all(parameter.dim() <= 4 for parameter in model.parameters()):
        model.to(memory_format=torch.channels_last)

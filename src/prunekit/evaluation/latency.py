"""Timing of forward passes, the only timer in the package."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.devices import device_of, name_of, synchronise
from prunekit.progress import counter


@dataclass(frozen=True)
class Latency:
    """Measured wall time of one forward pass.

    `p25`, `p50`, `p75` and `p95` are the quartiles and the 95th percentile over `calls` passes, in milliseconds for a
    whole batch of `batch` images; `threads` is the number of CPU threads that PyTorch used.
    """

    p50: float
    p95: float
    batch: int
    threads: int
    device: str
    calls: int
    p25: float | None = None
    p75: float | None = None

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles; None in results of releases that did not measure them."""
        return None if self.p25 is None or self.p75 is None else (self.p75 - self.p25) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


def measure_latency(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 1.0,
    calls: tuple[int, int] = (20, 2000),
) -> Latency:
    """Time forward passes of `model` on `inputs` repeated to `batch` images, after a warm-up.

    Args:
        model: The network; its weights decide the device.
        inputs: Example inputs with a batch of one.
        batch: Images per pass.
        threads: CPU threads for PyTorch; None keeps their number.
        seconds: About how long to measure.
        calls: The least and the largest number of passes, timed one by one.
    """
    device = device_of(model)
    example = tuple(_repeated(x, batch).to(device) for x in inputs)
    fewest, most = calls
    with torch.inference_mode(), threads_limited(threads) as used:
        _run_for(lambda: model(*example), device, seconds / 5, "warming up", fewest=3, most=most)
        times = sorted(_run_for(lambda: model(*example), device, seconds, "timing", fewest=fewest, most=most))
    return Latency(
        p50=1e3 * _percentile(times, 0.50),
        p95=1e3 * _percentile(times, 0.95),
        batch=batch,
        threads=used,
        device=name_of(device),
        calls=len(times),
        p25=1e3 * _percentile(times, 0.25),
        p75=1e3 * _percentile(times, 0.75),
    )


def in_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time several things against each other, in turns, so that what disturbs disturbs all alike.

    Args:
        runs: What to call, by name.
        device: Where it runs: a GPU is waited for.
        rounds: How often each is timed.
        warm_up: Rounds before these, which do not count.

    Returns:
        Seconds of each call, by name, `rounds` of them.

    Examples:
        >>> import torch, prunekit as pk
        >>> x = torch.zeros(64, 64)
        >>> times = pk.in_turns({"exp": x.exp, "square": x.square}, x.device, rounds=3)
        >>> {name: len(seconds) for name, seconds in times.items()}
        {'exp': 3, 'square': 3}
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(rounds + warm_up):
            for name, run in runs.items():
                taken = seconds_of(run, device)
                if number >= warm_up:
                    times[name].append(taken)
    return times


def least_seconds(run: Callable[[], object], device: torch.device, *, rounds: int = 5, warm_up: int = 1) -> float:
    """Return the best of a few timings in seconds, since disturbances only ever add time."""
    return min(in_turns({"": run}, device, rounds=rounds, warm_up=warm_up)[""])


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call in seconds, including its work on a GPU."""
    synchronise(device)  # earlier work must not count
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


@contextmanager
def threads_limited(wanted: int | None) -> Iterator[int]:
    """Run with `wanted` CPU threads (None: as many as before); yield the number used."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _run_for(
    run: Callable[[], object], device: torch.device, seconds: float, what: str, *, fewest: int, most: int
) -> list[float]:
    """Return the seconds of each call, for at least `fewest` of them and about `seconds` in all."""
    times: list[float] = []
    start, count, shown = time.perf_counter(), counter(f"{what} (percent)"), 0
    while len(times) < fewest or (len(times) < most and time.perf_counter() < start + seconds):
        times.append(seconds_of(run, device))
        share = min(len(times) / fewest, (time.perf_counter() - start) / seconds)
        if int(100 * share) > shown:  # rarely: what is shown takes time as well
            shown = min(100, int(100 * share))
            count(shown, 100)
    count(100, 100)
    return times


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the sorted values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _repeated(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x[:1].expand(batch, *x.shape[1:]).contiguous()

"""Train in several processes and in one with the same global batch, and compare the weights.

    torchrun --nproc-per-node 2 benchmarks/two_processes.py

Without batch norm, and with batch norms synchronised, the two must agree to float tolerance. Otherwise each process
normalises by its own share of the batch, as is usual; the gap is printed. Then a run is interrupted by a signal to one
process alone, and resumed. Exits with 1 when anything that must hold does not.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from prunekit import EpochEvent, ImageSet, Interrupted, StepEvent, TrainConfig, open_data, train

PLAIN = TrainConfig(epochs=2, batch_size=64, lr=0.05, accumulate=2, log_every=5, device="cpu")
SPARSE = replace(PLAIN, sparsity=1e-3)
SYNCED = replace(SPARSE, sync_bn=True)


def network(*, norm: bool) -> nn.Module:
    """A small network in float64, with batch norm or without."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(8))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)).double()


@contextmanager
def alone() -> Iterator[None]:
    """Hide the other processes."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def gap(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two networks' tensors, relative to the largest value of each."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in pairs)


def spread(model: nn.Module) -> float:
    """The largest difference of a network's tensors between the processes."""
    flat = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    others: list[Tensor] = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return max(float((other - flat).abs().max()) for other in others)


def figures(events: list[object]) -> list[tuple[int, float, float]]:
    """Step, loss and accuracy of each report, to ten digits."""
    told = [e for e in events if isinstance(e, StepEvent | EpochEvent)]
    return [(e.step, round(e.loss, 10), round(e.accuracy, 10)) for e in told]


def resumes(train_set: ImageSet, *, first: bool) -> bool:
    """Stop a run by a signal to the first process alone, resume it, and compare it with one left alone."""
    with tempfile.TemporaryDirectory() as name:
        shared = [Path(name) / "run.state"]
        dist.broadcast_object_list(shared)
        whole, resumed = network(norm=True), network(norm=True)
        train(whole, SPARSE, train_set)

        def stop(event: object) -> None:
            if isinstance(event, StepEvent) and event.step == 10:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train(network(norm=True), SPARSE, train_set, state_path=shared[0], on_event=stop if first else None)
        except Interrupted:
            train(resumed, SPARSE, train_set, state_path=shared[0], resume=True)
        return gap(resumed, whole) < 1e-12


def main() -> int:
    """Run the comparisons; every process computes all of them, the first one prints."""
    torch.set_num_threads(1)
    train_set, val_set = open_data("digits", "train"), open_data("digits", "val")
    ours, theirs = network(norm=False), network(norm=False)
    normed, synced, lonely = (network(norm=True) for _ in range(3))
    ours_told: list[object] = []
    theirs_told: list[object] = []
    with alone():
        train(theirs, PLAIN, train_set, val_set, on_event=theirs_told.append)
        apart = train(lonely, SPARSE, train_set, val_set).accuracy
    train(ours, PLAIN, train_set, val_set, on_event=ours_told.append)  # joins the others by itself
    first, many = dist.get_rank() == 0, dist.get_world_size()
    together = train(normed, SPARSE, train_set, val_set).accuracy
    train(synced, SYNCED, train_set, val_set)
    checks = {
        f"without batch norm, {many} processes and one differ by {gap(ours, theirs):.1e}": gap(ours, theirs) < 1e-9,
        f"with synchronised batch norm they differ by {gap(synced, lonely):.1e}": gap(synced, lonely) < 1e-9,
        "the processes hold the same weights and statistics": max(map(spread, (ours, normed, synced))) == 0,
        "the metrics are those of one process": figures(ours_told) == (figures(theirs_told) if first else []),
        "a signal to one process stops all, and the run resumes": resumes(train_set, first=first),
    }
    if first:
        for what, holds in checks.items():
            print(f"{'yes' if holds else 'NO '}  {what}")
        print(
            f"     with batch norm of each its own: {gap(normed, lonely):.1e}, accuracy {together:.4f} and {apart:.4f}"
        )
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Interrupt a training run at random moments, resume it, and compare the weights with those of a run left alone.

    python benchmarks/interruptions.py --moments 20

Each moment stops a fresh process by SIGINT, SIGTERM or SIGKILL, in turn, and another one resumes it; some are stopped
again. The state is read after every stop: it must be whole. Exits with 1 when any weight differs by a bit.
Needs a POSIX system.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import prunekit as pk

CONFIG = pk.TrainConfig(
    batch_size=64, lr=0.05, warmup=1, sparsity=1e-3, ema=0.9, accumulate=2, save_every=5, device="cpu"
)


def network() -> nn.Module:
    """A small network with everything that has a state: batch norm, dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


def run(folder: Path, epochs: int) -> int:
    """Train from the state in `folder`, where there is one, to the end; the exit status of a command."""
    torch.set_num_threads(1)
    model, state, config = network(), folder / "run.state", replace(CONFIG, epochs=epochs)
    train_set, val_set = pk.open_data("digits", "train"), pk.open_data("digits", "val")
    try:
        pk.train(model, config, train_set, val_set, state_path=state, resume=state.exists())
    except pk.Interrupted as stop:
        return stop.exit_code
    torch.save(model.state_dict(), folder / "weights.pt")
    return 0


def start(folder: Path, epochs: int) -> int:
    """`run` in a forked process (nothing has started a thread here yet); its id.

    Ctrl-C ends it with 130 outside training as well, and is held back until it cannot unwind this program's own frames.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    status = 70
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status = run(folder, epochs)
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """Wait for the process; its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stop(folder: Path, epochs: int, number: signal.Signals, moment: float) -> str:
    """Start or resume the run in `folder`, stop it after `moment` seconds, and say where that left it."""
    child = start(folder, epochs)
    time.sleep(moment)
    os.kill(child, number)
    status = status_of(child)
    if status not in (0, 130, -number):
        raise SystemExit(f"stopped by {number.name}, the run ended with {status}")
    path = folder / "run.state"
    if not path.exists():
        return f"{moment:.2f} s (not begun)"
    state = pk.TrainState.load(path)
    return f"{moment:.2f} s (" + ("over" if status == 0 else f"epoch {state.epoch}, step {state.step}") + ")"


def main() -> int:
    """Compare `--moments` interrupted runs with one that was left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=0.8, help="share of a run, from its start, that moments lie in")
    options = parser.parse_args()
    torch.optim.SGD([torch.zeros(1)])  # torch's optimisers load its compiler at first: here, not in every child
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root, identical = Path(name), 0
        began = time.monotonic()
        expected = finished(root / "alone", options.epochs)
        whole = time.monotonic() - began
        for i in range(options.moments):
            folder, number = root / str(i), (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[i % 3]
            folder.mkdir()
            moments = [draw.uniform(0, options.within * whole) for _ in range(draw.choice((1, 1, 2)))]
            told = " and ".join(stop(folder, options.epochs, number, moment) for moment in moments)
            weights = finished(folder, options.epochs)
            equal = all(torch.equal(weights[key], value) for key, value in expected.items())
            identical += equal
            print(f"{number.name:8} at {told}: {'identical' if equal else 'DIFFERENT'}", flush=True)
    print(f"{identical} of {options.moments} interrupted runs ended with identical weights")
    return 0 if identical == options.moments else 1


def finished(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Bring the run in `folder` to its end and return the weights."""
    folder.mkdir(exist_ok=True)
    if status_of(start(folder, epochs)) != 0:
        raise SystemExit("a run that nobody interrupted failed")
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


if __name__ == "__main__":
    sys.exit(main())

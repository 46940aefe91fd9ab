"""A network of your own, from training to an ONNX file: train it, merge it, tune it, export it.

Run it with `python examples/prune_your_own.py [FOLDER]`; it uses the bundled digits and takes less than a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import prunekit as pk


class Net(nn.Module):
    """Any network will do: nothing in it knows of prunekit."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 1, 8, 8)` to logits `(N, 10)`."""
        return self.head(self.features(x).mean((2, 3)))


def main(folder: Path) -> None:
    """Each step prints what it is worth."""
    torch.manual_seed(0)
    data, validation, test = (pk.open_data("digits", part) for part in ("train", "val", "test"))
    model, x = Net().eval(), torch.zeros(1, 1, 8, 8)

    pk.train(model, pk.TrainConfig(epochs=10, batch_size=64), data, validation)
    report("trained", model, test)

    small, _ = pk.merge(model, x, ratio=0.5, images=next(data.batches(500))[0])
    report("half of the channels merged", small, test)

    pk.train(small, pk.TrainConfig(epochs=10, batch_size=64, lr=0.05), data, validation)
    report("and tuned", small, test)

    done = pk.export(small, folder / "small.pt2", x, images=test.batches(256), force=True)
    print(f"{folder / 'small.pt2'}: outputs equal to {done.parity.difference:.0e} on {done.parity.images} images")


def report(what: str, model: nn.Module, images: pk.ImageSet) -> None:
    """One line of figures."""
    found = pk.evaluate(model, images)
    print(f"{what}: {found.accuracy:.2%}, loss {found.loss:.3f}, {found.params:,} parameters, {found.macs:,} MACs")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

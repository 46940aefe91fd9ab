"""Training images a second: prunekit's loop beside a plain PyTorch DataLoader loop, on the same network and images.

    python benchmarks/throughput.py --arch resnet20_cifar --device cpu

Both train on 32×32 colour images of ten classes with the CIFAR recipe (crop, flip, SGD with Nesterov momentum). The
plain loop is the usual one: pictures, torchvision transforms, worker processes, float32; prunekit runs with what it
offers, on a GPU bf16. Repetitions alternate; the median counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from prunekit import ImageSet, InputSpec, TrainConfig, models, open_data, train

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class PictureDataset(Dataset[tuple[Tensor, int]]):
    """Pictures and labels with the usual transforms, as torchvision's CIFAR10 gives them."""

    def __init__(self, data: ImageSet) -> None:
        assert isinstance(data.images, Tensor)
        self.pictures = [Image.fromarray(x) for x in data.images.permute(0, 2, 3, 1).contiguous().numpy()]
        self.labels = data.labels.tolist()
        self.transform = v2.Compose([
            v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[i]), self.labels[i]


def plain(model: nn.Module, data: PictureDataset, batch: int, device: str, workers: int) -> float:
    """Seconds of one epoch of the plain loop, the workers started before."""
    gpu = device.startswith("cuda")
    loader = DataLoader(
        data, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=gpu, persistent_workers=workers > 0
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model.to(device).train()
    for timed in (False, True):
        began = time.perf_counter()
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if not timed:
                break
        if gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - began


def ours(model: nn.Module, data: ImageSet, batch: int, device: str) -> float:
    """Seconds of one epoch of `train`, after another that warms up."""
    precision = "bf16" if device.startswith("cuda") else "off"
    config = TrainConfig(epochs=2, batch_size=batch, device=device, precision=precision, log_every=50, augment="cifar")
    return train(model, config, data).history[-1].seconds


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet20_cifar")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="a folder of CIFAR-10 (default: noise of the same shape)")
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    data = open_data(options.data, "train").sample(options.images) if options.data else noise(options.images)
    pictures = PictureDataset(data)
    seconds: dict[str, list[float]] = {"plain DataLoader loop": [], "prunekit": []}
    for _ in range(options.repeat):
        fresh = models.build(options.arch), models.build(options.arch)
        arguments = options.batch_size, options.device
        seconds["plain DataLoader loop"].append(plain(fresh[0], pictures, *arguments, options.workers))
        seconds["prunekit"].append(ours(fresh[1], data, *arguments))
    images = options.images // options.batch_size * options.batch_size
    rates = {name: images / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:22} {rate:10.0f} images/s  ({options.arch}, {options.device}, batch {options.batch_size})")
    print(f"ratio                  {rates['prunekit'] / rates['plain DataLoader loop']:10.2f}")


def noise(count: int) -> ImageSet:
    """Random images of CIFAR-10's shape."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, count))
    return ImageSet("noise", "train", images, labels, tuple("0123456789"), InputSpec((3, 32, 32), MEAN, STD))


if __name__ == "__main__":
    main()

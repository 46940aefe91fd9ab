"""Restoring networks that read no images: sounds, volumes, and several inputs at once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

import prunekit as pk
from commands import Capture, document
from prunekit.restoration import synthetic
from prunekit.restoration.dead_leaves import dead_leaves
from prunekit.restoration.images import Inputs, gather

CONVS: dict[int, Any] = {1: nn.Conv1d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}
POOLS: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool3d}
SHAPES = {1: (2, 40), 3: (2, 4, 8, 8)}


def settled(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """In evaluation mode, with batch norms that hold the statistics of `inputs`."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.momentum = None
        model.train()(*inputs)
    return model.eval()


def layer(axes: int, inputs: int, outputs: int) -> list[nn.Module]:
    return [CONVS[axes](inputs, outputs, 3, padding=1), NORMS[axes](outputs), nn.ReLU()]


def network(axes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(axes)
    x = dead_leaves(48, SHAPES[axes], torch.Generator().manual_seed(5))
    body = [*layer(axes, 2, 12), *layer(axes, 12, 16), *layer(axes, 16, 16)]
    return settled(nn.Sequential(*body, POOLS[axes](1), nn.Flatten(), nn.Linear(16, 4)), x), x


class Clips(pk.Classification):
    """Volumes that are brighter, or darker."""

    def examples(self, split: str) -> Any:
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(40) % 2
        noise = torch.randn(40, *SHAPES[3], generator=generator)
        return TensorDataset(noise + labels[:, None, None, None, None], labels)


def test_networks_of_volumes_are_trained_and_measured() -> None:
    task, model = Clips(), nn.Sequential(*layer(3, 2, 6), POOLS[3](1), nn.Flatten(), nn.Linear(6, 2))
    pk.train(model, pk.TrainConfig(epochs=4, batch_size=10, lr=0.05, device="cpu"), task.open("train"))
    found = pk.evaluate(model, task.open("test"), latency=True)
    assert found.accuracy is not None
    assert found.accuracy > 0.8


class Two(nn.Module):
    """Reads a sound `(N, 1, 32)` and figures `(N, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Sequential(*layer(1, 1, 8), *layer(1, 8, 12), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.figures = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Linear(24, 3)

    def forward(self, sound: Tensor, figures: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.sound(sound), self.figures(figures)], 1))
        return out


def two() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs = torch.randn(64, 1, 32).cumsum(2) / 4, torch.randn(64, 6)
    return settled(Two(), *inputs), inputs


def error(model: nn.Module, small: nn.Module, *inputs: Tensor) -> float:
    """Squared error of the outputs, as a share of their variance."""
    with torch.no_grad():
        was, now = model(*inputs), small(*inputs)
    return float((now - was).square().mean() / was.var(0).mean())


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("way", ["moments", "synthetic", "calibrate"])
def test_sounds_and_volumes_are_restored(axes: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "COUNT", 64)
    model, x = network(axes)
    plainly = pk.merge(model, x[:1], ratio=0.4, restore="none").model
    given: Any = {"images": x[::2]} if way == "calibrate" else {}
    small = pk.merge(model, x[:1], ratio=0.4, restore=way, **given).model
    assert error(model, small, x[1::2]) < 0.4 * error(model, plainly, x[1::2])


@pytest.mark.parametrize("method", ["merge", "slim"])
@pytest.mark.parametrize("form", ["one batch", "batches"])
def test_networks_with_two_inputs_are_restored(method: str, form: str) -> None:
    model, inputs = two()
    x = tuple(one[:1] for one in inputs)
    plainly = pk.prune(method, model, x, ratio=0.4, restore="none").model
    images: Any = tuple(one[::2] for one in inputs)
    if form == "batches":
        images = list(zip(*(one.split(7) for one in images), strict=True))
    done = pk.prune(method, model, x, ratio=0.4, restore="calibrate", images=images)
    assert done.plan.notes["calibration"]["images"] == 32
    held_out = tuple(one[1::2] for one in inputs)
    assert error(model, done.model, *held_out) < 0.4 * error(model, plainly, *held_out)


def test_all_that_reads_images_reads_two_inputs() -> None:
    model, inputs = two()
    x = tuple(one[:1] for one in inputs)
    plan = pk.Plan([pk.Keep("sound.0", range(4))])
    again = pk.apply(model, pk.restore(model, plan, x, images=inputs), x)
    assert error(model, again, *inputs) < error(model, pk.apply(model, plan, x), *inputs)
    done = pk.merge(model, x, ratio=0.4, images=inputs, widths="measured", refit_bn=True)
    assert done.plan.notes["widths"] == "measured"
    assert done.plan.notes["refit_bn"] == 2


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (lambda a, b: (a, b[:, :5]), r"have shape \(1, 32\) and \(5,\); the network reads \(1, 32\) and \(6,\)"),
        (lambda a, b: (a, b[:9]), "as many of each"),
        (lambda a, _: (a,), r"have shape \(1, 32\); the network reads"),
        (lambda a, _: a, r"have shape \(1, 32\); the network reads"),
        (lambda a, _: [(a, "b")], "and a str; the network reads"),
        (lambda a, b: (a, b / 0), "not finite"),
        (lambda _a, _b: [], "there are no calibration images"),
    ],
)
def test_inputs_that_do_not_fit(images: Callable[[Tensor, Tensor], Any], said: str) -> None:
    model, inputs = two()
    with pytest.raises(pk.InputError, match=said):
        pk.merge(model, tuple(one[:1] for one in inputs), ratio=0.4, images=images(*inputs))


def test_few_views_are_of_images_alone() -> None:
    model, x = network(1)
    with pytest.raises(pk.InputError, match="views are made of images"):
        pk.merge(model, x[:1], ratio=0.4, restore="few", images=x[:4])


def test_integers_stay_integers() -> None:
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first, self.last = nn.Embedding(9, 6), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, word: Tensor, figures: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(torch.cat([self.words(word), figures], 1))))
            return out

    model, words = Words().eval(), torch.randint(9, (40,))
    x = words[:1], torch.zeros(1, 2)
    graph = pk.inspect(model, x).graph
    found = gather((words, torch.randn(40, 2).double()), model, graph, most=12)
    assert isinstance(found, Inputs)
    assert [(part.dtype, len(part)) for part in found.parts] == [(torch.int64, 12), (torch.float32, 12)]
    small = pk.merge(model, x, ratio=0.5, images=(words, torch.randn(40, 2))).model
    assert small.first.out_features == 8


@pytest.mark.parametrize("shape", [(2, 64), (2, 6, 12, 12)])
def test_made_sounds_and_volumes_are_smooth_along_every_axis(shape: tuple[int, ...]) -> None:
    made = dead_leaves(60, shape, torch.Generator().manual_seed(0))
    assert made.shape == (60, *shape)
    torch.testing.assert_close(made.transpose(0, 1).flatten(1).mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.transpose(0, 1).flatten(1).var(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    for axis in range(2, made.dim()):
        size = made.size(axis)
        near = (made.narrow(axis, 0, size - 1) * made.narrow(axis, 1, size - 1)).mean()
        far = (made.narrow(axis, 0, 1) * made.narrow(axis, size - 1, 1)).mean()
        assert near > 0.5
        assert far < near - 0.1


FILE = """
    import torch
    from torch import nn
    import prunekit as pk

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.next = nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3)
            self.figures, self.head = nn.Linear(3, 8), nn.Linear(16, 2)
        def forward(self, sound, figures):
            sound = torch.relu(self.next(torch.relu(self.norm(self.conv(sound))))).mean(2)
            return self.head(torch.cat([sound, torch.relu(self.figures(figures))], 1))

    class Both(pk.Task):
        score, higher_is_better = "error", False
        def examples(self, split):
            generator = torch.Generator().manual_seed(len(split))
            sound, figures = torch.randn(60, 1, 24, generator=generator), torch.randn(60, 3, generator=generator)
            return [((s, f), torch.stack([s.mean(), f.sum()])) for s, f in zip(sound, figures)]
        def loss(self, model, batch):
            return (model(*batch[0]) - batch[1]).square().mean()
        def scores(self, model, batches):
            return {"error": sum(float(self.loss(model, batch)) for batch in batches)}
        def inputs(self, batch):
            return tuple(batch[0])
"""


def test_commands_restore_a_task_with_two_inputs(tmp_path: Path, capsys: Capture) -> None:
    code, model = tmp_path / "both.py", tmp_path / "both.pt"
    code.write_text(textwrap.dedent(FILE), encoding="utf-8")
    task = ["--arch", f"{code}:Net", "--task", f"{code}:Both"]
    tuning = ["--batch-size", "20", "--lr", "0.01", "--device", "cpu"]
    document(capsys, "train", *task, "--epochs", "1", "-o", model, *tuning)
    merged = document(capsys, "merge", model, *task, "--ratio", "0.3", "-o", tmp_path / "m.pt")
    assert merged["plan"]["notes"]["calibration"]["images"] == 60
    slimmed = document(
        capsys, "slim", model, *task, "--ratio", "0.3", "--epochs", "1", "-o", tmp_path / "s.pt", *tuning
    )
    assert slimmed["passes"][0]["plan"]["notes"]["restore"] == "calibrate"

"""Semantic segmentation: masks that go with their images, the loss, the score, and commands on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.data.masks import MaskedImages, masked_folder

Capture = pytest.CaptureFixture[str]
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=3):
        super().__init__(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, classes, 1))
"""


def draw(folder: Path, count: int, seed: int, size: int = 16) -> None:
    """Boxes of class 1, red, and of class 2, green, on black."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        pixels, mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
        for kind in (1, 2):
            top, left = generator.integers(0, size - 6, 2)
            pixels[top : top + 6, left : left + 6] = [200, 0, 0] if kind == 1 else [0, 200, 0]
            mask[top : top + 6, left : left + 6] = kind
        mask[0] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    draw(root / "train", 40, 0)
    draw(root / "test", 12, 1)
    (root / "net.py").write_text(NET, encoding="utf-8")
    return root


def scores(*masks: Tensor, classes: int = 3) -> tuple[nn.Module, list[Any]]:
    """A network that gives certain answers, and the batches that it gives them to."""
    return nn.Identity(), [(torch.nn.functional.one_hot(m, classes).movedim(-1, 1).float() * 20, m) for m in masks]


def test_mean_iou_is_that_of_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    named = torch.randint(4, (6, 9, 9), generator=generator)
    truth = torch.where(torch.rand(6, 9, 9, generator=generator) < 0.6, named, 3 - named)
    truth[truth == 3] = 0  # a class that is predicted, and nowhere in the masks
    truth[:, 0] = 255
    _, batches = scores(named[:4], named[4:], classes=5)
    found = pk.Segmentation().scores(
        nn.Identity(), iter([(x, t) for (x, _), t in zip(batches, (truth[:4], truth[4:]), strict=True)])
    )
    ious = []
    seen = [(int(t), int(n)) for t, n in zip(truth.flatten(), named.flatten(), strict=True) if t != 255]
    for kind in range(4):
        both, either = sum(t == n == kind for t, n in seen), sum(kind in (t, n) for t, n in seen)
        ious.append(both / either)
    assert found["mean IoU"] == pytest.approx(sum(ious) / 4)
    assert found["pixel accuracy"] == pytest.approx(sum(t == n for t, n in seen) / len(seen))


def test_the_loss_knows_no_ignored_pixel() -> None:
    task, output = pk.Segmentation(), torch.randn(2, 3, 8, 8, requires_grad=True)
    masks = torch.randint(3, (2, 8, 8))
    masks[:, :3] = 255
    (slope,) = torch.autograd.grad(task.loss(nn.Identity(), (output, masks)), output)
    assert bool((slope[:, :, :3] == 0).all())
    assert bool((slope[:, :, 3:] != 0).all())
    perfect, batches = scores(masks.where(masks != 255, 0))
    assert float(task.loss(perfect, batches[0])) < 0.01
    plain = pk.Segmentation(dice=0.0).loss(nn.Identity(), (output.detach(), masks))
    assert float(plain) == pytest.approx(float(task.losses(output.detach(), (None, masks)).mean()), rel=1e-5)


def test_images_and_masks_move_alike() -> None:
    masks = torch.randint(3, (20, 16, 16)).to(torch.uint8)
    spec = pk.InputSpec((1, 16, 16), (0.0,), (1.0,))
    data = MaskedImages("made", "train", (100 * masks + 20)[:, None].clamp(max=255), masks, spec)
    for name in ("shift", "cifar", "none", "auto"):
        images, moved = next(iter(data.views(20, torch.arange(20), seed=(0, 1), augment=name)))
        pixels = (255 * images[:, 0]).round().long()
        outside = moved == 255
        assert torch.equal(pixels[~outside], 100 * moved[~outside] + 20)
        assert bool((pixels[outside] == 0).all())
        assert outside.any() == (name != "none")
    with pytest.raises(pk.InputError, match="resizes"):
        next(iter(data.views(20, torch.arange(20), seed=(0, 1), augment="imagenet")))


def test_a_folder_is_read_and_resized(scenes: Path) -> None:
    train, val, test = (masked_folder(scenes, split, None) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (36, 4, 12)
    assert val.held_out
    assert not test.held_out
    assert train.input_spec.shape == (3, 16, 16)
    assert set(test.masks.unique().tolist()) <= {0, 1, 2, 255}
    large = masked_folder(scenes, "test", pk.InputSpec((3, 32, 24)))
    assert large.images.shape == (12, 3, 32, 24)
    red, inner = large.images[:, 0] > 100, large.masks == 1
    known = large.masks != 255
    assert float((red == inner)[known].float().mean()) > 0.95  # but for the edges, which images blend


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "test/masks/3.png").unlink(), "3.png has no mask"),
        (lambda f: Image.new("L", (4, 4)).save(f / "test/masks/0.png"), "and its mask"),
        (lambda f: Image.new("RGB", (16, 16)).save(f / "test/masks/0.png"), "expected one byte for each pixel"),
        (
            lambda f: Image.new("L", (16, 16), 7).save(f / "test/masks/0.png"),
            "the class 7, and the network knows 0 to 2",
        ),
        (lambda f: (f / "test/images").rename(f / "test/pictures"), "there is no folder"),
    ],
)
def test_folders_that_cannot_be_used(spoil: Any, said: str, tmp_path: Path, capsys: Capture) -> None:
    draw(tmp_path / "test", 5, 0)
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    task = ["--task", "segmentation", "--data", str(tmp_path)]
    spoil(tmp_path)
    torch.manual_seed(0)
    assert run(["train", "--arch", f"{tmp_path}/net.py:Net", *task, "-o", str(tmp_path / "a.pt")]) == 2
    pk.save(pk.models.build(f"{tmp_path}/net.py:Net", {}), tmp_path / "net.pt")
    capsys.readouterr()
    assert run(["eval", str(tmp_path / "net.pt"), "--arch", f"{tmp_path}/net.py:Net", *task]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_commands_on_segmentation(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    task = ["--arch", f"{scenes}/net.py:Net", "--task", "segmentation", "--data", str(scenes)]
    tuning = ["--batch-size", "6", "--device", "cpu"]

    def document(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        status = run([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        found: dict[str, Any] = json.loads(captured.out)
        schemas.check(found)
        return found

    net, small, gated = (tmp_path / name for name in ("net.pt", "small.pt", "gated.pt"))
    trained = document("train", *task, "--epochs", 6, "--lr", 0.1, "-o", net, *tuning)
    assert trained["metric"]["name"] == "mean IoU"
    assert trained["accuracy"] is None
    before = document("eval", net, *task, "--no-latency")
    assert before["score"] > 0.7
    slimmed = document("slim", net, *task, "--ratio", 0.3, "--epochs", 1, "-o", small, *tuning)
    assert slimmed["before"]["score"] == before["score"]
    assert slimmed["after"]["score"] > 0.6
    swept = document(
        "sweep", net, *task, "--ratios", 0.3, "--methods", "merge", "--no-latency", "-o", tmp_path / "s.json"
    )
    assert [point["result"]["metric"]["name"] for point in swept["points"]] == ["mean IoU"]
    looked = document("inspect", net, *task, "--sensitivity", "--ratios", 0.5)
    assert looked["sensitivity"]["score"] == before["score"]
    assert all(len(group["score"]) == 1 for group in looked["sensitivity"]["groups"])
    gates = document("manidp", "train", net, *task, "--epochs", 1, "-o", gated, *tuning)
    assert gates["baseline_accuracy"] is None
    assert gates["baseline_score"] > 0.7
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    files = ["--html", str(page), "--picture", str(picture)]
    assert run(["compare", str(net), str(small), *task, "--no-latency", *files]) == 0
    assert "mean IoU" in capsys.readouterr().out
    assert "Mean IoU against MACs" in page.read_text(encoding="utf-8")
    assert run(["eval", str(net), *task, "--no-latency", "--min-score", "1.01"]) == 1
    assert "a worse mean IoU than the 101.00 % asked for" in " ".join(capsys.readouterr().err.split())

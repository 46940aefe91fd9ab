"""Data sets: what is read, how it is prepared, and what is said about bad data."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunekit.data import augmentation, check_classes, check_input, names, open_data, seeded
from prunekit.data import shapes as shapes_module
from prunekit.data.prepare import prepare
from prunekit.data.splits import every, held_out
from prunekit.errors import InputError
from prunekit.spec import InputSpec

RED, GREEN = (255, 0, 0), (0, 255, 0)


def write_picture(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """train/ with 20 red and 20 green pictures, test/ with 3 of each."""
    for split, count in (("train", 20), ("test", 3)):
        for name, colour in (("red", RED), ("green", GREEN)):
            for i in range(count):
                write_picture(tmp_path / split / name / f"{i:02}.png", colour)
    return tmp_path


def test_digits_are_whole_and_their_splits_apart() -> None:
    splits = {split: open_data("digits", split) for split in ("train", "val", "test")}
    assert {split: len(data) for split, data in splits.items()} == {"train": 1264, "val": 178, "test": 355}
    everything = torch.cat([torch.as_tensor(data.images) for data in splits.values()])
    assert everything.shape == (1797, 1, 8, 8)
    assert everything.dtype == torch.uint8
    assert everything.max() == 255
    for data in splits.values():
        share = data.labels.bincount() / len(data)
        assert data.classes == tuple("0123456789")
        assert (share - 0.1).abs().max() < 0.01
    train = splits["train"].normalise(splits["train"].images)  # type: ignore[arg-type]
    assert abs(train.mean()) < 1e-3
    assert abs(train.std() - 1) < 1e-3


def test_digits_take_the_shape_that_the_network_asks_for() -> None:
    data = open_data("digits", "val", input_spec=InputSpec((3, 32, 32)))
    assert data.images.shape == (178, 3, 32, 32)
    assert data.input_spec.mean == (0.3051,) * 3


def test_a_folder_gives_its_classes_in_order(pictures: Path) -> None:
    data = open_data(pictures, "test")
    assert data.classes == ("green", "red")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images[0, :, 5, 5].tolist() == list(GREEN)  # type: ignore[index]
    assert data.input_spec == InputSpec((3, 32, 32), *shapes_module.CIFAR10)
    assert data.augment == "cifar"


def test_validation_is_held_out_of_training(pictures: Path) -> None:
    train, val = open_data(pictures, "train"), open_data(pictures, "val")
    assert (len(train), len(val)) == (36, 4)
    for name in ("red", "green"):
        write_picture(pictures / "val" / name / "0.png")
    train, val = open_data(pictures, "train"), open_data(pictures, "val")
    assert (len(train), len(val)) == (40, 2)


def test_a_folder_may_hold_the_classes_directly(pictures: Path) -> None:
    assert [len(open_data(pictures / "train", split)) for split in ("train", "val", "test")] == [36, 4, 40]


def test_val_serves_as_test(pictures: Path) -> None:
    (pictures / "test").rename(pictures / "val")
    assert len(open_data(pictures, "test")) == 6


def test_a_few_of_many_pictures_are_read_alone(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, opened, real = open_data(pictures, "train"), Counter[str](), Image.open

    def counting(file: BinaryIO) -> Image.Image:
        opened[file.name] += 1
        return real(file)

    few = open_data(pictures, "train", lazy=True).sample(5, seed=1)
    monkeypatch.setattr(Image, "open", counting)
    assert torch.equal(few.inputs(), whole.sample(5, seed=1).inputs())
    assert list(opened.values()) == [1] * 5


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=60, max_size=200))
def test_held_out_and_kept_cover_everything_once(labels: list[int]) -> None:
    given_labels = torch.tensor(labels)
    kept, held = held_out(given_labels, "train", name="x"), held_out(given_labels, "val", name="x")
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    counts = given_labels.bincount(minlength=5)
    assert (given_labels[held].bincount(minlength=5) == counts // 10).all()
    assert len(every(given_labels, frozenset(range(10)))) == len(labels)


def test_normalised_batches_are_those_of_torchvision(pictures: Path) -> None:
    from torchvision.transforms.v2 import functional as V

    data = open_data(pictures, "test")
    images, labels = next(data.batches(4))
    reference = V.normalize(
        V.to_dtype(data.images[:4], torch.float32, scale=True),  # type: ignore[index]
        list(data.input_spec.mean),
        list(data.input_spec.std),
    )
    assert torch.equal(images, reference)
    assert labels.tolist() == [0, 0, 0, 1]
    assert [len(y) for _, y in data.batches(4)] == [4, 2]


def test_batches_follow_order_dtype_and_layout(pictures: Path) -> None:
    data = open_data(pictures, "test")
    images, labels = next(data.batches(2, order=torch.tensor([5, 0]), dtype=torch.float64, channels_last=True))
    assert images.dtype == torch.float64
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [1, 0]


def test_pictures_of_other_sizes_and_colours_are_prepared() -> None:
    deep = Image.fromarray(np.full((40, 40), 65535 // 2, dtype=np.uint16))
    assert abs(int(prepare(deep, (1, 20, 20))[0, 3, 3]) - 127) <= 1
    assert prepare(Image.new("P", (9, 5)), (3, 4, 4)).shape == (3, 4, 4)
    assert prepare(Image.new("RGBA", (300, 500)), (1, 224, 224)).shape == (1, 224, 224)
    assert prepare(Image.new("CMYK", (10, 1000)), (3, 8, 8)).shape == (3, 8, 8)


def test_photographs_are_prepared_as_torchvision_does() -> None:
    from torchvision.transforms import v2

    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    for size in ((400, 512, 3), (256, 340, 3), (300, 257, 3)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8))
        assert torch.equal(torch.from_numpy(prepare(picture, (3, 224, 224))), usual(picture)), size


@pytest.mark.parametrize("name", ["shift", "cifar", "imagenet"])
def test_a_row_of_draws_gives_one_view_in_any_batch(name: str) -> None:
    augment = augmentation(name)
    images = torch.randint(0, 256, (16, 3, 12, 10), dtype=torch.uint8, generator=seeded(1))
    draws = augment.draws(16, seeded(2))
    views = augment.view(images, draws)
    assert views.shape == images.shape
    assert views.dtype == torch.uint8
    alone = torch.cat([augment.view(images[i : i + 1], draws[i : i + 1]) for i in range(16)])
    assert torch.equal(views, alone)
    assert not torch.equal(views, images)


def test_shift_cuts_the_padded_image_and_the_extremes_are_reached() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    draws = torch.tensor([[0.0, 0.999, 0.9]])
    view = augmentation("cifar").view(image, draws)
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[1:, :7] = image[0, 0, :7, 1:]
    assert torch.equal(view[0, 0], expected)
    mirrored = augmentation("cifar").view(image, torch.tensor([[0.5, 0.5, 0.1]]))
    assert torch.equal(mirrored, image.flip(-1))


def test_crop_of_everything_is_the_image() -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=seeded(3))
    view = augmentation("imagenet").view(image, torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.9]]))
    assert torch.equal(view, image)


def test_training_on_large_pictures_reads_them_lazily(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(10):
            write_picture(tmp_path / "train" / name / f"{i}.jpg", (10 * i, 0, 0), (90 + i, 80))
    spec = InputSpec((3, 72, 72))
    data = open_data(tmp_path, "train", input_spec=spec)
    assert not data.in_memory
    assert data.augment == "imagenet"
    assert not isinstance(data.images, torch.Tensor)
    assert data.images[torch.tensor([3, 0])].shape == (2, 3, 72, 72)
    augment = augmentation("imagenet")
    draws = augment.draws(len(data), seeded(0))
    order = torch.randperm(len(data), generator=seeded(1))
    first = list(data.batches(3, order=order, augment=augment, draws=draws))
    assert sum(len(labels) for _, labels in first) == len(data) == 18
    whole, labels = next(data.batches(18, order=order, augment=augment, draws=draws))
    assert torch.equal(torch.cat([images for images, _ in first]), whole)
    assert torch.equal(labels, data.labels[order])
    assert len(data.subset([1, 2])) == 2
    stopped = data.batches(2)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]


def test_images_that_do_not_fit_in_memory_give_the_same_batches(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = open_data(pictures, "train")
    monkeypatch.setattr("prunekit.data.pictures.fits_in_memory", lambda *_: False)
    lazy = open_data(pictures, "train")
    assert held.in_memory
    assert not lazy.in_memory
    augment = augmentation("cifar")
    draws = augment.draws(len(held), seeded(0))
    kinds = (data.batches(7, augment=augment, draws=draws) for data in (held, lazy))
    for (x, y), (u, v) in zip(*kinds, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_sample_and_subset_keep_images_with_their_labels(pictures: Path) -> None:
    data = open_data(pictures, "train")
    few = data.sample(10, seed=3)
    assert len(few) == 10
    assert isinstance(few.images, torch.Tensor)
    assert torch.equal(few.images[:, 0, 0, 0] == 255, few.labels == 1)
    assert torch.equal(few.labels, data.sample(10, seed=3).labels)
    assert len(data.sample(1000)) == len(data)


def fake_mnist(root: Path, count: int = 40) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 2
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.tobytes())


@pytest.mark.parametrize("name", ["fashionmnist", "Fashion-MNIST", "torchvision:FashionMNIST"])
def test_a_torchvision_set_by_name(tmp_path: Path, name: str) -> None:
    fake_mnist(tmp_path)
    test = open_data(name, "test", root=tmp_path)
    assert test.images.shape == (40, 1, 28, 28)
    assert test.classes[:2] == ("T-shirt/top", "Trouser")
    assert test.input_spec.mean == (0.2860,)
    assert len(open_data(name, "train", root=tmp_path)) == 36
    assert len(open_data(name, "val", root=tmp_path)) == 4


def test_a_torchvision_set_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Imagenette:
        classes = (("tench",), ("church",))

        def __init__(self, root: str, split: str, download: bool) -> None:
            print("downloading", root, split, download)
            self._samples = [(f"{i}.png", i % 2) for i in range(4)]

        def __len__(self) -> int:
            return len(self._samples)

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (300, 260), RED), i % 2

    monkeypatch.setattr(datasets, "Imagenette", Imagenette)
    data = open_data("imagenette", "test", root=tmp_path, input_spec=InputSpec((3, 70, 70)))
    assert data.images.shape == (4, 3, 70, 70)
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.input_spec.mean == shapes_module.IMAGENET[0]


def test_downloads_keep_stdout_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    def noisy(*_: object, **__: object) -> None:
        print("downloading")
        raise RuntimeError("Dataset not found or corrupted.\nmore")

    monkeypatch.setattr(datasets, "CIFAR10", noisy)
    with pytest.raises(InputError, match=r"cifar10 cannot be read from .*Dataset not found"):
        open_data("cifar10", "test", root=tmp_path)
    assert capsys.readouterr().out == ""


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="cifar10"):
        open_data("cifr10", "test")
    with pytest.raises(InputError, match="split"):
        open_data("digits", "training")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shift"):
        augmentation("shifty")
    assert "fashionmnist" in names()


def test_a_named_set_needs_a_root() -> None:
    with pytest.raises(InputError, match="--data-root"):
        open_data("cifar10", "test")


def test_places_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_data(tmp_path / "missing", "test")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_data(tmp_path / "file", "test")
    with pytest.raises(InputError, match="no sub-folders"):
        open_data(tmp_path, "test")


def test_folders_without_enough_in_them(pictures: Path) -> None:
    (pictures / "val" / "only").mkdir(parents=True)
    with pytest.raises(InputError, match="only one class, only/"):
        open_data(pictures, "val")
    (pictures / "val" / "red").mkdir()
    with pytest.raises(InputError, match="classes that train/ does not: only"):
        open_data(pictures, "val")
    (pictures / "val" / "only").rename(pictures / "val" / "green")
    with pytest.raises(InputError, match="no images under"):
        open_data(pictures, "val")
    write_picture(pictures / "val" / "red" / "0.png")
    with pytest.raises(InputError, match="of one class, red"):
        open_data(pictures, "val")
    (pictures / "train").rename(pictures / "other")
    with pytest.raises(InputError, match="no train/"):
        open_data(pictures, "train")


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_picture(tmp_path / "train" / name / "0.png")
    with pytest.raises(InputError, match="fewer than ten images"):
        open_data(tmp_path, "val")


DAMAGE = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda _: b"not a picture at all",
    "garbled": lambda data: data[:40] + bytes(60) + data[100:],
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_an_unreadable_image_is_named_or_skipped(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    for name in ("a", "b"):
        for i in range(12):
            path = tmp_path / "train" / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(path)
    bad = tmp_path / "train" / "a" / "05.png"
    bad.write_bytes(DAMAGE[damage](bad.read_bytes()))
    with pytest.raises(InputError, match=r"a/05\.png cannot be read") as caught:
        open_data(tmp_path, "train")
    assert len(str(caught.value).splitlines()) == 2
    data = open_data(tmp_path, "train", skip_bad=True)
    assert data.skipped == (str(bad),)
    assert len(data) == len(data.images) == 21


def test_bad_files_are_skipped_in_lazy_sets_too(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.data.pictures.fits_in_memory", lambda *_: False)
    bad = pictures / "train" / "green" / "03.png"
    bad.write_bytes(b"")
    with pytest.raises(InputError, match=r"03\.png"):
        list(open_data(pictures, "train").batches(8))
    data = open_data(pictures, "train", skip_bad=True)
    assert data.skipped == (str(bad),)
    assert sum(len(labels) for _, labels in data.batches(8)) == len(data) == 35


def test_nothing_readable_at_all(pictures: Path) -> None:
    for path in pictures.glob("test/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 6 pictures"):
        open_data(pictures, "test", skip_bad=True)


def test_classes_and_shape_must_fit_the_network(pictures: Path) -> None:
    data = open_data(pictures, "test")
    check_classes(2, data)
    check_input((3, 32, 32), data)
    with pytest.raises(InputError, match="2 classes, labels 0 to 1, but the classifier has 10 outputs"):
        check_classes(10, data)
    with pytest.raises(InputError, match=r"\(3, 32, 32\), the network reads \(1, 28, 28\)"):
        check_input((1, 28, 28), data)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (InputSpec((32, 32)), "cannot be read as input"),
        (InputSpec((2, 32, 32)), "1 or 3 channels"),
        (InputSpec((3, 8, 8), (0.1, 0.2)), "mean has 2 entries"),
        (InputSpec((1, 8, 8), (0.1,), (0.0,)), "must be positive"),
    ],
)
def test_impossible_inputs(spec: InputSpec, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_data("digits", "test", input_spec=spec)

"""Accuracy, cost and latency: right figures, a model left as it was, and data that does not fit refused."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekit.data import ImageSet
from prunekit.errors import InputError
from prunekit.evaluation.latency import in_turns, measure_latency
from prunekit.evaluation.score import evaluate, scored
from prunekit.spec import InputSpec, Origin, remember

SPEC = InputSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def images(count: int = 50, classes: int = 7) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, *SPEC.shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return ImageSet("noise", "test", pixels, labels, tuple(f"c{i}" for i in range(classes)), SPEC)


def network(classes: int = 7) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, classes))


def test_the_figures_are_those_of_a_plain_loop() -> None:
    model, data = network().eval(), images()
    result = evaluate(model, data, batch_size=16)
    with torch.no_grad():
        logits = model(data.normalise(data.images))  # type: ignore[arg-type]
    top5 = logits.topk(5).indices == data.labels[:, None]
    assert result.accuracy == pytest.approx((logits.argmax(1) == data.labels).double().mean().item())
    assert result.accuracy_top5 == pytest.approx(top5.any(1).double().mean().item())
    assert result.loss == pytest.approx(functional.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert result.images == 50
    assert result.params == sum(p.numel() for p in model.parameters())
    assert result.macs == 36 * 8 * 27 + 8 * 36 * 7
    assert result.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert result.latency_ms is None


def test_the_batch_size_does_not_matter() -> None:
    model, data = network(), images()
    one, other = evaluate(model, data, batch_size=50), evaluate(model, data, batch_size=7)
    assert one.accuracy == other.accuracy
    assert one.loss == pytest.approx(other.loss, rel=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = network().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, images())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].weight.is_contiguous()


class ViewAcross(nn.Module):
    """A forward that only works in the plain order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8 * 36, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).view(len(x), -1))
        return y


def test_a_forward_that_needs_the_plain_order_gets_it() -> None:
    assert evaluate(ViewAcross(), images()).images == 50


def test_without_data_only_cost_and_time() -> None:
    model = remember(network(), Origin("net.py:make", input=SPEC))
    result = evaluate(model, latency=True, latency_batch=2, threads=1)
    assert (result.model, result.accuracy, result.accuracy_top5, result.loss, result.images) == (
        "net.py:make",
        None,
        None,
        None,
        0,
    )
    assert result.latency_ms is not None
    assert 0 < result.latency_ms.p50 <= result.latency_ms.p95
    assert (result.latency_ms.batch, result.latency_ms.threads, result.latency_ms.device) == (2, 1, "cpu")
    assert json.loads(json.dumps(result.to_json()))["latency_ms"]["batch"] == 2


def test_five_guesses_among_five_classes_say_nothing() -> None:
    assert evaluate(network(5), images(classes=5)).accuracy_top5 is None
    assert evaluate(network(6), images(classes=6)).accuracy_top5 is not None


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    latency = measure_latency(network().eval(), (torch.zeros(1, 3, 8, 8),), threads=1, seconds=0.01)
    assert latency.threads == 1
    assert latency.calls >= 20
    assert torch.get_num_threads() == before


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    scored(network().eval(), images(), batch_size=20, on_progress=lambda *now: seen.append(now))
    assert seen == [(20, 50), (40, 50), (50, 50)]


def test_a_classifier_for_other_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"7 classes.*10 outputs"):
        evaluate(network(10), images())


def test_images_of_another_shape_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7))
    with pytest.raises(InputError, match=r"3, 8, 8"):
        evaluate(model, images())


def test_what_does_not_classify_is_refused() -> None:
    with pytest.raises(InputError, match="expected a classifier"):
        evaluate(nn.Conv2d(3, 7, 3), images())


def test_a_model_that_does_not_say_what_it_reads_is_refused() -> None:
    with pytest.raises(InputError, match="does not say what it reads"):
        evaluate(network())


def test_what_is_timed_takes_turns() -> None:
    order: list[str] = []
    runs = {name: partial(order.append, name) for name in "ab"}
    times = in_turns(runs, torch.device("cpu"), rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}

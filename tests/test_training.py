"""Training: what a step computes, what is reported, and what is said when a run cannot go on."""

from __future__ import annotations

import copy
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.data import ImageSet, open_data
from prunekit.errors import InputError, TrainingError
from prunekit.spec import InputSpec
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import EpochEvent, Event, SaveEvent, StartEvent, StepEvent
from prunekit.training.schedule import learning_rate
from prunekit.training.sinks import MetricsFile, TensorBoard
from prunekit.training.state import State
from prunekit.training.world import join

QUICK = TrainConfig(epochs=1, batch_size=64, lr=0.05, augment="none", device="cpu")


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**vars(QUICK), **changes})


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_data("digits", "train")


@pytest.fixture(scope="module")
def few(digits: ImageSet) -> ImageSet:
    return digits.sample(256)


def plain_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def norm_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)


def reference(
    model: nn.Module, data: ImageSet, steps: int, optimizer: torch.optim.Optimizer, hook: Callable[[], object]
) -> None:
    """A plain loop over the same batches as the first `steps` of `QUICK`'s first epoch."""
    from prunekit.training.loader import Feed

    dtype = next(model.parameters()).dtype
    batches = Feed(data, QUICK, join("cpu"), dtype).epoch(0, 0)
    model.train()
    for _ in range(steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        hook()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


def test_it_learns_and_leaves_the_model_as_it_came(digits: ImageSet) -> None:
    model = norm_net().eval()
    model[0].train()
    events: list[Event] = []
    val = open_data("digits", "val")
    result = train(model, config(epochs=4, warmup=1, augment="auto"), digits, val, on_event=events.append)
    assert result.model is model
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert model[0].training
    assert not model[1].training
    assert model[4].weight.is_contiguous()
    with torch.no_grad():
        model.eval()
        hits = torch.cat([model(x).argmax(1) == y for x, y in val.batches()])
    assert result.accuracy == pytest.approx(hits.float().mean().item())


def test_steps_are_those_of_a_plain_loop(few: ImageSet) -> None:
    ours, theirs = plain_net().double(), plain_net().double()
    train(ours, config(schedule="constant"), few)
    reference(theirs, few, 4, sgd(theirs), lambda: None)
    close(ours, theirs, 1e-12)


def test_accumulated_parts_make_the_same_step(few: ImageSet) -> None:
    whole, parts = plain_net().double(), plain_net().double()
    train(whole, config(clip=0.5), few)
    train(parts, config(clip=0.5, accumulate=4), few)
    close(whole, parts, 1e-12)


@pytest.mark.parametrize("channels_last", [True, False])
def test_one_seed_gives_one_result(few: ImageSet, channels_last: bool) -> None:
    nets = [norm_net().append(nn.Dropout(0.5)) for _ in range(3)]
    before = torch.get_rng_state()
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        torch.rand(seed)  # whatever the caller's generator stands at
        torch.set_rng_state(before)
        train(net, config(augment="shift", seed=seed, channels_last=channels_last), few)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(weights(nets[0]), weights(nets[1]))
    assert not same(weights(nets[0]), weights(nets[2]))


def test_the_subgradient_is_added_after_the_backward_pass(few: ImageSet) -> None:
    ours, theirs = norm_net().double(), norm_net().double()
    gammas = [m.weight for m in theirs if isinstance(m, nn.BatchNorm2d)]

    def penalise() -> None:
        for gamma in gammas:
            assert gamma.grad is not None
            gamma.grad += 0.01 * gamma.detach().sign()

    train(ours, config(schedule="constant", sparsity=0.01), few)
    reference(theirs, few, 4, sgd(theirs), penalise)
    close(ours, theirs, 1e-12)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_subgradient_is_added_once_a_step(few: ImageSet, accumulate: int, clip: float | None) -> None:
    one_step, (sparse, plain) = few.subset(range(64)), (norm_net(), norm_net())
    settings = {"schedule": "constant", "momentum": 0.0, "accumulate": accumulate, "clip": clip}
    train(sparse, config(sparsity=0.5, **settings), one_step)
    train(plain, config(**settings), one_step)
    change = plain[1].weight - sparse[1].weight
    torch.testing.assert_close(change, torch.full_like(change, 0.05 * 0.5))


def test_the_proximal_step_reaches_zero(few: ImageSet) -> None:
    model = norm_net()
    result = train(model, config(epochs=3, sparsity=1.8, proximal=True, schedule="constant"), few)
    gammas = torch.cat([model[1].weight, model[5].weight])
    assert 0 < float((gammas == 0).float().mean()) == result.history[-1].sparsity


def test_only_the_named_gammas_are_penalised(few: ImageSet) -> None:
    model, free = norm_net(), norm_net()
    events: list[Event] = []
    train(model, config(sparsity=1.0), few, penalised=["5.weight"], on_event=events.append)
    train(free, config(), few)
    assert isinstance(events[0], StartEvent)
    assert events[0].penalised == 16
    assert model[5].weight.mean() < free[5].weight.mean() - 0.05
    assert (model[1].weight - free[1].weight).abs().max() < 0.1
    with pytest.raises(InputError, match=r"5\.weight"):
        train(model, config(sparsity=1.0), few, penalised=["5.wight"])


def test_the_penalty_can_spare_the_gammas_that_an_addition_shares() -> None:
    from prunekit import models

    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images = ImageSet("black", "train", pixels, torch.arange(4), tuple("abcdefghij"), InputSpec((3, 8, 8)))
    for scope, penalised in (("all", 698 - 10), ("inner", 336)):
        events: list[Event] = []
        model = models.build("resnet20_cifar")
        train(model, config(sparsity=1e-3, sparsity_scope=scope, batch_size=4), images, on_event=events.append)
        assert isinstance(events[0], StartEvent)
        assert events[0].penalised == penalised


def test_sparsity_needs_something_to_penalise(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match="nothing to penalise"):
        train(plain_net(), config(sparsity=1e-4), few)
    frozen = norm_net()
    frozen[1].requires_grad_(False)
    frozen[5].requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to penalise"):
        train(frozen, config(sparsity=1e-4), few)
    with pytest.raises(TrainingError, match="AdamW rescales"):
        train(norm_net(), config(sparsity=1e-4, optimizer="adamw"), few)


def test_learning_rates() -> None:
    def rates(**changes: Any) -> list[float]:
        return [learning_rate(config(lr=1.0, **changes), step, 20, 5) for step in range(20)]

    cosine = rates()
    assert cosine[0] == 1
    assert cosine[10] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    steps = rates(schedule="step")
    assert steps == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)
    warm = rates(schedule="constant", warmup=0.8)
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)
    assert TrainConfig(optimizer="adamw").peak_lr == 1e-3
    assert TrainConfig().peak_lr == 0.1


def test_decay_can_spare_biases_and_norms(few: ImageSet) -> None:
    still = {"schedule": "constant", "momentum": 0.0, "weight_decay": 1.0, "label_smoothing": 1.0}
    for decay_norm in (True, False):
        model = norm_net()
        model[8].bias.detach().fill_(100.0)
        free = copy.deepcopy(model)
        train(model, config(**still, decay_norm=decay_norm), few)
        train(free, config(**{**still, "weight_decay": 0.0}), few)
        moved = (model[8].bias - free[8].bias).abs().max() > 1
        assert moved == decay_norm
        assert (model[4].weight - free[4].weight).abs().max() > 1e-3


def test_adamw_is_torchs(few: ImageSet) -> None:
    ours, theirs = plain_net().double(), plain_net().double()
    train(ours, config(optimizer="adamw", schedule="constant", lr=1e-3, weight_decay=0.05), few)
    reference(theirs, few, 4, torch.optim.AdamW(theirs.parameters(), 1e-3, weight_decay=0.05), lambda: None)
    close(ours, theirs, 1e-12)


def test_the_moving_average_is_what_is_returned(few: ImageSet) -> None:
    averaged, raw = plain_net().double(), plain_net().double()
    train(averaged, config(schedule="constant", ema=0.7), few)
    steps: list[list[Tensor]] = []

    def remember(*_: Any) -> None:
        steps.append([p.detach().clone() for p in raw.parameters()])

    optimizer = sgd(raw)
    optimizer.register_step_post_hook(remember)
    reference(raw, few, 4, optimizer, lambda: None)
    expected = steps[0]
    for step in steps[1:]:
        expected = [0.7 * e + 0.3 * p for e, p in zip(expected, step, strict=True)]
    for ours, theirs in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-9)


def test_the_student_comes_to_agree_with_its_teacher(digits: ImageSet) -> None:
    teacher, student = norm_net(1), norm_net(2)
    train(teacher, config(epochs=2), digits)
    before = weights(teacher)
    images, _ = next(digits.batches(256))
    train(student, config(epochs=3, distill=1.0), digits, teacher=teacher)
    with torch.no_grad():
        agree = (teacher.eval()(images).argmax(1) == student.eval()(images).argmax(1)).float().mean()
    assert agree > 0.9
    assert same(before, weights(teacher))


class _Auxiliary(nn.Module):
    """Give back what comes in, and the scores of an auxiliary classifier."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scores


def test_distillation_loss() -> None:
    from prunekit.tasks.classification import CLASSIFICATION
    from prunekit.training.objective import Objective

    torch.manual_seed(0)
    logits, wanted, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    objective = Objective(config(distill=0.3, temperature=2.0), nn.Linear(4, 4), CLASSIFICATION)
    objective._teacher = lambda _: wanted
    loss, _ = objective(nn.Identity(), (logits, labels))
    soft = (wanted / 2).softmax(1)
    kl = (soft * (soft.log() - (logits / 2).log_softmax(1))).sum(1).mean() * 4
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, labels) + 0.3 * kl)
    plain, _ = Objective(config(), None, CLASSIFICATION)(_Auxiliary(wanted), (logits, labels))
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(wanted, labels))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(digits: ImageSet, precision: str) -> None:
    result = train(norm_net(), config(epochs=3, precision=precision, sparsity=1e-4), digits, digits)
    assert result.accuracy is not None
    assert result.accuracy > 0.85
    assert result.model[1].weight.dtype == torch.float32


def test_events_tell_the_run(few: ImageSet, tmp_path: Path) -> None:
    events: list[Event] = []
    state = tmp_path / "run.state"
    result = train(norm_net(), config(epochs=2, log_every=2), few, few, state_path=state, on_event=events.append)
    kinds = "".join({StartEvent: "b", StepEvent: "s", EpochEvent: "e", SaveEvent: "w"}[type(e)] for e in events)
    assert kinds == "bw" + "ssew" * 2
    last = events[-2]
    assert isinstance(last, EpochEvent)
    assert (last.epoch, last.epochs, last.step) == (2, 2, 8)
    assert last == result.history[-1]
    assert last.accuracy is not None
    assert 0 <= last.accuracy <= 1
    step = events[-3]
    assert isinstance(step, StepEvent)
    assert (step.step, step.steps, step.eta) == (8, 8, 0)
    assert step.loss == last.loss
    assert step.images_per_second > 0


def test_metrics_are_lines_of_json(few: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(plain_net(), config(log_every=2), few, on_event=MetricsFile(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "epoch"]
    assert lines[1]["sparsity"] is None
    sink = MetricsFile(path)
    with path.open("a") as file:
        file.write('{"event": "st')  # cut off by a kill
    sink(StartEvent(0, 1, 2, 4, "cpu", 1, 256, 0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 2]
    with pytest.raises(InputError, match="cannot be written"):
        MetricsFile(tmp_path)(StartEvent(0, 1, 0, 4, "cpu", 1, 256, 0))


def test_tensorboard_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, float] = {}

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert step == 7
            written[name] = value

        def close(self) -> None:
            written["closed"] = 1

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = TensorBoard(tmp_path)
    board(SaveEvent("state", 1, 7))
    board(EpochEvent(1, 2, 7, 0.5, 0.9, None, 0.8, 0.1, None, 3.0))
    board.close()
    expected = {"loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8, "lr": 0.1, "seconds": 3.0}
    assert written == {**{f"epoch/{name}": value for name, value in expected.items()}, "closed": 1}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


class Faulty(nn.Module):
    """Passes images on until the step at which it does `harm`."""

    def __init__(self, at: int, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at, self.harm, self.seen = at, harm, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return self.harm(x) if self.seen > self.at else x


def test_a_loss_that_is_no_number_stops_the_run(few: ImageSet, tmp_path: Path) -> None:
    state = tmp_path / "run.state"
    model = nn.Sequential(Faulty(6, lambda x: x * math.nan), *norm_net())
    with pytest.raises(TrainingError, match=r"no number at step 6 .*last good state is in .*run\.state"):
        train(model, config(epochs=3, save_every=1), few, state_path=state)
    kept = State.load(state)
    assert (kept.epoch, kept.step) == (1, 2)
    assert all(torch.isfinite(v).all() for v in kept.tensors["model"].values())


def test_weights_that_are_no_numbers_never_reach_the_state(few: ImageSet, tmp_path: Path) -> None:
    model = plain_net()
    state = tmp_path / "run.state"
    model[5].bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingError, match="a weight is no number after step 0"):
        train(model, config(save_every=1), few, state_path=state)
    assert torch.isfinite(State.load(state).tensors["model"]["5.bias"]).all()


def test_out_of_memory_says_the_batch_size(few: ImageSet) -> None:
    def harm(_: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")

    model = nn.Sequential(Faulty(0, harm), *plain_net())
    with pytest.raises(TrainingError, match=r"batches of 64 images\n--accumulate 2"):
        train(model, config(), few)


def test_networks_that_cannot_be_trained(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match="frozen"):
        train(plain_net().requires_grad_(False), config(), few)
    with pytest.raises(InputError, match=r"failed on a batch of shape \(2, 1, 8, 8\).*\n.*--input-size"):
        train(nn.Sequential(nn.Conv2d(3, 4, 3)), config(), few)
    with pytest.raises(InputError, match="classifier has 5 outputs"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), config(), few)


def test_batches_that_cannot_be_divided(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match="cannot be divided evenly into 3 parts"):
        train(plain_net(), config(accumulate=3), few)
    with pytest.raises(TrainingError, match="too few"):
        train(plain_net(), config(batch_size=8, accumulate=8), few.subset([0, 1]))
    result = train(plain_net(), config(), few.subset(range(30)))  # fewer than a batch: one of 30
    assert result.history[-1].step == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": math.nan}, "lr must be"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"label_smoothing": 2.0}, "label smoothing must be between 0 and 1"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'\ndid you mean sgd"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"precision": "fp8"}, "precision"),
        ({"augment": "cfar"}, "did you mean cifar"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_impossible_settings(few: ImageSet, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        train(plain_net(), config(**changes), few)


def test_training_in_a_thread_works_without_signals(few: ImageSet) -> None:
    model = plain_net()
    thread = threading.Thread(target=train, args=(model, config(), few))
    thread.start()
    thread.join()
    assert not same(weights(model), weights(plain_net()))


def test_lazy_images_are_trained_on(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("dark", 40), ("light", 200)):
        for i in range(20):
            path = tmp_path / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80 + i, 90), (colour, colour, i)).save(path)
    data = open_data(tmp_path, "train", input_spec=InputSpec((3, 66, 66)))
    assert not data.in_memory
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    result = train(net, config(epochs=4, batch_size=12, augment="auto", lr=0.5), data, data)
    assert result.accuracy == 1

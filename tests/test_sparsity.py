"""The number of `--sparsity` means one thing, whatever the optimiser, its momentum, and the way it is applied."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from prunekit.errors import TrainingError
from prunekit.tasks.classification import CLASSIFICATION
from prunekit.training.config import TrainConfig
from prunekit.training.learner import Learner
from prunekit.training.objective import Objective
from prunekit.training.world import join

LAMBDA, RATE = 0.01, 0.1

WAYS: dict[str, dict[str, Any]] = {
    f"{'proximal' if proximal else 'subgradient'}, momentum {momentum}{' of Nesterov' if nesterov else ''}": {
        "proximal": proximal, "momentum": momentum, "nesterov": nesterov,
    }
    for proximal in (False, True)
    for momentum, nesterov in ((0.0, False), (0.5, True), (0.9, True), (0.9, False), (0.95, True))
}  # fmt: skip
ADAM = {"AdamW": {"optimizer": "adamw", "proximal": True}}


def learner(gamma: float, **changes: Any) -> Learner:
    """A learner of one gamma, in float64 and without weight decay."""
    config = TrainConfig(sparsity=LAMBDA, lr=RATE, weight_decay=0.0, device="cpu", **changes)
    norm = nn.BatchNorm1d(1).double()
    nn.init.constant_(norm.weight, gamma)
    return Learner(norm, config, join("cpu"), Objective(config, None, CLASSIFICATION), None)


def step(toy: Learner, gradient: float) -> float:
    """A step with a loss of that `gradient`; the gamma after it."""
    weight = toy.model.weight
    assert isinstance(weight, nn.Parameter)
    weight.grad = torch.full_like(weight, gradient)
    toy.update(RATE)
    return float(weight.detach())


@pytest.mark.parametrize("way", WAYS)
def test_without_a_loss_all_ways_pull_alike(way: str) -> None:
    toy = learner(1000.0, **WAYS[way])
    start = [step(toy, 0.0) for _ in range(300)][-1]
    end = [step(toy, 0.0) for _ in range(50)][-1]
    assert (start - end) / 50 == pytest.approx(RATE * LAMBDA / (1 - WAYS[way]["momentum"]), rel=1e-6)


@pytest.mark.parametrize("way", WAYS | ADAM)
def test_the_loss_holds_a_gamma_by_more_than_the_number(way: str) -> None:
    for pulled, strength in ((True, 0.9 * LAMBDA), (False, 1.1 * LAMBDA)):
        toy = learner(0.05, **(WAYS | ADAM)[way])
        gammas = [step(toy, -strength) for _ in range(800)]
        if not pulled:
            assert gammas[-1] > 0.1
        elif toy._config.proximal:
            assert gammas[-1] == 0
        else:
            assert abs(gammas[-1]) < 10 * RATE * LAMBDA


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_noise_changes_nothing_in_the_balance_of_adamw(share: float) -> None:
    """Gradients of +-10 lambda around a mean: the mean decides."""
    toy = learner(1000.0, **ADAM["AdamW"])
    mean, noise = -share * LAMBDA, 10 * LAMBDA
    gammas = [step(toy, mean + (noise if number % 2 else -noise)) for number in range(1200)]
    rms = math.sqrt(mean**2 + noise**2)
    assert (gammas[-1] - gammas[199]) / 1000 == pytest.approx(RATE * (share - 1) * LAMBDA / rms, rel=0.02)


def test_a_gamma_without_a_gradient_fades_under_adamw() -> None:
    toy = learner(1.0, **ADAM["AdamW"])
    gammas = [step(toy, 0.0) for _ in range(6)]
    assert gammas == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])


def test_the_subgradient_is_what_it_was() -> None:
    """Bit for bit the plain step: figures were measured with it."""
    toy, plain = learner(1.0, momentum=0.9), nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([plain], RATE, momentum=0.9, nesterov=True)
    for number in range(20):
        plain.grad = torch.full_like(plain, 0.3 - 0.02 * number) + LAMBDA * plain.detach().sign()
        optimizer.step()
        assert step(toy, 0.3 - 0.02 * number) == plain.item()


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(TrainingError, match="no limit"):
        TrainConfig(sparsity=LAMBDA, momentum=1.0, proximal=True).check()

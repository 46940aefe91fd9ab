"""A network with its optimiser: gradients, steps, the L1 term, the moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prunekit.data import Examples
from prunekit.tasks.base import Batch
from prunekit.tasks.calls import loss_of, scores_of
from prunekit.tasks.nests import floating_type, size_of
from prunekit.training.config import TrainConfig
from prunekit.training.forward import backward
from prunekit.training.loader import shares
from prunekit.training.objective import Objective
from prunekit.training.optimizer import build_optimizer
from prunekit.training.penalty import GammaPenalty
from prunekit.training.tally import Tally
from prunekit.training.world import World

_SAMPLE = 5000  # examples for the initial loss
_SCORED = 256  # examples in a batch for validation
_PRECISION = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _StoppedError(BaseException):
    """A signal came while a task was scored; no task's code is to hold it up."""


class Learner:
    """Trains `model` in place: `gradients`, then `update`, make one optimiser step."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        world: World,
        objective: Objective,
        penalised: Sequence[str] | None,
    ) -> None:
        self.model, self._config, self._world = model, config, world
        self.penalty = GammaPenalty.of(model, penalised, needed=config.sparsity > 0)
        self.objective = objective
        self._optimizer = build_optimizer(model, config, objective.own, objective.own_rate)
        self.dtype = floating_type(model)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self._average = _averaged(model, config.ema) if config.ema else None
        self._best: dict[str, Any] | None = None
        self._net = world.wrapped(model.train())

    def gradients(self, batches: Iterator[Batch], step: int, tally: Tally) -> None:
        """Compute the gradient of the loss over the next `accumulate` batches, averaged over the processes."""
        self._optimizer.zero_grad()
        parts = self._config.accumulate
        for part in range(parts):
            batch = next(batches)
            with self._unsynchronised(part < parts - 1):
                with self._autocast():
                    loss, output = self.objective(self._net, batch)
                backward(self._scaler.scale(loss / parts))
            with torch.no_grad():
                tally.add(step, loss, self.objective.task.right(output, batch), size_of(batch))

    def update(self, lr: float) -> None:
        """Take one optimiser step: clip the gradients, apply the L1 term on gamma once."""
        config, penalty = self._config, self.penalty
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self._scaler.unscale_(self._optimizer)
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if config.sparsity and not config.proximal:
            penalty.add_subgradient(config.sparsity)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if config.sparsity and config.proximal:
            penalty.shrink(config.sparsity, self._optimizer)
        if self._average is not None:
            self._average.update_parameters(self.model)

    @torch.no_grad()
    def score(self, data: Examples, should_stop: Callable[[], bool]) -> tuple[float, float] | None:
        """Return mean loss and score on `data`, of the moving average if there is one; None if stopped."""
        tally = self._tallied(data, should_stop)
        if tally is None:
            return None
        loss, accuracy = tally.means()
        return (loss, accuracy) if accuracy is not None else self._scored(data, loss, should_stop)

    def _tallied(self, data: Examples, should_stop: Callable[[], bool]) -> Tally | None:
        """Return losses and right answers, of which each process counts a share; None if stopped."""
        model, task = self._shown(), self.objective.task
        model.eval()
        tally = Tally(self._world)
        for batch in shares(data, _SCORED, self._world, self.dtype):
            if should_stop():
                break
            with self._autocast():
                loss, output = loss_of(task, model, batch)
            tally.add(0, loss, task.right(output, batch), size_of(batch))
        self.model.train()
        return None if should_stop() else tally

    def _scored(self, data: Examples, loss: float, should_stop: Callable[[], bool]) -> tuple[float, float] | None:
        """Return `loss` and a score that is no mean over the examples, which each process finds by itself."""
        model, task = self._shown(), self.objective.task

        def batches() -> Iterator[Batch]:
            for batch in data.batches(_SCORED, device=self._world.device, dtype=self.dtype):
                if should_stop():
                    raise _StoppedError
                yield batch

        model.eval()
        try:
            with self._autocast():
                return loss, scores_of(task, model, batches())[task.score]
        except _StoppedError:
            return None
        finally:
            self.model.train()

    def begin(self, data: Examples) -> None:
        """Prepare the objective for a new run on the examples `data`."""

        def mean_loss() -> float:
            sample = data.sample(min(len(data), _SAMPLE), seed=self._config.seed)
            with torch.no_grad():
                tally = self._tallied(sample, lambda: False)
            assert tally is not None
            return tally.means()[0]

        self.objective.begin(mean_loss)

    def _shown(self) -> nn.Module:
        """Return the network whose weights count: the moving average, where there is one."""
        found: nn.Module = self.model if self._average is None else self._average.module
        return found

    def synchronise(self) -> None:
        """Give every process the same running statistics: their mean over the processes."""
        self._world.average_(self.model.buffers())
        if self._average is not None:
            self._world.average_(self._average.module.buffers())

    def finish(self) -> None:
        """Leave in the model what was set aside, or else the moving average, where there is one."""
        if self._best is None and self._average is not None:
            self.model.load_state_dict(self._average.module.state_dict())
        self.take_back()

    def take_back(self) -> None:
        """Leave in the model what was set aside, where there is any."""
        if self._best is not None:
            self.model.load_state_dict(self._best)

    def set_aside(self) -> None:
        """Remember the weights that `score` looks at, as the best so far."""
        self._best = {name: _own(value) for name, value in self._shown().state_dict().items()}

    @property
    def finite(self) -> bool:
        """True where every weight is finite."""
        tensors = [value for value in self.model.state_dict().values() if isinstance(value, Tensor)]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())

    def tensors(self) -> dict[str, Any]:
        """Return the state dicts of all parts."""
        average = None if self._average is None else self._average.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": average,
            "objective": self.objective.state(),
            **({} if self._best is None else {"best": self._best}),
        }

    def restore(self, tensors: dict[str, Any]) -> None:
        """Restore the state that `tensors` returned."""
        self.model.load_state_dict(tensors["model"])
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._scaler.load_state_dict(tensors["scaler"])
        self.objective.restore(tensors.get("objective", {}))
        self._best = tensors.get("best")
        if self._average is not None:
            self._average.load_state_dict(tensors["average"])

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self._config.precision
        return torch.autocast(self._world.device.type, _PRECISION[precision], enabled=precision != "off")

    def _unsynchronised(self, wanted: bool) -> contextlib.AbstractContextManager[object]:
        if wanted and isinstance(self._net, DistributedDataParallel):
            return self._net.no_sync()
        return contextlib.nullcontext()


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)

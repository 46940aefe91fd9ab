"""The contract of a task: what a network is for, on one screen.

Everything that prunekit does with data goes through it: training and tuning, validation, measuring, restoring, sweeps
and searches. Image classification and semantic segmentation are written against it; further tasks are found through
the entry points `prunekit.tasks`, or in a file that `--task file.py:Name` names.

The module of a task should import without torch (import it inside methods), so that commands start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.data import Examples
    from prunekit.spec import InputSpec

Batch = Any
"""Any nest of tensors: tuples, lists and dictionaries of them."""


class Task(ABC):
    """What a network is for: its examples, its loss and its score.

    Attributes:
        score: The name of the score that counts, one of those that `scores` returns.
        unit: The unit of that score; `%` for a share from 0 to 1.
        higher_is_better: Whether more of it is better.

    Examples:
        >>> import torch, prunekit as pk
        >>> class Doubling(pk.Task):
        ...     score, higher_is_better = "error", False
        ...     def examples(self, split):
        ...         x = torch.rand(64, 4)
        ...         return list(zip(x, 2 * x))
        ...     def loss(self, model, batch):
        ...         return (model(batch[0]) - batch[1]).square().mean()
        ...     def scores(self, model, batches):
        ...         return {"error": sum(float(self.loss(model, batch)) for batch in batches)}
        >>> pk.evaluate(torch.nn.Linear(4, 4), Doubling().open("test")).metric.name
        'error'
    """

    score: ClassVar[str]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def examples(self, split: str) -> Any:
        """Return the examples of "train", "val" or "test": a list, a `torch.utils.data` set, or a loader of one.

        An example is any nest of tensors (numbers and arrays become tensors), without a batch; `torch.utils.data` puts
        them together. None for "val" takes every tenth training example.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of `model` over a batch, one number that its gradient is taken of."""

    @abstractmethod
    def scores(self, model: nn.Module, batches: Iterator[Batch]) -> Mapping[str, float]:
        """Return the scores of `model`, which is in evaluation mode, over all `batches`; gradients are off."""

    def inputs(self, batch: Batch) -> Tensor | tuple[Any, ...]:
        """Return what the network reads of a batch; by default its first part, or a batch that is one tensor."""
        return batch[0] if isinstance(batch, tuple | list) else batch  # type: ignore[no-any-return]

    def right(self, output: Any, batch: Batch) -> Tensor | None:
        """Return how many examples of a batch an output answers right, where the score that counts is their share.

        It is what training shows as it goes on. None for any other score.
        """
        del output, batch
        return None

    def losses(self, output: Any, batch: Batch) -> Tensor | None:
        """Return the loss of each example, `(N,)`, by which gates tell easy inputs from hard ones.

        None takes the mean loss of a batch for each.
        """
        del output, batch
        return None

    def distance(self, ours: Any, theirs: Any, temperature: float) -> Tensor:
        """Return how far a network's output is from its teacher's, for distillation.

        By default the mean squared difference of all their tensors, in units of the teacher's mean square.
        """
        import torch

        from prunekit.tasks.nests import floats_in

        del temperature
        pairs = list(zip(floats_in(ours), floats_in(theirs), strict=True))
        return torch.stack([(a - b).square().mean() / b.square().mean().clamp_min(1e-12) for a, b in pairs]).mean()

    def reading(self, spec: InputSpec | None) -> Task:
        """Return the task for a network that reads `spec`; by default the task itself."""
        del spec
        return self

    @property
    def metric(self) -> Metric:
        """The score that counts."""
        return Metric(self.score, self.unit, self.higher_is_better)

    @property
    def name(self) -> str:
        """What people call it."""
        return type(self).__name__

    def open(self, split: str) -> Examples:
        """Return the examples of "train", "val" or "test" as a set that yields batches."""
        from prunekit.tasks.examples import open_split

        return open_split(self, split)

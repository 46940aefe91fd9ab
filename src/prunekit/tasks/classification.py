"""Classification, the built-in task: images, or whatever a task of one's own takes over its loss and score for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.errors import InputError
from prunekit.tasks.base import Batch, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.data import Examples
    from prunekit.spec import InputSpec

_AUXILIARY = 0.3  # weight of auxiliary classifiers (Szegedy et al., "Going Deeper with Convolutions", 2015)


@dataclass
class Classification(Task):
    """One class for each example; a batch is inputs and labels `(N,)`.

    Attributes:
        data: The images: `digits`, a folder with one sub-folder a class, or a torchvision data set. A class that
            derives from this one has `examples` of its own instead.
        label_smoothing: Share of the target that all classes have in common, in training.
        spec: What the network reads.

    Examples:
        >>> import prunekit as pk
        >>> found = pk.evaluate(pk.load("prunekit:vgg_digits"), pk.Classification("digits").open("test"))
        >>> found.metric.name, found.images
        ('accuracy', 355)
    """

    score: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"

    data: str | None = None
    label_smoothing: float = 0.0
    spec: InputSpec | None = None

    def examples(self, split: str) -> Any:
        """Return labelled images."""
        from prunekit.data import open_data

        if self.data is None:
            raise InputError("no images to classify", hint="say which: a folder, digits, or a torchvision data set")
        return open_data(self.data, split, input_spec=self.spec)  # type: ignore[arg-type]

    def open(self, split: str) -> Examples:
        """Return the examples of a split; a set of images as it is."""
        if type(self).examples is Classification.examples:
            images: Examples = self.examples(split)
            return images
        return super().open(split)

    def reading(self, spec: InputSpec | None) -> Classification:
        """Return the task for a network that reads `spec`."""
        return replace(self, spec=spec) if type(self).examples is Classification.examples else self

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy, with 0.3 times that of each auxiliary classifier."""
        from torch.nn import functional as F

        from prunekit.tasks.logits import at_least_float, class_scores
        from prunekit.tasks.nests import called

        labels = batch[1]
        main, auxiliary = class_scores(called(model, self.inputs(batch)), len(labels))
        loss = F.cross_entropy(at_least_float(main), labels, label_smoothing=self.label_smoothing)
        for other in auxiliary:
            loss = loss + _AUXILIARY * F.cross_entropy(
                at_least_float(other), labels, label_smoothing=self.label_smoothing
            )
        return loss

    def scores(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return `accuracy` and `accuracy_top5` (of more than five classes), 0 to 1, and `loss`, the cross-entropy."""
        from prunekit.tasks.logits import Counts, class_scores
        from prunekit.tasks.nests import called

        counts = Counts()
        for batch in batches:
            labels = batch[1]
            counts.add(class_scores(called(model, self.inputs(batch)), len(labels))[0], labels)
        return counts.scores()

    def right(self, output: Any, batch: Batch) -> Tensor:
        """Return how many examples are given their class."""
        from prunekit.tasks.logits import class_scores

        labels = batch[1]
        found: Tensor = (class_scores(output, len(labels))[0].argmax(1) == labels).sum()
        return found

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example, `(N,)`."""
        from torch.nn import functional as F

        from prunekit.tasks.logits import at_least_float, class_scores

        labels = batch[1]
        return F.cross_entropy(at_least_float(class_scores(output, len(labels))[0]), labels, reduction="none")

    def distance(self, ours: Any, theirs: Any, temperature: float) -> Tensor:
        """Return `T² * KL(theirs / T || ours / T)` (Hinton et al., "Distilling the Knowledge in a Neural Network")."""
        from torch.nn import functional as F

        from prunekit.tasks.logits import at_least_float, main_scores

        wanted = F.log_softmax(at_least_float(main_scores(theirs)) / temperature, dim=1)
        found = F.log_softmax(at_least_float(main_scores(ours)) / temperature, dim=1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature * temperature


CLASSIFICATION = Classification()
"""The task of labelled images."""

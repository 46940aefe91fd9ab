"""Evaluation of a network as one result: its scores, its cost and its measured speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.data import Examples, ImageSet, check_classes, labelled_for
from prunekit.devices import check_whole, device_of, lay_channels_last
from prunekit.errors import InputError, counted
from prunekit.evaluation.answers import Answers
from prunekit.evaluation.latency import Latency, measure_latency
from prunekit.metric import ACCURACY, Metric
from prunekit.programs.program import ExportedProgram, filled
from prunekit.progress import Progress, counter
from prunekit.spec import classes_of, origin_of
from prunekit.surgery import Graph, cost_of, trace
from prunekit.surgery.copying import copied
from prunekit.tasks.calls import scores_of
from prunekit.tasks.logits import Counts
from prunekit.tasks.nests import floating_type
from prunekit.tasks.sets import inputs_of, task_of

_COUNT = counter("evaluating")


@dataclass(frozen=True)
class EvalResult:
    """Measurements of one network.

    `accuracy` (top-1) and `accuracy_top5` are shares from 0 to 1, `loss` the mean cross-entropy in nats over
    `images` images; all three are None without data, and `accuracy_top5` also where there are fewer than six
    classes to choose from. `params` counts parameters, `macs` multiply-accumulates for one input (None where they are
    unknown), `bytes` the weights' size (or the file's, where the network came from one), and `latency_ms` the measured
    time of a forward pass. `runtime` is what ran it: "pytorch", "pt2", "onnxruntime", or the name of a runtime of
    networks with gates. `gates` says what the gates of a dynamic network did (`prunekit.methods.manidp`), None
    elsewhere.
    `balanced_accuracy` is the mean of the classes' accuracies, and `answers` has what each image was named.
    `metric` is the score that counts, one of `scores`, all that its task has; of classification these are `accuracy`,
    `accuracy_top5` and `loss`, and for other tasks the accuracies are None.
    `graph` is what the network was read as.

    Examples:
        >>> import prunekit as pk
        >>> found = pk.evaluate(pk.load("prunekit:vgg_digits"), pk.open_data("digits", "test"))
        >>> found.images, 0 <= found.accuracy <= 1, sorted(found.to_json())[:3]
        (355, True, ['accuracy', 'accuracy_top5', 'balanced_accuracy'])
    """

    model: str
    accuracy: float | None
    accuracy_top5: float | None
    loss: float | None
    images: int
    params: int
    macs: int | None
    bytes: int
    latency_ms: Latency | None
    runtime: str = "pytorch"
    gates: dict[str, Any] | None = None
    balanced_accuracy: float | None = None
    metric: Metric | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    answers: Answers | None = field(default=None, repr=False, compare=False)
    graph: Graph | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.metric is None and self.accuracy is not None:  # earlier releases knew accuracy alone
            object.__setattr__(self, "metric", ACCURACY)
            object.__setattr__(self, "scores", {ACCURACY.name: self.accuracy})

    @property
    def score(self) -> float | None:
        """The score that counts, None without data."""
        return self.scores[self.metric.name] if self.metric else None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the fields by name without `answers`, `graph`, and `gates` where there are none."""
        latency, metric = (None if x is None else x.to_json() for x in (self.latency_ms, self.metric))
        fields = {**vars(self), "latency_ms": latency, "metric": metric, "scores": dict(self.scores)}
        fields["score"] = self.score
        del fields["answers"], fields["graph"]
        if self.gates is None:
            del fields["gates"]
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalResult:
        """Read the JSON that `to_json` wrote, of an earlier release as well; raise `TypeError` otherwise."""
        fields, timing, metric = dict(data), data["latency_ms"], data.get("metric")
        fields.pop("score", None)
        fields["latency_ms"] = None if timing is None else Latency(**timing)
        fields["metric"] = None if metric is None else Metric.from_json(metric)
        return cls(**fields)

    def scored(self, score: Score | None) -> EvalResult:
        """Return the result with another score; None for no data."""
        if score is None:
            return self
        return replace(
            self,
            accuracy=score.accuracy,
            accuracy_top5=score.scores.get("accuracy_top5") if score.accuracy is not None else None,
            loss=score.loss,
            images=score.images,
            balanced_accuracy=score.answers.balanced_accuracy if score.answers else None,
            metric=score.metric,
            scores=score.scores,
            answers=score.answers,
        )


@dataclass(frozen=True)
class Score:
    """The scores of a network on `images` examples, and the one that counts; the answers of a classifier of images."""

    metric: Metric
    scores: Mapping[str, float]
    images: int
    answers: Answers | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """The score that counts."""
        return self.scores[self.metric.name]

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, 0 to 1; None where another score counts."""
        return self.value if self.metric == ACCURACY else None

    @property
    def loss(self) -> float | None:
        """The mean loss, where the task tells it."""
        return self.scores.get("loss")


def evaluate(
    model: nn.Module,
    data: Examples | None = None,
    *,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    batch_size: int = 256,
    latency: bool = False,
    latency_batch: int = 1,
    threads: int | None = None,
    device: str | torch.device | None = None,
    name: str | None = None,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Measure a copy of `model` in evaluation mode; the model itself is left as it is.

    Args:
        model: The network.
        data: Labelled images, or the examples that a task has opened, for the score; None measures cost and speed
            alone.
        example: One input batch, `(1, C, H, W)`, or a tuple of inputs; by default the inputs of the first example, or
            zeros of the shape that the model remembers or that images have.
        batch_size: Images per forward pass when scoring.
        latency: Measure the time of a forward pass as well.
        latency_batch: Images per timed pass.
        threads: PyTorch's CPU threads during the timing only.
        device: Where to run; None for the device of the model's weights.
        name: The name of the network in the result.
        on_progress: Called after each batch with the images done so far and the images in all.

    Returns:
        Scores on `data`, parameters, multiply-accumulates (MACs) for one input, bytes and milliseconds.

    Raises:
        InputError: The data does not fit the model, no input shape is known, or memory runs out.

    Examples:
        >>> import prunekit as pk
        >>> found = pk.evaluate(pk.load("prunekit:resnet20"))
        >>> found.params, found.macs, found.accuracy
        (269722, 40551040, None)
    """
    check_whole(model)
    inputs = _inputs(model, data, example)
    graph = trace(model, inputs if len(inputs) > 1 else filled(model, inputs[0]), probe=False)
    measured = cost_of(model, graph)
    subject = _prepared(model, inputs, device)
    count = on_progress or counter(f"evaluating {Path(name or _name_of(model)).name}")
    with evaluating(subject):
        score = scored(subject, data, batch_size=batch_size, on_progress=count) if data is not None else None
        timing = measure_latency(subject, inputs, batch=latency_batch, threads=threads) if latency else None
    result = EvalResult(
        model=name or _name_of(model),
        accuracy=None,
        accuracy_top5=None,
        loss=None,
        images=0,
        params=measured.params,
        macs=measured.macs,
        bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor)),
        latency_ms=timing,
        runtime="pt2" if isinstance(model, ExportedProgram) else "pytorch",
        graph=graph,
    )
    return result.scored(score)


def scored(model: nn.Module, data: Examples, *, batch_size: int = 256, on_progress: Progress = _COUNT) -> Score:
    """Return the scores of `model` on all of `data`, on the weights' device.

    The model runs in its present mode: the caller sets `eval()`.

    Raises:
        InputError: The data does not fit the model, or a score is no number.
    """
    if isinstance(data, ImageSet):
        return _classified(model, labelled_for(model, data), batch_size, on_progress)
    task, dtype = task_of(data), floating_type(model)

    def counted_batches() -> Iterator[Any]:
        for start, batch in enumerate(data.batches(batch_size, device=device_of(model), dtype=dtype), start=1):
            yield batch
            on_progress(min(start * batch_size, len(data)), len(data))

    return Score(task.metric, scores_of(task, model, counted_batches()), len(data))


def _classified(model: nn.Module, data: ImageSet, batch_size: int, on_progress: Progress) -> Score:
    """Return top-1 and top-5 accuracy and mean cross-entropy, with the answers."""
    counts, answers = Counts(), list[tuple[torch.Tensor, torch.Tensor]]()
    with torch.inference_mode():
        for images, labels in data.batches(batch_size, device=device_of(model)):
            logits = _logits(model, images, batch_size)
            check_classes(logits.shape[1], data, classes_of(model))
            answers.append((labels, counts.add(logits, labels)))
            on_progress(counts.seen, len(data))
    scores = counts.scores()
    known, named = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
    return Score(ACCURACY, scores, counts.seen, Answers(data.classes, known, named))


def _logits(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the model's output, `(N, classes)`, in float32; raise `InputError` where it cannot read the images."""
    shape = "x".join(map(str, images.shape[1:]))
    try:
        logits = model(images)
    except torch.OutOfMemoryError:
        raise InputError(
            f"out of memory with batches of {counted(batch_size, 'image')} of {shape}",
            hint="try a smaller --batch-size",
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the model cannot read images of {shape}: {reason}",
            hint="say the size it was made for with --input-size",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"expected a classifier with outputs (images, classes), found {found}")
    return logits.float()


def _inputs(
    model: nn.Module, data: Examples | None, example: torch.Tensor | Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    if isinstance(example, torch.Tensor):
        return (example,)
    if example is not None:
        return tuple(example)
    origin = origin_of(model)
    if data is not None and not isinstance(data, ImageSet):
        return inputs_of(data, floating_type(model))
    spec = data.input_spec if data is not None else origin.input if origin else None
    if spec is None:
        raise InputError(
            "the model does not say what it reads, so its cost cannot be measured",
            hint="give an example input, or --input-size on the command line",
        )
    return (torch.zeros(1, *spec.shape),)


def _prepared(model: nn.Module, inputs: Sequence[torch.Tensor], device: str | torch.device | None) -> nn.Module:
    """Return a copy of the model on its device, in channels-last order if its forward supports that.

    Measured on a CPU, one thread: ResNet-56 reads 1,000 images in 4.8 s instead of 6.6 s. A `view` across channels in a
    user's forward needs the plain order.
    """
    place = device_of(model) if device is None else torch.device(device)
    subject = copied(model).to(place)
    lay_channels_last(subject)
    try:
        with evaluating(subject), torch.inference_mode():
            subject(*(x.to(place) for x in inputs))
    except RuntimeError:
        subject.to(memory_format=torch.contiguous_format)
    return subject


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode and restore each one's own; exported programs, which refuse `eval()`, stay."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _name_of(model: nn.Module) -> str:
    origin = origin_of(model)
    return origin.arch if origin and origin.arch else type(model).__name__

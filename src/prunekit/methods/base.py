"""The interface of a pruning method.

A method reads a network and its graph and returns a `Plan`; it never changes the shape of a tensor. It is found through
the entry points `prunekit.methods`; its command, help, JSON and contract tests follow from this class alone.

The module of a method must import without torch (import it inside `plan`), so that `prunekit --help` stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.errors import InputError, unknown_name
from prunekit.methods.goal import LatencyGoal

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restoration.images import Images
    from prunekit.surgery import Graph


Choices = Iterable[str] | Callable[[], Iterable[str]]
"""Values that a setting may have, or a function that lists them when they are asked for."""


def option(
    default: Any = MISSING, *, help: str, choices: Choices = (), flag: str | None = None, metavar: str | None = None
) -> Any:
    """Declare a setting of a method: a dataclass field that carries its help text and choices to the command line.

    Args:
        default: Its value unless another is given; without one it must be given.
        help: What the command's help says.
        choices: The values that it may have, where they can be listed: themselves, or a function that returns them,
            such as `restorations`.
        flag: The command's flag, where it is another than the field's name.
        metavar: What the help shows in the place of a value.

    Examples:
        >>> from dataclasses import dataclass
        >>> import prunekit as pk
        >>> @dataclass(frozen=True)
        ... class Settings(pk.Config):
        ...     norm: str = pk.option("l1", help="The norm to rank filters by.", choices=("l1", "l2"))
        >>> Settings(ratio=0.5).norm
        'l1'
        >>> Settings(ratio=0.5, norm="max")
        Traceback (most recent call last):
        prunekit.errors.InputError: unknown norm 'max'
        known: l1, l2
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices}
    metadata |= {key: said for key, said in (("flag", flag), ("metavar", metavar)) if said}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def choices_of(field: Field[Any]) -> tuple[str, ...]:
    """Return the values that a setting may have; none where they are not listed."""
    listed = field.metadata.get("choices") or ()
    return tuple(listed() if callable(listed) else listed)


@dataclass(frozen=True)
class Config:
    """Settings of every method: how much to remove, given in exactly one way, and of which layers.

    A ratio for each layer (`ratio_of`, or a `ratio` that is a dictionary) may stand alone, or beside what holds for all
    others. Names in them are those of channel groups, of layers that make them, or patterns.

    Raises:
        InputError: A value that is none of its choices, or out of range.

    Examples:
        >>> import prunekit as pk
        >>> pk.Config(target_macs="50%").to_json()["target_macs"]
        '50%'
    """

    ratio: float | dict[str, float] | None = option(None, help="Share of the prunable channels to remove, 0 to 1.")
    target_macs: str | float | None = option(None, help="MACs to keep: '50%' of the present ones, or '20M'.")
    target_params: str | float | None = option(None, help="Parameters to keep: '50%' of the present ones, or '2M'.")
    target_latency: str | LatencyGoal | None = option(
        None, help="Time of a pass to come down to, as measured: '60%' of the present one, or '5ms'."
    )
    latency_on: str | None = option(
        None,
        help="Where --target-latency is measured: in PyTorch (the default), or the exported file in ONNX Runtime.",
        choices=("pytorch", "onnx"),
    )
    latency_batch: int | None = option(None, help="Images a pass of --target-latency. Default: 1.")
    latency_threads: int | None = option(
        None,
        help="CPU threads of --target-latency. Default: as many as PyTorch uses. With 1 a busy machine measures well.",
    )
    round_to: int = option(1, help="Keep a multiple of this many channels in each layer (8 suits most hardware).")
    min_channels: int = option(1, help="Leave at least this many channels in every layer.")
    only: tuple[str, ...] = option(
        (),
        help="Narrow only layers that this pattern matches, such as 'layer3.*'; it may be given several times. "
        "Channels that several layers share go only if each of them is named.",
        metavar="PATTERN,...",
    )
    skip: tuple[str, ...] = option(
        (),
        help="Leave layers that this pattern matches as wide as they are, and what shares channels with them.",
        metavar="PATTERN,...",
    )
    ratio_of: dict[str, float] | None = option(
        None,
        help="Share of channels that each layer loses which the pattern matches, such as 'layer3.*=0.5'; what else is "
        "said of how much goes is for the other layers. The last that matches counts.",
        metavar="PATTERN=RATIO,...",
    )

    def __post_init__(self) -> None:
        for name in ("only", "skip"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        for item in fields(self):
            choices, value = choices_of(item), getattr(self, item.name)
            if choices and value not in choices and not (value is None and item.default is None):
                raise unknown_name(item.name.replace("_", "-"), str(value), choices)
        for name in ("round_to", "min_channels", "latency_batch", "latency_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as they are stored in a file's history."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Method(ABC):
    """A pruning method: a way to decide what is removed. It is stateless; everything it needs is in its arguments.

    Attributes:
        name: The command, and what `prune` calls it.
        summary: One line for `prunekit --help`.
        examples: Commands that its own help shows.
        Config: The class of its settings.
        labelled: Whether it reads labels: `images` are then batches of images and their labels.
        inside_heads: Whether it looks into heads of attention: their widths are groups of the graph as well.
        baseline: Whether it is there to compare others with: a sweep leaves it out unless it is named.

    Examples:
        >>> import numpy as np, prunekit as pk
        >>> class First(pk.Method):
        ...     name, summary = "first", "Remove the first channels of each layer."
        ...     def plan(self, model, graph, config, images=None):
        ...         scores = {group.name: np.arange(group.size, dtype=float) for group in graph.groups}
        ...         return pk.plan_by_scores(graph, scores, config)
        >>> model = pk.load("prunekit:vgg_digits")
        >>> plan = First().plan(model, pk.inspect(model).graph, pk.Config(ratio={"features.0": 0.75}))
        >>> plan.keeps[0].group, min(plan.keeps[0].index) > 0
        ('features.0', True)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()
    Config: ClassVar[type[Config]] = Config
    labelled: ClassVar[bool] = False
    inside_heads: ClassVar[bool] = False
    baseline: ClassVar[bool] = False

    @abstractmethod
    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Return the plan for `model`, which stays unchanged.

        Args:
            model: The network.
            graph: The graph that `trace` read from it.
            config: The settings, an instance of the method's `Config`.
            images: Unlabelled calibration images, normalised: a tensor `(N, C, H, W)`, or batches of them; for a method
                that is `labelled`, batches of images and their labels `(N,)`.

        Raises:
            InputError: The settings cannot be used with this network, or there is nothing to prune.
        """

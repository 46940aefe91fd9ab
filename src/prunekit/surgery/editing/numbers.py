"""Numbers that modules keep about their widths, and that only other methods than the recorded forward read.

A block may keep its width in `self.c` and split by it in a second forward for export, or build a fused kernel of that
size. What the recorded forward reads is no matter: it holds its channels. For the rest, equal numbers prove nothing:
a width of 8 may be equal to a number of heads. So the evidence is that a method which runs in the original does not run
in the narrowed module, or gives another shape than its forward, and does with the number set.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.surgery.editing import attributes
from prunekit.surgery.execution.dispatch import DispatchMode
from prunekit.surgery.execution.outputs import tensors_of
from prunekit.surgery.execution.sources import Inputs, Source, skeleton, to_meta, transparent
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Mask

_log = logging.getLogger(__name__)

# Methods that take what the forward takes, and those that take nothing and rebuild the module.
_OTHER_FORWARDS = re.compile(r"forward_\w+")
_REBUILDS = re.compile(r"fuse\w*|\w+_fuse|reparam\w*|switch_to_deploy|get_equivalent_\w+")
_MOST_TRIALS = 64

Numbers = Mapping[str, Any]
Outcome = list[tuple[int, ...]] | Exception


@dataclass(frozen=True)
class Call:
    """Arguments that a module's forward was called with."""

    args: Inputs
    kwargs: Mapping[str, Any]


def follow_widths(model: nn.Module, small: nn.Module, graph: Graph, kept: Mask) -> None:
    """Set the numbers of modules of `small` without which methods fail that run in `model`.

    A method for which no number, or more than one way to set them, can be found is named in a warning.
    """
    news = _new_widths(graph, kept)
    methods = {name: own for name, module in small.named_modules() if (own := _methods(name, module))}
    parts = dict(small.named_modules())
    options = {name: found for name in methods if (found := _options(parts[name], news.get(name, {})))}
    if not options:
        return
    with transparent():
        before, after = _calls(model, options, graph), _calls(small, options, graph)
        wholes = dict(model.named_modules())
        for name in options.keys() & before.keys() & after.keys():
            trial = _Trial(wholes[name], before[name], parts[name], after[name], methods[name])
            _settle(name, parts[name], trial, options[name])


def _new_widths(graph: Graph, kept: Mask) -> dict[str, dict[int, set[int]]]:
    """Return, for each module, the widths in it that changed, and what became of them."""
    news: dict[str, dict[int, set[int]]] = {}
    for (parameter, dim), size in graph.sizes(kept).items():
        old, path = graph.shapes[parameter][dim], parameter
        while old != size and path:
            path = path.rpartition(".")[0]
            news.setdefault(path, {}).setdefault(old, set()).add(size)
    return news


def _options(module: nn.Module, news: Mapping[int, set[int]]) -> dict[str, list[Any]]:
    """Return the module's numbers that are equal to a width that changed, and the values that they might take."""
    found = {}
    for name, value in attributes.own_numbers(module).items():
        each = [value] if isinstance(value, int) else value
        if any(number in news for number in each):
            choices = itertools.product(*(sorted(news.get(number, {number})) for number in each))
            taken = list(itertools.islice(choices, _MOST_TRIALS))
            found[name] = [one[0] if isinstance(value, int) else type(value)(one) for one in taken]
    return found


@functools.cache
def _methods_of(kinds: tuple[type, ...]) -> tuple[str, ...]:
    names = {name for kind in kinds if not kind.__module__.startswith("torch.") for name in vars(kind)}
    matching = (n for n in sorted(names) if _OTHER_FORWARDS.fullmatch(n) or _REBUILDS.fullmatch(n))
    return tuple(name for name in matching if inspect.isroutine(getattr(kinds[0], name, None)))


def _methods(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the methods, beside its forward, that a module can be asked for; a whole network is not rebuilt."""
    found = _methods_of(type(module).__mro__)
    return found if name else tuple(method for method in found if not _REBUILDS.fullmatch(method))


def _calls(model: nn.Module, names: Mapping[str, Any], graph: Graph) -> dict[str, Call]:
    """Return the arguments of the first call of some modules' forwards, in a network that runs on the example."""
    for real in (False, True):
        source, calls = Source(model, real), dict[str, Call]()
        subject = source.subject()
        for name, module in subject.named_modules():
            if name in names:
                module.register_forward_pre_hook(functools.partial(_note, calls, name), with_kwargs=True)
        try:
            with DispatchMode():
                source.run(subject, source.inputs(graph.example))
        except Exception as error:  # it may need values
            _log.debug("no run to see what modules read: %s", error)
            continue
        return calls
    return {}


def _note(calls: dict[str, Call], name: str, _: nn.Module, args: Inputs, kwargs: dict[str, Any]) -> None:
    if name not in calls:
        calls[name] = Call(*to_meta((args, kwargs)))


class _Trial:
    """A module before and after its narrowing, asked for its methods with what its forward is called with."""

    def __init__(
        self, whole: nn.Module, whole_call: Call, part: nn.Module, part_call: Call, methods: Sequence[str]
    ) -> None:
        self._part, self._call = part, part_call
        before = {method: _outcome(whole, whole_call, method) for method in ("forward", *methods)}
        self._forward = _outcome(part, part_call, "forward")
        self._alike = {method for method, found in before.items() if found == before["forward"]}
        ran = [method for method, found in before.items() if not isinstance(found, Exception)]
        now = {method: _outcome(part, part_call, method) for method in ran}
        self.failing = [method for method, found in now.items() if isinstance(found, Exception)]
        self.differing = [m for m in ran if m in self._alike and m not in self.failing and now[m] != self._forward]

    def runs(self, method: str, numbers: Numbers) -> bool:
        """Return whether a method runs with some numbers set, and gives what the forward gives if it did originally."""
        found = _outcome(self._part, self._call, method, numbers)
        return not isinstance(found, Exception) and (method not in self._alike or found == self._forward)


def _outcome(module: nn.Module, call: Call, method: str, numbers: Numbers | None = None) -> Outcome:
    """Return the shapes a method of a copy of the module returns; those of the forward if it rebuilds the module."""
    subject = skeleton(module).eval()
    for name, value in (numbers or {}).items():
        setattr(subject, name, value)
    try:
        with DispatchMode():
            if _REBUILDS.fullmatch(method):
                getattr(subject, method)()
                method = "forward"
            output = getattr(subject, method)(*call.args, **call.kwargs)
    except Exception as error:  # it may take other arguments
        return error
    return [tuple(t.shape) for t in tensors_of(output).values()]


def _settle(name: str, module: nn.Module, trial: _Trial, options: Mapping[str, Sequence[Any]]) -> None:
    """Set the fewest numbers with which all methods run that have come to fail, if there is one way to do it."""
    if trial.failing and not _set(module, trial, trial.failing, options):
        methods = ", ".join(trial.failing)
        warnings.warn(f"'{name}' may not run any more beside its forward: {methods}", stacklevel=2)
    for method in trial.differing:  # equal shapes may have been chance
        _set(module, trial, [method], options)


def _set(module: nn.Module, trial: _Trial, methods: Sequence[str], options: Mapping[str, Sequence[Any]]) -> bool:
    for several in range(1, len(options) + 1):
        ways = [way for way in _ways(options, several) if all(trial.runs(method, way) for method in methods)]
        if len(ways) == 1:
            attributes.set_numbers(module, ways[0])
        if ways:
            return len(ways) == 1
    return False


def _ways(options: Mapping[str, Sequence[Any]], several: int) -> Iterator[dict[str, Any]]:
    """Return ways to set that many numbers at once; not all, where there are very many."""
    every = (
        dict(zip(names, values, strict=True))
        for names in itertools.combinations(options, several)
        for values in itertools.product(*(options[name] for name in names))
    )
    return itertools.islice(every, _MOST_TRIALS)

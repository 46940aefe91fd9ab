"""Parts of a network: which layers may be narrowed, and by how much, said by patterns of their names.

A pattern is that of a shell (`*`, `?`, `[...]`). It matches a layer by the layer's name, or by that of a module that
the layer is in: `layer3`, `layer3.*` and `layer3.0.conv1` are patterns alike.

Channels that are coupled belong to several layers. A pattern speaks for them only where it matches every layer whose
outputs they are: nothing that was not named becomes narrower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from prunekit.errors import InputError, SurgeryError, unknown_name
from prunekit.methods.base import Config
from prunekit.methods.budget import check_ratio
from prunekit.surgery import ChannelGroup, Graph, Member

_OUTSIDE = "--only does not name it"
_SHARED = "it shares its channels with layers that --only does not name"
_SKIPPED = "--skip names it, or a layer that shares its channels"
_NAMED = 3  # layers that a message names


def part_of(graph: Graph, only: Sequence[str], skip: Sequence[str]) -> Graph:
    """Return the graph with all channels frozen that are not to be removed.

    Args:
        graph: The network, or a part of it, which is then the whole again.
        only: Patterns of the layers that may become narrower; without any, all may.
        skip: Patterns of layers that stay as wide as they are, whatever `only` says.

    Raises:
        InputError: A pattern matches no layer, or nothing is left to be pruned.
    """
    graph = whole_of(graph)
    if not only and not skip:
        return graph
    known = graph.memo.setdefault(part_of, {})
    asked = (tuple(only), tuple(skip))
    if asked not in known:
        known[asked] = _restricted(graph, *asked)
        known[asked].memo[whole_of] = graph
    found: Graph = known[asked]
    return found


def whole_of(graph: Graph) -> Graph:
    """Return the graph that `part_of` has made one of."""
    whole: Graph = graph.memo.get(whole_of, graph)
    return whole


def ratios_by_group(graph: Graph, config: Config, able: Collection[str]) -> dict[str, float]:
    """Return the ratio of each channel group that the settings give one of its own, by the group's name.

    Where several patterns match, the last one counts. `able` are the groups that a method can prune: patterns speak for
    these alone.

    Raises:
        InputError: A pattern matches no layer or nothing that can be removed, or a ratio is out of range.
    """
    given = {**(config.ratio if isinstance(config.ratio, Mapping) else {}), **(config.ratio_of or {})}
    found: dict[str, float] = {}
    for pattern, ratio in given.items():
        found |= dict.fromkeys(_named_by(graph, pattern, able), check_ratio(ratio))
    return found


def _named_by(graph: Graph, pattern: str, able: Collection[str]) -> list[str]:
    """Return the names of the groups that a pattern, or the exact name of a layer that makes them, stands for."""
    with contextlib.suppress(SurgeryError):
        return [graph.group(pattern).name]
    _check(graph, [pattern], "--ratio-of")
    wide = set(graph.outputs())
    named = [group for group in graph.groups if all(_matches(name, [pattern]) for name in _narrowed(group, wide))]
    found = [group.name for group in named if group.name in able]
    if not found:
        why = next((group.reason for group in named if group.reason), None)
        why = why or ("this method does not prune it" if named else _coupled(graph, [pattern]))
        raise InputError(f"--ratio-of '{pattern}' names nothing that can be pruned: {why}")
    return found


def _restricted(graph: Graph, only: Sequence[str], skip: Sequence[str]) -> Graph:
    _check(graph, only, "--only")
    _check(graph, skip, "--skip")
    wide = set(graph.outputs())
    reasons = {
        number: reason
        for number, group in enumerate(graph.groups)
        if (reason := _obstacle(group, wide, only, skip)) is not None
    }
    _spread(graph, reasons)
    groups = tuple(_frozen(group, reasons.get(number)) for number, group in enumerate(graph.groups))
    if not any(group.free for group in groups):
        raise _nothing_left(graph, only, reasons)
    return replace(graph, groups=groups)


def _obstacle(group: ChannelGroup, wide: set[tuple[str, int]], only: Sequence[str], skip: Sequence[str]) -> str | None:
    """Return why a group stays whole, or None. What is skipped may be a norm that rides along as well as a layer."""
    if any(_matches(_layer(member), skip) for member in (*group.producers, *group.followers)):
        return _SKIPPED
    named = [_matches(name, only) for name in _narrowed(group, wide)]
    if not only or all(named):
        return None
    return _SHARED if any(named) else _OUTSIDE


def _spread(graph: Graph, reasons: dict[int, str]) -> None:
    """Add the groups that cannot lose channels unless those in `reasons` do.

    Groups that keep equal shares stay whole together; what a norm behind a stream keeps stays in the stream.
    """
    before = -1
    while before < len(reasons):
        before = len(reasons)
        for balance in graph.balancer.balances if graph.balancer else ():
            stuck = next((reasons[number] for number in balance.groups if number in reasons), None)
            if stuck is not None:
                reasons.update({number: stuck for number in balance.groups if number not in reasons})
        for link in graph.links:
            for private, stream in zip(graph.group_of[link.private], graph.group_of[link.stream], strict=True):
                if reasons.get(int(private)) == _SKIPPED and stream >= 0:
                    reasons.setdefault(int(stream), _SKIPPED)


def _frozen(group: ChannelGroup, reason: str | None) -> ChannelGroup:
    if reason is None:
        return group
    return replace(group, frozen={**dict.fromkeys(range(group.size), reason), **group.frozen})


def _narrowed(group: ChannelGroup, wide: set[tuple[str, int]]) -> list[str]:
    """Return the layers whose outputs a group is: `wide` are the slots of convolutions and linear layers.

    Elsewhere, as behind a norm that reads a stream, they are what makes the channels.
    """
    members = [m for m in (*group.producers, *group.followers) if (m.parameter, m.dim) in wide]
    return list(dict.fromkeys(_layer(member) for member in members or group.producers))


def _layer(member: Member) -> str:
    return member.module or member.parameter


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    """Return whether any pattern matches a layer, or a module that it is in."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in _path(layer))


def _path(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _layers(graph: Graph) -> list[str]:
    """Return all layers that make channels or hand them on."""
    members = (member for group in graph.groups for member in (*group.producers, *group.followers))
    return list(dict.fromkeys(_layer(member) for member in members))


def _check(graph: Graph, patterns: Sequence[str], flag: str) -> None:
    layers = _layers(graph)
    for pattern in patterns:
        if not any(_matches(layer, [pattern]) for layer in layers):
            near = pattern.rstrip("*?.") or pattern
            hint = unknown_name("layer", near, {name for layer in layers for name in _path(layer)}).hint
            raise InputError(f"{flag} '{pattern}' matches no layer", hint=hint)


def _nothing_left(graph: Graph, only: Sequence[str], reasons: Mapping[int, str]) -> InputError:
    """Return what is in the way: other layers of the same channels, or what holds them in any case."""
    held = [group.reason for number, group in enumerate(graph.groups) if number not in reasons and group.reason]
    why = held[0] if held else _coupled(graph, only) if _SHARED in reasons.values() else "--skip names all of it"
    return InputError(f"nothing is left to be pruned: {why}", hint="prunekit inspect lists the groups and their layers")


def _coupled(graph: Graph, patterns: Sequence[str]) -> str:
    """Return which layers share channels with those that patterns match, and are not matched."""
    wide = set(graph.outputs())
    for group in graph.groups:
        layers = _narrowed(group, wide)
        inside = [name for name in layers if _matches(name, patterns)]
        others = [name for name in layers if name not in inside]
        if inside and others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            return f"'{inside[0]}' shares its channels with {', '.join(others[:_NAMED])}{more}, which are not named"
    return "no channels that are followed are its outputs"

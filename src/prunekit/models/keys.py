"""Foreign state dicts: their keys, translated to those of the network that receives them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from prunekit.models.known import COUNTERS, TRAINING_HEADS

# Names that wrappers put into keys, in front of all or below what was wrapped: DataParallel, torch.compile, FSDP,
# activation checkpointing, DeepSpeed under Lightning.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# Usual name of the network inside the module that was trained (Lightning); `parts_that_fit` finds other names.
_HOLDER = "model"

# Levels of names that a network's prefix may have.
_DEEPEST = 4

# Other names of the same layers, applied in this order, one after another, until the network knows the key.
_ALIASES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), canonical)
    for pattern, canonical in (
        (r"^(linear|classifier|fc)\.", "fc."),
        (r"^fc([123])\.", r"ip\1."),
        (r"^feature\.", "features."),
        (r"^block(\d)\.layer\.", r"layer\1."),
        (r"\.(shortcut|convShortcut)\.", ".downsample."),
        (r"^bn1\.", "bn."),
        # torchvision's DenseNets were published with dots in these names
        (r"\.(norm|conv)\.([12])\.", r".\1\2."),
    )
)


def match_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict under the names that `model` uses, as far as they can be inferred.

    Names of wrappers are dropped, other names of the same layers are translated, and counters that older files lack
    (`num_batches_tracked`) start at zero. A key that still does not fit keeps its name, for the caller to report.
    """
    expected = model.state_dict()
    matched: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _canonical(key, expected)
        if name not in expected and (_is_counter(key) or TRAINING_HEADS.match(name)):
            continue
        matched[key if name in matched else name] = tensor
    for key, tensor in expected.items():
        if _is_new_counter(key) and key not in matched:
            matched[key] = torch.zeros((), dtype=tensor.dtype)
    return matched


def parts_that_fit(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the parts of `state` with exactly the keys of `model`, each by the prefix that it had in `state`.

    The training code may have held the network under any name beside others: `student.` and `teacher.`, or `net.` and a
    loss with weights of its own. Where the whole fits, and where nothing does, the whole is the only part, under "". A
    prefix that `model` has and the keys lack is added, and one that only some of them carry is removed.
    """
    expected = model.state_dict().keys()
    needed = {key for key in expected if not _is_new_counter(key)}

    def fits(part: Mapping[str, Tensor]) -> bool:
        return len(part) >= len(needed) > 0 and match_keys(model, part).keys() == expected

    if fits(state):
        return {"": dict(state)}
    found: dict[str, dict[str, Tensor]] = {}
    groups = by_prefix(state)
    for prefix, part in groups.items():
        if not prefix.startswith(tuple(found)) and fits(part):
            found[prefix] = part
    if found:
        return {prefix.removesuffix("."): part for prefix, part in found.items()}
    renamed = _renamed(state, needed, groups) if len(needed) <= len(state) <= len(expected) else ()
    return {"": next(filter(fits, renamed), dict(state))}


def _renamed(state: Mapping[str, Tensor], needed: set[str], prefixes: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield the state dict with a prefix that all of `needed` have, and without one that only some of its keys have."""
    yield from ({prefix + key: tensor for key, tensor in state.items()} for prefix in _common(needed))
    for prefix in prefixes:
        names = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        if len(names) == len(state) and needed <= names.keys():
            yield names


def classifier(model: nn.Module) -> str | None:
    """Return the name of the layer that makes the class scores: the linear layer or convolution registered last."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else None


def _canonical(key: str, expected: Mapping[str, Tensor]) -> str:
    """Return the model's name for `key`, without wrappers' names where the model does not know `key`."""
    for name in _unwrapped(key):
        candidate = name
        for pattern, canonical in _ALIASES:
            if candidate in expected:
                return candidate
            candidate = pattern.sub(canonical, candidate)
        if candidate in expected:
            return candidate
    return name


def _unwrapped(key: str) -> list[str]:
    """Return `key`, the same without its leading wrappers and holders in turn, and without wrappers further inside."""
    names, parts = [key], key.split(".")
    while len(parts) > 1 and (parts[0] in _WRAPPERS or parts[0] == _HOLDER):
        parts = parts[1:]
        names.append(".".join(parts))
    within = ".".join(part for part in parts if part not in _WRAPPERS)
    return names if within == names[-1] else [*names, within]


def by_prefix(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the entries by each dotted prefix of their keys, shortest first; each keeps the rest of its key."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        for prefix in _prefixes(key):
            groups.setdefault(prefix, {})[key.removeprefix(prefix)] = tensor
    return dict(sorted(groups.items(), key=lambda group: (group[0].count("."), group[0])))


def _prefixes(key: str) -> list[str]:
    parts = key.split(".", _DEEPEST)
    return [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]


def _common(keys: Collection[str]) -> list[str]:
    """Return the prefixes that all keys share."""
    return [prefix for prefix in _prefixes(next(iter(keys))) if all(key.startswith(prefix) for key in keys)]


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] in COUNTERS


def _is_new_counter(key: str) -> bool:
    """Return whether this is a counter that files from before torch 0.4.1 lack."""
    return key.endswith("num_batches_tracked")

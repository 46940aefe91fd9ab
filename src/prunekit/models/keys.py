"""State dicts of other people: their keys, brought to those of the network that is to receive them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What wrappers put in front of every key: DataParallel, torch.compile, Lightning modules.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

# Other names of the same layers. Tried in this order, one upon the other, until the network knows the key.
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

# Counters that wrappers and profilers leave in a state dict.
_COUNTERS = frozenset({"n_averaged", "total_ops", "total_params"})

# The auxiliary heads of Inception networks, which only training uses.
_TRAINING_HEADS = re.compile(r"^(aux[12]|AuxLogits)\.")


def match_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that `model` uses, as far as they can be told.

    Prefixes of wrappers go, other names of the same layers are translated, and counters that older files lack
    (`num_batches_tracked`) start at zero. What still does not fit keeps its name, for the caller
    to report.
    """
    expected = model.state_dict()
    matched: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _canonical(key, expected)
        if name not in expected and (_is_counter(key) or _TRAINING_HEADS.match(name)):
            continue
        matched[key if name in matched else name] = tensor
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked") and key not in matched:
            matched[key] = torch.zeros((), dtype=tensor.dtype)
    return matched


def classifier(model: nn.Module) -> str | None:
    """The name of the layer that makes the class scores: the last linear one or convolution, as it was registered."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else None


def _canonical(key: str, expected: Mapping[str, Tensor]) -> str:
    """The model's name for `key`; without its wrappers' prefixes when the model has no such name."""
    name = key
    while name not in expected and name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    candidate = name
    for pattern, canonical in _ALIASES:
        if candidate in expected:
            return candidate
        candidate = pattern.sub(canonical, candidate)
    return candidate if candidate in expected else name


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] in _COUNTERS

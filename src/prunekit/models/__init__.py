"""Networks by name: the bundled architectures, torchvision's, and the user's own code.

The bundled ones take `num_classes`, `in_channels`, `width` (a factor for the channels) and, where they have batch
norms, `gamma` (the initial scale: 0.5 for the three architectures of Network Slimming, 1 for the others). `vgg*` take
`config` (see `vgg.CifarVGG`), `resnet*_cifar` take `shortcut=pad|conv` and `relu=output|input`.

Examples:
    >>> import prunekit as pk
    >>> model = pk.models.build("resnet20_cifar", {"num_classes": 100, "width": 0.5})
    >>> model.fc.out_features, pk.models.default_input("resnet20_cifar", {}).shape
    (100, (3, 32, 32))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.lazy import lazily

if TYPE_CHECKING:
    from prunekit.models.arguments import parse_args
    from prunekit.models.keys import by_prefix, classifier, match_keys, parts_that_fit
    from prunekit.models.resolve import build, canonical, default_input, is_code, names, takes
    from prunekit.models.sources import source_digests
    from prunekit.models.user_code import beside, missing_code, source_file, told

_HOME = {
    "prunekit.models.arguments": ("parse_args",),
    "prunekit.models.keys": ("by_prefix", "classifier", "match_keys", "parts_that_fit"),
    "prunekit.models.resolve": ("build", "canonical", "default_input", "is_code", "names", "takes"),
    "prunekit.models.sources": ("source_digests",),
    "prunekit.models.user_code": ("beside", "missing_code", "source_file", "told"),
}

__all__ = [
    "beside",
    "build",
    "by_prefix",
    "canonical",
    "classifier",
    "default_input",
    "is_code",
    "match_keys",
    "missing_code",
    "names",
    "parse_args",
    "parts_that_fit",
    "source_digests",
    "source_file",
    "takes",
    "told",
]

if not TYPE_CHECKING:  # to a type checker, it would make every name a name of this module
    __getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)

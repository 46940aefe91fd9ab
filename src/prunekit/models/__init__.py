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

from prunekit.models.arguments import parse_args
from prunekit.models.keys import classifier, match_keys, parts_that_fit
from prunekit.models.resolve import build, canonical, default_input, is_code, names, takes
from prunekit.models.sources import source_digests
from prunekit.models.user_code import beside, missing_code, source_file, told

__all__ = [
    "beside",
    "build",
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

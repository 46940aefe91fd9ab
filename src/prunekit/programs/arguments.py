"""Check arguments that operators trust or allocate by against the tensors that come with them.

Kernels read past the end of a buffer when they are called below the functions that check for it: with statistics of
another length than the channels, a scale that does not fit the output, or keys and values of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_Given = Mapping[str, Any]

# The largest stride, padding, dilation, kernel or output size, and the most parts that a tensor is split into.
_MOST = 1 << 16
_MOST_PARTS = 1 << 12


def _window(given: _Given) -> str | None:
    """Check convolution, pooling, resampling and padding, where every integer is a size."""
    for name, value in given.items():
        if any(abs(number) > _MOST for number in _whole(value)):
            return f"{name}={value}"
    return None


def _whole(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _whole(item)
    elif isinstance(value, int):
        yield value


def _batch_norm(given: _Given) -> str | None:
    channels = given["input"].size(1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(given.get(name), Tensor) and given[name].shape != (channels,):
            return f"a {name} of {given[name].numel()} for {channels} channels"
    return None


def _group_norm(given: _Given) -> str | None:
    sizes, groups = [given[name] for name in ("N", "C", "HxW")], given["group"]
    channels = sizes[1]
    if given["input"].numel() != sizes[0] * sizes[1] * sizes[2] or groups < 1 or channels % groups:
        return f"sizes {sizes} in {groups} groups"
    if any(isinstance(given[name], Tensor) and given[name].numel() != channels for name in ("weight", "bias")):
        return f"weights for another number than {channels} channels"
    return None


def _resampling(given: _Given) -> str | None:
    x: Tensor = given.get("self", given.get("input"))
    if given["output_size"] is None:
        return None  # factors, which become sizes in the operator beneath
    sizes = list(given["output_size"])
    scales = [value for name, value in given.items() if name.startswith("scales")]
    for before, after, scale in zip(x.shape[2:], sizes, scales, strict=False):
        if scale is not None and not abs(before * scale - after) <= 1:
            return f"a scale of {scale} from {before} to {after}"
    return _window({"output_size": sizes})


def _attention(given: _Given) -> str | None:
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if not query.dim() == key.dim() == value.dim() == 4 or 0 in (*query.shape, *key.shape):
        return "queries, keys and values that are none"
    n, heads, _, width = query.shape
    if key.shape != value.shape or (n, heads, key.size(2), width) != key.shape:
        return "queries, keys and values that do not suit each other"
    scores = (*query.shape[:3], key.size(2))
    if mask is not None and (mask.dim() > 4 or not _broadcasts(mask.shape, scores)):
        return f"a mask of {tuple(mask.shape)} for {scores}"
    return None


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(small), reversed(large), strict=False))


def _fourier(given: _Given) -> str | None:
    x: Tensor = given["self"]
    dims = [dim % x.dim() for dim in given["dim"]] if x.dim() else []
    last = given.get("last_dim_size")
    if not dims or len(set(dims)) != len(dims) or (last is not None and last // 2 + 1 != x.size(dims[-1])):
        return f"dimensions {given['dim']} of {tuple(x.shape)}"
    if given["normalization"] not in (0, 1, 2):
        return f"normalization={given['normalization']}"
    return None


def _parts(given: _Given) -> str | None:
    """Check `split` and `unbind`, which allocate a tensor with its own bookkeeping for each part."""
    x: Tensor = given["self"]
    size = x.size(given["dim"]) if x.dim() else 0
    each = given.get("split_size", 1)
    parts = len(each) if isinstance(each, list) else size // max(each, 1)
    return f"{parts} parts" if parts > _MOST_PARTS else None


def _strided(given: _Given) -> str | None:
    x: Tensor = given["self"]
    size, stride, offset = list(given["size"]), list(given["stride"]), given["storage_offset"]
    start = x.storage_offset() if offset is None else offset
    if min((start, *size, *stride)) < 0 or len(size) != len(stride):
        return f"sizes {size} and strides {stride}"
    last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= x.untyped_storage().nbytes() // x.element_size():
        return f"sizes {size} and strides {stride} beyond its tensor"
    return None


def _recurrent(given: _Given) -> str | None:
    """Check recurrent layers: the kernel trusts the lengths of its lists and the shapes in them."""
    if "input" not in given:
        return "packed sequences"
    states = given["hx"] if isinstance(given["hx"], list) else [given["hx"]]
    x, ways, layers = given["input"], 1 + given["bidirectional"], given["num_layers"]
    width = states[0].size(-1)
    batch = x.shape[:-1][0 if given["batch_first"] else 1 :][:1] if x.dim() == 3 else ()
    if any(state.shape != (layers * ways, *batch, width) for state in states):
        return "states of other shapes"
    rows, expected = given["params"][0].size(0) if given["params"] else 0, []
    for layer in range(min(layers, len(given["params"]))):
        read = width * ways if layer else x.size(-1)
        expected += ways * [(rows, read), (rows, width), *(2 * [(rows,)] if given["has_biases"] else [])]
    found = [tuple(weight.shape) for weight in given["params"]]
    return None if found == expected and rows in (width, 3 * width, 4 * width) else f"weights of the shapes {found}"


_WINDOWED = """
    convolution _convolution convolution_overrideable mkldnn_convolution avg_pool2d avg_pool3d max_pool2d_with_indices
    max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d im2col
    col2im constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal diag_embed
    tril triu grid_sampler_2d grid_sampler_3d
    """
_NORMALISING = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional
    _batch_norm_no_update
    """
_RESAMPLING = """
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    """
CHECKS: dict[str, Callable[[_Given], str | None]] = {
    **dict.fromkeys(_WINDOWED.split(), _window),
    **dict.fromkeys(_NORMALISING.split(), _batch_norm),
    **dict.fromkeys(_RESAMPLING.split(), _resampling),
    "native_group_norm": _group_norm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _fourier),
    **dict.fromkeys(("split", "unsafe_split", "unbind"), _parts),
    "as_strided": _strided,
    **dict.fromkeys(("gru", "lstm", "rnn_relu", "rnn_tanh"), _recurrent),
}

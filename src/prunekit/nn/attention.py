"""Attention of PyTorch and torchvision, freed of the rule that all heads together are as wide as the embedding.

Their code has as many channels in the heads together as the embedding has, so that no head can go. The modules here
read the width of one head instead, and take as many heads as the weights have; nothing else differs: parameters and
names stay. They stand in for the original ones while a network is traced, and for good where heads have gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.errors import InputError


class HeadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al., NeurIPS 2017) with any number of heads of a given width.

    Takes and returns what `torch.nn.MultiheadAttention` does.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  # a hint to what the mask holds
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the weights of the heads or their average where these are needed."""
        batched, first = query.dim() == 3, self.batch_first
        q, k, v = (self._heads_first(t) for t in self._projected(query, key, value))
        bias = self._bias(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each of the layout of the inputs."""
        packed = self.in_proj_weight is not None
        if packed and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if packed:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads_first(self, x: Tensor) -> Tensor:
        """Return `(N, heads, positions, width)` of what is laid out as the inputs are."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    @staticmethod
    def _bias(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Return what is added to the scores: masks of positions, and of keys that are padding."""
        bias = None
        if mask is not None:
            bias = _additive(mask, q)
            bias = bias.view(q.size(0), -1, *bias.shape[1:]) if bias.dim() == 3 else bias
        if padding is not None:
            own = _additive(padding, q).view(q.size(0), 1, 1, -1)
            bias = own if bias is None else bias + own
        return bias


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as values to add: a true entry hides a position."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)


def _freed_multihead(module: nn.Module) -> type[nn.Module] | None:
    assert isinstance(module, nn.MultiheadAttention)
    extras = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return None if extras else HeadAttention


def _freed_torchvision(name: str) -> Callable[[nn.Module], type[nn.Module]]:
    def freed(_: nn.Module) -> type[nn.Module]:
        from prunekit.nn import torchvision_attention as ours  # it imports torchvision, which the network has loaded

        found: type[nn.Module] = getattr(ours, name)
        return found

    return freed


_FREED: dict[tuple[str, str], Callable[[nn.Module], type[nn.Module] | None]] = {
    ("torch.nn.modules.activation", "MultiheadAttention"): _freed_multihead,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _freed_torchvision("WindowAttention"),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): _freed_torchvision("CosineWindowAttention"),
    ("torchvision.models.maxvit", "RelativePositionalMultiHeadAttention"): _freed_torchvision("GridAttention"),
}


def freed_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the type that stands in for a module's, None where none does or its forward is not its type's own."""
    kind = type(module)
    found = _FREED.get((kind.__module__, kind.__qualname__))
    return None if found is None or "forward" in vars(module) else found(module)


def free_all(model: nn.Module, holding: Collection[str] | None = None) -> None:
    """Turn modules of `model` into their stand-ins, in place: all, or those that hold a parameter among `holding`."""
    for name, module in model.named_modules():
        freed = freed_type(module)
        if freed is not None and (holding is None or any(_within(parameter, name) for parameter in holding)):
            _turn(module, freed)


def _within(parameter: str, module: str) -> bool:
    return not module or parameter.startswith(f"{module}.")


def _turn(module: Any, freed: type[nn.Module]) -> None:
    if "head_dim" not in vars(module):
        module.head_dim = module.qkv.out_features // 3 // module.num_heads
    elif isinstance(module, nn.MultiheadAttention):
        module._qkv_same_embed_dim = False  # which keeps layers around it from their fused paths
    module.__class__ = freed


def freed_modules(model: nn.Module) -> list[str]:
    """Return the names of the stand-ins in a network."""
    theirs = sys.modules.get("prunekit.nn.torchvision_attention")
    kinds = (HeadAttention, *(theirs.FREED if theirs else ()))
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def count_heads(model: nn.Module) -> None:
    """Set the number of heads that each stand-in says it has to that of its weights."""
    for name in freed_modules(model):
        module: Any = model.get_submodule(name)
        reads = next(layer for layer in ("out_proj", "proj", "merge") if hasattr(module, layer))
        count = "n_heads" if reads == "merge" else "num_heads"
        setattr(module, count, getattr(module, reads).weight.size(1) // module.head_dim)


def restore_freed(model: nn.Module, names: Sequence[str]) -> None:
    """Turn those modules into their stand-ins, in place.

    Raises:
        InputError: there is no such module, or nothing stands in for it.
    """
    modules = dict(model.named_modules())
    for name in names:
        freed = freed_type(modules[name]) if name in modules else None
        if freed is None:
            raise InputError(f"the file frees the heads of '{name}', which is no attention that this is known for")
        _turn(modules[name], freed)

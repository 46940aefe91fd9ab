"""Rules for operations of the user's own: the one table that is open.

A rule is a claim, and the proof of each surgery is what it is held against: a wrong one is refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from prunekit.errors import InputError, unknown_name
from prunekit.surgery.graph import labels as lb
from prunekit.surgery.graph.recording import Call
from prunekit.surgery.tracing.recorder import Recorder, Rule
from prunekit.surgery.tracing.rules import attention, elementwise, layers, views

KNOWN: Mapping[str, Rule] = {**elementwise.TABLE, **views.TABLE, **layers.TABLE, **attention.TABLE}
_taught: dict[str, Rule] = {}


def table() -> dict[str, Rule]:
    """Return all rules, those of the user included."""
    return {**KNOWN, **_taught}


class RuleError(InputError):
    """Failure of a rule of the user's."""


class OpCall:
    """One call of an operation, as a rule given to `set_op_rule` sees it: what has which channels.

    Channels are 1-D integer tensors: entry `i` names the channel at index `i` of a dimension, 0 none that could go.
    They can be sliced, joined and reordered as the operation does with what they name. Whatever reaches a result that
    the rule says nothing about may not be removed.

    Attributes:
        args: The positional arguments. Tensors among them have shapes, and as a rule no values.
        kwargs: The arguments given by name.
        results: The tensors that the operation returned.
        where: The dotted name of the module whose forward called it.

    Examples:
        >>> import prunekit as pk
        >>> def reversed_channels(call: pk.OpCall) -> None:
        ...     channels = call.channels(call.args[0], dim=1)
        ...     call.pass_on(call.results[0], channels.flip(0), dim=1)
    """

    def __init__(self, recorder: Recorder, call: Call) -> None:
        self.args, self.kwargs, self.where = call.args, call.kwargs, call.where
        self.results = tuple(call.results)
        self._recorder, self._said = recorder, set[int]()

    def channels(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the channels of a tensor along `dim`, `(size of dim,)`; other dimensions are positions.

        Raises:
            InputError: They lie along other dimensions, or there is no such dimension.
        """
        inside = -tensor.dim() <= dim < tensor.dim()
        found = self._recorder.channels(tensor, dim % tensor.dim(), self.where) if inside else None
        if found is None:
            raise InputError(f"no channels lie along dimension {dim} of a tensor of shape {tuple(tensor.shape)}")
        return found

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Tie channels at the same place of two equally long vectors: they stay or go together."""
        self._recorder.ledger.unify(first, second, self.where)

    def freeze(self, channels: Tensor, reason: str) -> None:
        """Freeze these channels, for a reason that `inspect` shows."""
        self._recorder.ledger.freeze(channels, f"{reason} in {self.where}")

    def pass_on(self, result: Tensor, channels: Tensor, dim: int) -> None:
        """Pass these channels on to `result` along `dim`; its other dimensions are positions.

        Raises:
            InputError: They are not as many as the result has entries there.
        """
        shape = tuple(result.shape)
        if not -len(shape) <= dim < len(shape) or channels.shape != (shape[dim],):
            raise InputError(f"channels of shape {tuple(channels.shape)} along dimension {dim} of a result of {shape}")
        self._recorder.set(result, lb.along(channels.contiguous(), dim % result.dim(), shape))
        self._said.add(id(result))

    def _complete(self) -> bool:
        """Return whether the rule has said of every result which channels it has."""
        return self._said >= {id(result) for result in self.results}


def _channelwise(call: OpCall, dim: int) -> None:
    """Tie each channel of a result to the same channel of the operands, on which alone it depends."""
    first, *others = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    channels = call.channels(first, dim)
    for other in others:
        if other.dim() == 1 and other.numel() == channels.numel():
            call.tie(channels, call.channels(other, 0))
        elif other.dim() == first.dim() and other.size(dim) == channels.numel():
            call.tie(channels, call.channels(other, dim))
        elif other.numel() > 1:
            raise InputError(f"it has {channels.numel()} channels, and an operand of shape {tuple(other.shape)}")
    for result in call.results:
        call.pass_on(result, channels, dim)


def set_op_rule(
    op: str | Callable[..., Any],
    rule: Literal["pointwise", "channelwise"] | Callable[[OpCall], None] | None,
    *,
    dim: int = 1,
) -> None:
    """Teach the tracer what an operation of your own does with channels; until then what reaches it is not pruned.

    For operations made with `torch.library`, in this process from now on. A rule is a claim: every surgery still
    proves its result, and one that a wrong rule has led astray is refused.

    Args:
        op: The operation, such as `"mylib::scale"` or `torch.ops.mylib.scale`, registered already.
        rule: `pointwise`: each element of the results depends on the elements at its place of the operands, which
            broadcast. `channelwise`: each channel does, along `dim` of the first operand, of others of its rank and
            of the results; operands of one dimension have one entry a channel (scales, biases). Or a function that
            says it with an `OpCall`. None forgets the rule.
        dim: Where `channelwise` operations have channels, by default in `(N, C, ...)`.

    Raises:
        InputError: No such operation or rule, or prunekit sees through the operation already.

    Examples:
        >>> import torch, prunekit as pk
        >>> @torch.library.custom_op("docs::halved", mutates_args=())
        ... def halved(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 2
        >>> halved = halved.register_fake(torch.empty_like) or halved
        >>> pk.set_op_rule("docs::halved", "pointwise")
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1)
        ...     def forward(self, x):
        ...         return self.second(torch.ops.docs.halved(self.first(x)))
        >>> len(pk.inspect(Net(), torch.zeros(1, 3, 8, 8)).groups[0].free)
        8
    """
    name = _name_of(op)
    if rule is None:
        _taught.pop(name, None)
    else:
        _taught[name] = _as_rule(name, rule, dim)


def _as_rule(op: str, rule: str | Callable[[OpCall], None], dim: int) -> Rule:
    if rule == "pointwise":
        return elementwise.pointwise
    if rule == "channelwise":
        return _guarded(op, lambda call: _channelwise(call, dim))
    if callable(rule):
        return _guarded(op, rule)
    raise unknown_name("rule", str(rule), ("pointwise", "channelwise"))


def _guarded(op: str, rule: Callable[[OpCall], None]) -> Rule:
    def run(recorder: Recorder, call: Call) -> None:
        seen = OpCall(recorder, call)
        try:
            rule(seen)
        except Exception as error:  # whatever a stranger's rule raises
            reason = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise RuleError(f"the rule of the operation '{op}' does not hold in {call.where}: {reason}") from error
        if not seen._complete():
            elementwise.unknown(recorder, call)

    return run


def _name_of(op: str | Callable[..., Any]) -> str:
    """Return the name that the tracer knows the operation by.

    Raises:
        InputError: there is no such operation, or it needs no rule.
    """
    given = op if isinstance(op, str) else str(getattr(op, "_qualified_op_name", getattr(op, "_qualname", op)))
    space, _, rest = given.partition("::")
    packet = getattr(getattr(torch.ops, space, None), rest.partition(".")[0], None) if rest else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise InputError(
            f"no operation '{given}' is registered",
            hint="name it as in torch.library, such as 'mylib::scale', after the code that registers it was imported",
        )
    name = packet._qualified_op_name.removeprefix("aten::").rstrip("_")
    overloads = [getattr(packet, overload) for overload in packet.overloads()]  # type: ignore[no-untyped-call]
    if name in KNOWN or any(torch.Tag.pointwise in overload.tags for overload in overloads):
        raise InputError(f"the operation '{given}' has a rule of prunekit's", hint="it needs no other")
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    if all(overload.has_kernel_for_dispatch_key(implicit) for overload in overloads):
        raise InputError(
            f"the operation '{given}' is made of others, which the tracer sees in its place",
            hint="where some of these are unknown to it, give rules for them",
        )
    return name

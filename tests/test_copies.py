"""What modules may hold and be, and what is kept of it: in copies, and in the network that pruning returns."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import prunekit as pk
from prunekit.errors import InputError
from prunekit.surgery.copying import copied

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cbr(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A small network with a place in the middle for something odd."""

    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = cbr(3, 16)
        self.odd = odd or nn.Identity()
        self.b = cbr(16, 12)
        self.head = nn.Linear(12, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1)
                nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.odd(self.a(x))).mean((2, 3)))


def slim(model: nn.Module, x: Any = X) -> nn.Module:
    """Prune, and look whether something went, and whether the original is as it was."""
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    small: nn.Module = pk.prune("slim", model, x, ratio=0.4).model
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


class Holder(nn.Module):
    """Passes its input on, scaled, and keeps what a test gives it."""

    def __init__(self, keep: Callable[[Holder, Tensor], Any]) -> None:
        super().__init__()
        self.query = nn.Conv2d(16, 1, 1)
        self.kept: Any = None
        self._keep = keep

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.query(x))
        self.kept = self._keep(self, weight)
        return x * weight


class Scale(torch.autograd.Function):
    last: Any = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        Scale.last = ctx
        return x * 2

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


KEPT: dict[str, Callable[[Holder, Tensor], Any]] = {
    "map": lambda _, t: t,
    "list": lambda _, t: [t, [t * 2]],
    "dict": lambda _, t: {"map": t, "more": {1: (t, 2)}},
    "object": lambda _, t: types.SimpleNamespace(map=t),
    "view": lambda _, t: t[:, :, 1:3],
    "detached": lambda _, t: t.detach(),
    "graph": lambda _, t: t.grad_fn,
    "context": lambda _, t: Scale.apply(t).grad_fn,
    "subclass": lambda _, t: t.as_subclass(Marked),
}


class Marked(Tensor):
    note: Any


@pytest.mark.parametrize("kind", KEPT)
def test_tensors_with_a_history(kind: str) -> None:
    model = Net(Holder(KEPT[kind]))
    model(X).sum().backward()
    small = slim(model)
    small(X).sum().backward()
    assert small.odd.query.weight.grad is not None


def test_a_kept_tensor_is_copied_without_its_history() -> None:
    model = Net(Holder(KEPT["list"]))
    model(X)
    kept, again = model.odd.kept, copied(model).odd.kept
    assert torch.equal(again[0], kept[0])
    assert again[0] is not kept[0]
    assert not again[0].requires_grad


def test_tensors_of_another_class_are_copied_with_what_they_carry() -> None:
    model = Net()
    model.mean = torch.ones(3).as_subclass(Marked)
    model.mean.note = ["kept"]
    again: Any = copied(copied(model)).mean
    assert type(again) is Marked
    assert again is not model.mean
    assert again.note == ["kept"]
    assert again.note is not model.mean.note


def test_a_network_of_inference_mode_becomes_an_ordinary_one() -> None:
    with torch.inference_mode():
        model, cached = Net(), torch.ones(3)
    model.cached = cached
    model.register_buffer("more", cached)
    small = slim(model)
    small(X).sum().backward()
    assert all(not tensor.is_inference() for tensor in small.state_dict().values())


def test_what_is_pruned_in_inference_mode_is_an_ordinary_network() -> None:
    with torch.inference_mode():
        small = slim(Net())
    small(X).sum().backward()
    assert all(not tensor.is_inference() for tensor in small.state_dict().values())


def test_lazy_layers() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 3))

    with pytest.raises(InputError, match=r"'0\.weight' does not exist yet: LazyConv2d"):
        pk.prune("slim", net(), X, ratio=0.4)
    used = net()
    used(X)
    slim(used)
    with pytest.raises(InputError, match="does not exist yet"):
        pk.inspect(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), X)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_torchscript_is_refused_unless_it_has_no_weights(make: Callable[[Any], nn.Module]) -> None:
    with pytest.raises(InputError, match="the network is TorchScript"):
        pk.prune("slim", make(Net().eval()), X, ratio=0.4)
    model = Net().eval()
    model.b = torch.jit.script(model.b)
    with pytest.raises(InputError, match="'b' is TorchScript"):
        pk.prune("slim", model, X, ratio=0.4)
    slim(Net(torch.jit.script(nn.Hardswish())))


@pytest.mark.parametrize(
    "held",
    [
        threading.Lock(),
        threading.local(),
        Path(__file__).open(),  # noqa: SIM115
        (i for i in range(3)),
        lambda x: x,
        sys,
        torch.Generator(),
        types.SimpleNamespace(lock=threading.RLock(), more=[1]),
        {"file": io.StringIO("text"), "lock": threading.Lock()},
        iter([1]),
    ],
    ids=["lock", "local", "file", "generator", "lambda", "module", "random", "object", "dict", "iterator"],
)
def test_attributes_that_cannot_be_copied_are_shared(held: Any) -> None:
    model = Net()
    model.held, model.b.held = held, [held]
    small = slim(model)
    assert type(small.held) is type(held)
    assert type(small.b.held[0]) is type(held)
    if isinstance(held, types.SimpleNamespace):  # as little as possible is shared
        assert small.held is not held
        assert small.held.lock is held.lock


class Child(nn.Module):
    """A block that knows the network that it stands in, in one of the ways that people have."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def know(self, parent: nn.Module) -> None:
        conv = self.conv
        known = {
            "list": [parent],
            "weak": weakref.ref(parent),
            "weak in a list": [weakref.ref(parent)],
            "proxy": weakref.proxy(parent),
            "closure": lambda x: conv(x),
            "closure over a method": (lambda run: lambda x: run(x))(self.conv.forward),
            "default": lambda x, conv=conv: conv(x),
            "method": self.conv.forward,
        }
        object.__setattr__(self, "known", known[self.way] if self.way != "parent" else parent)

    def forward(self, x: Tensor) -> Tensor:
        known = self.known
        if self.way in ("list", "parent", "weak", "weak in a list", "proxy"):
            known = known[0] if isinstance(known, list) else known
            parent: Any = known() if isinstance(known, weakref.ref) else known
            assert type(known) is not Net or self.way in ("list", "parent")
            return parent.odd.conv(x)
        return known(x)


@pytest.mark.parametrize(
    "way",
    ["parent", "list", "weak", "weak in a list", "proxy", "closure", "closure over a method", "default", "method"],
)
def test_what_means_the_network_means_the_copy(way: str) -> None:
    model = Net(Child(way))
    model.odd.know(model)
    small = slim(model)
    x = torch.randn(2, small.odd.conv.in_channels, 4, 4)
    with torch.no_grad():
        small.odd.conv.weight.zero_()
        small.odd.conv.bias.fill_(3.0)
    assert bool((small.odd(x) == 3).all())
    model.eval()
    assert model(X).shape == (2, 4)


def test_a_hook_that_writes_on_its_network_writes_on_the_copy() -> None:
    model = Net()
    model.seen = None
    model.a.register_forward_hook(lambda *seen: setattr(model, "seen", seen[2]))
    small = slim(model)
    assert model.seen is None
    small(X)
    assert small.seen.size(1) == small.b[0].in_channels
    assert model.seen is None


def state(module: nn.Module) -> dict[str, Any]:
    """What pruning must leave as it is."""
    numbers = {name for name, value in vars(module).items() if isinstance(value, int) and not isinstance(value, bool)}
    own = {name: value for name, value in vars(module).items() if name not in numbers and not name.startswith("_")}
    hooks = {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value is not None}
    tensors = {
        name: (type(t), t.dtype, t.requires_grad, t.is_contiguous(memory_format=torch.channels_last) and t.dim() == 4)
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None
    }
    return {"own": sorted(own), "numbers": sorted(numbers), "hooks": hooks, "tensors": tensors, "on": module.training}


def check_same_state(model: nn.Module, small: nn.Module) -> None:
    have = dict(small.named_modules())
    for name, module in model.named_modules():
        assert state(have[name]) == state(module), name
    assert list(have) == [name for name, _ in model.named_modules()]


class Made(Net):
    """Cannot be made without an argument."""

    def __new__(cls, *, name: str) -> Made:
        assert name
        return super().__new__(cls)

    def __init__(self, *, name: str) -> None:
        super().__init__()
        self.name = name


class Deepcopied(Net):
    """Copies itself without looking at anything but its state dict."""

    def __deepcopy__(self, memo: Any) -> Deepcopied:
        new = Deepcopied()
        new.load_state_dict(self.state_dict())
        return new


class Kept(Net):
    def __deepcopy__(self, memo: Any) -> Kept:
        return self


class Reduced(Net):
    def __reduce__(self) -> Any:
        return (Reduced, ())


class Stated(Net):
    """Leaves something out of its state, and cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {"scale": 1.0}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cache"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.cache["scale"]


class Slotted(Net):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "scale", 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


KINDS: dict[str, Callable[[], nn.Module]] = {
    "ordinary": Net,
    "own deepcopy": Deepcopied,
    "deepcopy that returns itself": Kept,
    "own reduce": Reduced,
    "own state": Stated,
    "slots": Slotted,
    "own making": lambda: Made(name="made"),
    "graph module": lambda: fx.symbolic_trace(Net()),
    "inside": lambda: nn.Sequential(Stated(), fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_every_kind_of_module_keeps_its_state(kind: str, training: bool) -> None:
    model = KINDS[kind]().train(training)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].train(not training)
    layers[0].weight.requires_grad_(False)
    layers[1].to(memory_format=torch.channels_last)
    layers[1].register_forward_hook(print_nothing)
    model.register_forward_pre_hook(print_nothing)
    model.register_full_backward_hook(print_nothing)
    model.note = {"kept": [1, 2]}
    place: Any
    for place in (layers[0].weight, norms[0].bias):
        place.decay = False
    small = slim(model)
    assert small is not model
    assert type(small).__name__ == type(model).__name__
    assert small.note == model.note
    assert small.note is not model.note
    assert sum(hasattr(p, "decay") for p in small.parameters()) == 2
    check_same_state(model, small)
    small(X)


def print_nothing(*_: Any) -> None:
    """A hook."""


def test_parameters_lie_in_memory_as_they_did() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 4, 3), nn.Flatten(), nn.LazyLinear(5)
    )
    x = torch.randn(2, 3, 8, 8, 8)
    model(x)
    model[3].to(memory_format=torch.channels_last_3d)
    model[5].weight = nn.Parameter(model[5].weight.detach().t().contiguous().t())
    nn.init.uniform_(model[1].weight)
    small = slim(model, x)
    assert small[3].weight.size(1) < 16
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert small[5].weight.t().is_contiguous()
    assert small[0].weight.is_contiguous()


def test_a_bias_that_is_made_is_as_frozen_as_its_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1, bias=False)).eval()
    nn.init.uniform_(model[1].weight)
    nn.init.ones_(model[1].bias)
    for frozen in (True, False):
        small = slim(model.requires_grad_(not frozen))
        assert small[3].bias.requires_grad is not frozen


@pytest.mark.parametrize("training", [False, True])
def test_a_feature_extractor_with_two_graphs(training: bool) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.odd(self.a(x)))
            return self.head(nn.functional.dropout(x, 0.5, self.training).mean((2, 3)))

    model = create_feature_extractor(Dropping(), ["head"]).train(training)
    model.head.register_forward_hook(print_nothing)
    graph = "train_graph" if training else "eval_graph"
    small = pk.prune("slim", model, X, ratio=0.4).model
    check_same_state(model, small)
    assert small.graph is getattr(small, graph)
    assert small.graph is not model.graph
    assert small.graph.owning_module is small
    for mode in (True, False):
        assert small.train(mode)(X)["head"].shape == (2, 4)
        same = torch.equal(small(X)["head"], small(X)["head"])
        assert same is not mode


def test_what_can_be_pickled_can_be_pickled_pruned() -> None:
    model = Net(Holder(KEPT["map"]))
    model.odd._keep = keep_nothing
    model.register_forward_hook(print_nothing)
    small = slim(model)
    again = pickle.loads(pickle.dumps(small))
    small.eval(), again.eval()
    assert torch.equal(again(X), small(X))


def test_hooks_that_transformers_puts_in_again_are_left_out() -> None:
    def capture(*_: Any) -> None:
        pass

    capture.__module__ = "transformers.utils.output_capturing"
    model = Net()
    model.b.register_forward_hook(capture)
    model.b.register_forward_hook(print_nothing)
    model._output_capturing_hooks_installed = True
    small = slim(model)
    assert list(small.b._forward_hooks.values()) == [print_nothing]
    assert not hasattr(small, "_output_capturing_hooks_installed")
    assert model._output_capturing_hooks_installed
    assert len(model.b._forward_hooks) == 2
    pickle.dumps(small)


def keep_nothing(*_: Any) -> None:
    """What a module keeps of a forward."""


EXAMPLES: dict[str, Callable[[], Any]] = {
    "subclass": lambda: X.as_subclass(Marked),
    "parameter": lambda: nn.Parameter(X),
    "numpy": X.numpy,
    "in a tuple": lambda: (X.numpy(),),
    "with a history": lambda: X.clone().requires_grad_() * 2,
    "inference mode": lambda: made_in_inference_mode(),
    "meta": lambda: X.to("meta"),
    "channels-last": lambda: X.to(memory_format=torch.channels_last),
    "picture": lambda: picture(),
}


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.randn(2, 3, 8, 8)


def picture() -> Tensor:
    from torchvision.tv_tensors import Image

    return Image(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_of_every_kind(kind: str) -> None:
    example = EXAMPLES[kind]()
    small = slim(Net().eval(), example)
    assert small(X).shape == (2, 4)
    assert pk.inspect(Net(), example).cost.params > 0


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (X.double(), "torch.float64 where the network's weights are torch.float32"),
        (X.half(), "torch.float16 where the network's weights are torch.float32"),
        (X.byte(), "torch.uint8 where the network's weights are torch.float32"),
        (X.byte().numpy(), "torch.uint8 where"),
        (X.numpy().astype(np.float64), "torch.float64 where"),
    ],
)
def test_an_example_of_another_type_is_refused_unless_the_network_converts_it(example: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pk.prune("slim", Net(), example, ratio=0.4)
    assert caught.value.hint == "pass x.to(torch.float32)"

    class Converting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.head.weight.dtype))

    slim(Converting(), example)


def test_parallel_wrappers_go() -> None:
    small = slim(nn.DataParallel(Net()))
    assert type(small) is Net
    assert type(slim(nn.Sequential(nn.DataParallel(Net())))[0]) is Net


@pytest.fixture
def compiling() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(model: Net) -> nn.Module:
    return torch.compile(model, backend=refuse)


def compile_part(model: Any) -> nn.Module:
    model.b = torch.compile(model.b, backend=refuse)
    return model


def compile_nested(model: Net) -> nn.Module:
    model.b[0] = torch.compile(model.b[0], backend=refuse)
    return compile_part(model)


def compile_in_place(model: Net) -> nn.Module:
    model.b.compile(backend=refuse)
    model.compile(backend=refuse)
    return model


def compile_forward(model: Any) -> nn.Module:
    model.b.forward = torch.compile(model.b.forward, backend=refuse)
    return model


def compile_function(model: Net) -> nn.Module:
    model.odd = Calling(torch.compile(nn.functional.relu, backend=refuse))
    return model


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def refuse(*_: Any) -> Any:
    raise AssertionError("something was compiled")


@pytest.mark.parametrize(
    "way", [compile_whole, compile_part, compile_nested, compile_in_place, compile_forward, compile_function]
)
@pytest.mark.usefixtures("compiling")
def test_nothing_is_compiled(way: Callable[[Net], nn.Module]) -> None:
    small = slim(way(Net()))
    assert type(small) is Net
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in Net().named_parameters()]
    if way is not compile_function:
        assert small.eval()(X).shape == (2, 4)


def test_a_copy_may_be_made_of_what_was_copied_before() -> None:
    model = Net(Child("closure"))
    model.odd.know(model)
    twice = copied(copied(model))
    assert torch.equal(twice.eval()(X), model.eval()(X))
    assert copy.deepcopy(twice) is not twice

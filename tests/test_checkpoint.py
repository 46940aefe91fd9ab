"""Saving and loading: the artefact, and every kind of other people's files."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import prunekit as pk
from prunekit import checkpoint, models
from prunekit.checkpoint import artefact
from prunekit.errors import InputError
from prunekit.spec import InputSpec, Origin, origin_of, remember

SMALL = {"config": "4-M-6", "num_classes": 3}


@pytest.fixture
def model() -> nn.Module:
    """A small network with weights, statistics and an origin worth keeping."""
    model = models.build("vgg_digits", SMALL)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    spec = InputSpec((1, 8, 8), (0.3,), (0.2,))
    return remember(model, Origin("vgg_digits", SMALL, spec, ("a", "b", "c"), ({"method": "slim"},)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 1, 8, 8)


def in_memory(model: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    checkpoint.save(model, stream)
    stream.seek(0)
    return stream


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def slimmed(model: nn.Module) -> nn.Module:
    """The same network with fewer channels, as surgery leaves it."""
    first, norm, second = (model.get_submodule(f"features.{index}") for index in (0, 1, 4))
    first.weight = nn.Parameter(first.weight[[0, 2, 3]].detach())
    first.out_channels = norm.num_features = second.in_channels = 3
    for name in ("weight", "bias", "running_mean", "running_var"):
        kept = getattr(norm, name)[[0, 2, 3]].detach()
        setattr(norm, name, nn.Parameter(kept) if name in ("weight", "bias") else kept)
    second.weight = nn.Parameter(second.weight[:, [0, 2, 3]].detach())
    return model


def test_what_is_saved_comes_back_whole(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    checkpoint.save(model.train(), path)
    loaded = checkpoint.load(path)
    assert not loaded.training
    assert origin_of(loaded) == origin_of(model)
    assert torch.equal(loaded(x), model.eval()(x))
    assert listing(tmp_path) == ["net.pt"]


def test_a_slimmed_network_comes_back_in_its_shape(model: nn.Module, x: Tensor) -> None:
    small = slimmed(model)
    loaded = checkpoint.load(in_memory(small))
    assert torch.equal(loaded(x), small(x))
    assert loaded.get_submodule("features.0").out_channels == 3


def test_logits_are_equal_in_a_fresh_process(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    path, logits = tmp_path / "net.pt", tmp_path / "logits.pt"
    checkpoint.save(slimmed(model), path)
    torch.save((x, model(x).detach()), logits)
    code = (
        "import sys, torch; from prunekit.checkpoint import load;"
        "x, logits = torch.load(sys.argv[2], weights_only=True);"
        "assert torch.equal(load(sys.argv[1])(x), logits);"
        "assert set(torch.load(sys.argv[1], weights_only=True)) == {'prunekit', 'state_dict'}"
    )
    subprocess.run([sys.executable, "-c", code, path, logits], check=True)


def test_two_saves_give_the_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    for name in ("one.pt", "another.pt"):
        checkpoint.save(model, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()
    assert (tmp_path / "one.pt").read_bytes() == in_memory(model).getvalue()
    assert in_memory(checkpoint.load(in_memory(model))).getvalue() == in_memory(model).getvalue()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(model: nn.Module, dtype: torch.dtype) -> None:
    loaded = checkpoint.load(in_memory(model.to(dtype)))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_a_file_holds_no_more_than_its_weights(model: nn.Module) -> None:
    plain = len(in_memory(model).getvalue())
    large = torch.zeros(1000, 6, 4, 3, 3)
    large[7] = model.get_submodule("features.4").weight.detach()
    model.get_submodule("features.4").weight = nn.Parameter(large[7])
    assert len(in_memory(model).getvalue()) == plain


@pytest.mark.parametrize(
    "name",
    [
        "lenet_300_100",
        "resnet20_cifar",
        "squeezenet1_1",
        # reads tensors while it is built, so that it cannot be built without memory
        pytest.param("regnet_y_400mf", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("wrn40_4", "preresnet164", "densenet40_12")),
    ],
)
def test_architectures_come_back(name: str) -> None:
    args = {"width": 0.25} if name in models.names() else {"num_classes": 3}
    model = models.build(name, args)
    origin = origin_of(model)
    assert origin is not None
    assert origin.input is not None
    x = torch.randn(2, *origin.input.shape)
    assert torch.equal(checkpoint.load(in_memory(model))(x), model(x))


def test_names_without_a_file() -> None:
    model = checkpoint.load("prunekit:resnet20", arch_args={"shortcut": "conv"}, input_spec=InputSpec((3, 32, 32)))
    assert origin_of(model) == Origin("resnet20_cifar", {"shortcut": "conv"}, InputSpec((3, 32, 32)))
    with pytest.raises(InputError, match="did you mean squeezenet1_1"):
        checkpoint.load("torchvision:squeezenet1_2")


def test_the_caller_has_the_last_word_on_the_input(model: nn.Module) -> None:
    spec = InputSpec((1, 8, 8), (0.5,), (0.5,))
    origin = origin_of(checkpoint.load(in_memory(model), input_spec=spec))
    assert origin is not None
    assert origin.input == spec
    assert origin.history == ({"method": "slim"},)


def test_an_older_format_is_migrated(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    old = in_memory(model)
    monkeypatch.setattr(artefact, "FORMAT", artefact.FORMAT + 1)
    monkeypatch.setitem(artefact.MIGRATIONS, artefact.FORMAT - 1, lambda header: {**header, "classes": ["x"]})
    origin = origin_of(checkpoint.load(old))
    assert origin is not None
    assert origin.classes == ("x",)


# Other people's files


def state_files(model: nn.Module) -> dict[str, Any]:
    """Contents that training scripts write, all for the same weights."""
    state = model.state_dict()
    return {
        "plain": state,
        "nested": {"epoch": 3, "state_dict": state, "best": 0.5},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "data parallel": {f"module.{key}": tensor for key, tensor in state.items()},
        "compiled": {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        "both": OrderedDict((f"module._orig_mod.{key}", tensor) for key, tensor in state.items()),
        "old": {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")},
        "half": {key: t.half() if t.is_floating_point() else t for key, t in state.items()},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(model: nn.Module, x: Tensor, tmp_path: Path, zipped: bool) -> None:
    for kind, content in state_files(model).items():
        path = tmp_path / "other.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        loaded = checkpoint.load(path, arch="vgg_digits", arch_args={"config": "4-M-6"})
        assert torch.allclose(loaded(x), model(x), atol=1e-2 if kind == "half" else 0), kind
        origin = origin_of(loaded)
        assert origin is not None
        assert origin.arch_args == SMALL


def test_safetensors(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    assert torch.equal(checkpoint.load(path, arch="vgg_digits", arch_args=SMALL)(x), model(x))
    with pytest.raises(InputError, match="does not say its architecture"):
        checkpoint.load(path)


def test_keys_that_do_not_fit_are_listed(model: nn.Module) -> None:
    state = model.state_dict()
    state["head.weight"] = state.pop("fc.weight")
    state["features.0.weight"] = torch.zeros(5, 1, 3, 3)
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    with pytest.raises(InputError) as caught:
        checkpoint.load(stream, arch="vgg_digits", arch_args=SMALL)
    message = str(caught.value)
    assert "1 missing (fc.weight)" in message
    assert "1 unexpected (head.weight)" in message
    assert "1 of another shape (features.0.weight (5, 1, 3, 3) for (4, 1, 3, 3))" in message
    assert len(message.splitlines()) == 2


class Own(nn.Module):
    """A network of somebody's own, which pickles by reference to this module."""

    def __init__(self) -> None:
        super().__init__()
        self.ip1 = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ip1(x)
        return out


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickled_module_needs_trust(form: str) -> None:
    own, stream = Own(), io.BytesIO()
    if form == "plain":
        pickle.dump(own, stream)
    else:
        torch.save(own, stream, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match=rf"refused.*{__name__}\.Own") as caught:
        checkpoint.load(io.BytesIO(stream.getvalue()))
    assert "--trust-pickle" in str(caught.value)
    loaded = checkpoint.load(io.BytesIO(stream.getvalue()), trust_pickle=True)
    x = torch.randn(3, 2)
    assert torch.equal(loaded(x), own(x))
    assert origin_of(loaded) is None


def test_a_trusted_module_can_be_told_its_architecture() -> None:
    stream = io.BytesIO()
    torch.save(nn.DataParallel(models.build("lenet_300_100")), stream)
    stream.seek(0)
    origin = origin_of(checkpoint.load(stream, arch="lenet_300_100", trust_pickle=True))
    assert origin == Origin("lenet_300_100", {}, InputSpec((1, 28, 28)))


class Shapes(nn.Module):
    """Sizes, constants, splits, several results, scalars and device arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("hidden", torch.arange(4.0).view(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        pooled, _ = torch.max(right * self.scale + self.hidden, dim=1, keepdim=True)
        ones = torch.ones(x.shape[0], 1, x.shape[2], x.shape[3], device=x.device)
        flat = torch.cat((left, pooled, ones), 1).view(x.shape[0], -1)
        return flat.to(torch.float64).sum(1, keepdim=True) / (x.shape[0] * 2 + 1) + torch.tensor(3.0)


def exported(model: nn.Module, shape: tuple[int, ...], *, any_batch: bool) -> io.BytesIO:
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},) if any_batch else None
    stream = io.BytesIO()
    torch.export.save(torch.export.export(model.eval(), (torch.randn(shape),), dynamic_shapes=sizes), stream)
    stream.seek(0)
    return stream


def test_an_exported_program_is_run_as_it_is(model: nn.Module, x: Tensor) -> None:
    loaded = checkpoint.load(exported(model, (2, 1, 8, 8), any_batch=True))
    assert torch.equal(loaded(x), model(x))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert origin_of(loaded) == Origin("", input=InputSpec((1, 8, 8)))


def test_an_exported_program_with_sizes_and_constants() -> None:
    net, x = Shapes(), torch.randn(7, 2, 5, 5)
    assert torch.equal(checkpoint.load(exported(net, (3, 2, 5, 5), any_batch=True))(x), net(x))


def test_an_exported_program_of_a_fixed_batch_takes_any(model: nn.Module, x: Tensor) -> None:
    loaded = checkpoint.load(exported(model, (2, 1, 8, 8), any_batch=False))
    assert torch.allclose(loaded(x), model(x))
    assert torch.equal(loaded(x[:2]), model(x[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0", "shufflenet_v2_x0_5", "vit_b_32", "swin_t"])
def test_exported_torchvision_networks(name: str) -> None:
    net, x = models.build(name), torch.randn(1, 3, 224, 224)
    loaded = checkpoint.load(exported(net, (1, 3, 224, 224), any_batch=False))
    with torch.inference_mode():
        assert torch.allclose(loaded(x), net(x), atol=1e-5)


# Architectures that are the user's code

CODE = """
from pathlib import Path
from torch import nn
Path(__file__).with_suffix(".ran").touch()

def net(width=4):
    tied = nn.Linear(width, width)
    return nn.Sequential(nn.Linear(2, width), tied, nn.ReLU(), tied)
"""


@pytest.fixture
def saved_code(tmp_path: Path) -> tuple[Path, str]:
    """A saved network of a user's own file, and that file's callable; the file leaves a mark when it runs."""
    source = tmp_path / "net.py"
    source.write_text(CODE)
    arch = f"{source}:net"
    checkpoint.save(models.build(arch, {"width": 3}), tmp_path / "net.pt")
    (tmp_path / "net.ran").unlink()
    return tmp_path / "net.pt", arch


def test_a_files_code_is_not_run_unasked(saved_code: tuple[Path, str]) -> None:
    path, arch = saved_code
    with pytest.raises(InputError, match="not run unasked") as caught:
        checkpoint.load(path)
    assert f"--arch) {arch}" in str(caught.value)
    assert not path.with_suffix(".ran").exists()


def test_named_code_is_built_with_the_stored_arguments(saved_code: tuple[Path, str]) -> None:
    path, arch = saved_code
    loaded = checkpoint.load(path, arch=arch)
    assert loaded.get_submodule("1").weight.shape == (3, 3)
    # parameters that were tied stay tied
    assert len(list(loaded.parameters())) == 4
    assert origin_of(loaded) == Origin(arch, {"width": 3})


def test_changed_code_is_a_warning_while_the_weights_fit(saved_code: tuple[Path, str]) -> None:
    path, arch = saved_code
    Path(arch.rpartition(":")[0]).write_text(CODE + "\n# a comment\n")
    with pytest.warns(UserWarning, match="not the code that its weights were saved with"):
        checkpoint.load(path, arch=arch)


def test_changed_code_is_said_when_the_weights_do_not_fit(saved_code: tuple[Path, str]) -> None:
    path, arch = saved_code
    Path(arch.rpartition(":")[0]).write_text(CODE.replace("Sequential(", "Sequential(tied, "))
    with pytest.raises(InputError, match="net has changed since"):
        checkpoint.load(path, arch=arch)


def test_moved_code_is_the_same_code(saved_code: tuple[Path, str], tmp_path: Path) -> None:
    path, arch = saved_code
    moved = Path(arch.rpartition(":")[0]).rename(tmp_path / "moved.py")
    checkpoint.load(path, arch=f"{moved}:net")


def test_missing_code_is_one_clear_error(saved_code: tuple[Path, str]) -> None:
    path, arch = saved_code
    Path(arch.rpartition(":")[0]).unlink()
    with pytest.raises(InputError, match="cannot read the architecture's code"):
        checkpoint.load(path, arch=arch)


# Writing


def test_nothing_is_overwritten_without_force(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_text("mine")
    path.chmod(0o640)
    with pytest.raises(InputError, match="exists already"):
        checkpoint.save(model, path)
    assert path.read_text() == "mine"
    checkpoint.save(model, path, force=True)
    assert path.stat().st_mode & 0o777 == 0o640
    checkpoint.load(path)


def test_a_link_stays_a_link(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "real.pt").touch()
    (tmp_path / "link.pt").symlink_to("real.pt")
    checkpoint.save(model, tmp_path / "link.pt", force=True)
    assert (tmp_path / "link.pt").is_symlink()
    checkpoint.load(tmp_path / "real.pt")


@pytest.mark.parametrize(
    ("target", "message"),
    [("", "it is a folder"), ("no/such/folder/net.pt", "there is no folder"), ("n" * 300, "cannot write")],
)
def test_targets_that_cannot_be_written(model: nn.Module, tmp_path: Path, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checkpoint.save(model, tmp_path / target)
    assert listing(tmp_path) == []


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> BinaryIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        checkpoint.atomic_write(tmp_path / "net.pt", lambda stream: stream.write(b"x"))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_file_survives_a_failed_write(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "net.pt"
    path.write_text("old")

    def fill_the_disk(stream: BinaryIO) -> None:
        stream.write(b"half of the new")
        raise failure

    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        checkpoint.atomic_write(path, fill_the_disk, force=True)
    if isinstance(failure, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["net.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_device(model: nn.Module) -> None:
    with pytest.raises(InputError, match="No space left on device"):
        checkpoint.save(model, "/dev/full")


def test_a_pipe_is_written_to_directly(model: nn.Module, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    checkpoint.save(model, pipe)
    out, _ = reader.communicate()
    assert out == in_memory(model).getvalue()


def test_networks_that_cannot_be_saved() -> None:
    with pytest.raises(InputError, match="does not say which architecture"):
        checkpoint.save(nn.Linear(2, 2), io.BytesIO())
    with pytest.raises(InputError, match="unknown architecture"):
        checkpoint.save(nn.Linear(2, 2), io.BytesIO(), arch="linear")
    with pytest.raises(InputError, match="cannot be stored as JSON"):
        checkpoint.save(remember(nn.Linear(2, 2), Origin("lenet_300_100", {"width": nn})), io.BytesIO())


def test_a_network_can_be_told_its_architecture() -> None:
    net = models.build("lenet_300_100")
    own = nn.Module()
    for name, module in net.named_children():
        own.add_module(name, module)
    stream = io.BytesIO()
    checkpoint.save(own, stream, arch="lenet_300_100")
    stream.seek(0)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(checkpoint.load(stream)(x), net(x))


def test_size_and_normalisation_can_be_stated_alone() -> None:
    model = pk.load("prunekit:resnet20", mean=0.5, std=(0.2, 0.3, 0.4), input_size=(48, 64))
    origin = origin_of(model)
    assert origin is not None
    assert origin.input == InputSpec((3, 48, 64), (0.5,) * 3, (0.2, 0.3, 0.4))
    assert not origin.input.assumed
    whole = pk.load("prunekit:resnet20", input_spec=InputSpec((3, 16, 16)), mean=0.4, std=0.2)
    assert pk.inspect(whole).graph.example_shapes == ((1, 3, 16, 16),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": (0.1, 0.2)}, "mean has 2 values, the images have 3 channels"),
        ({"std": 0.0}, "std must be positive, found 0"),
        ({"input_size": (3, 3, 3, 3)}, "is not a size"),
        ({"input_size": -1}, "is not a size"),
    ],
)
def test_inputs_that_make_no_sense_are_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pk.load("prunekit:resnet20", **given)

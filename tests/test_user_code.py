"""Code of the user's that imports its neighbours, as by `python file.py`; nobody else's imports are touched."""

from __future__ import annotations

import hashlib
import importlib
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.errors import InputError

BLOCKS = """
from torch import nn
def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), Act())
class Act(nn.ReLU):
    pass
"""

NET = """
from torch import nn
from blocks import block

class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.body = block(3, 8)
        self.fc = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def _imports_are_as_they_were(tmp_path: Path) -> Iterator[None]:
    """What a test imports by a plain name goes again; `sys.path` and the command line must not have changed."""
    path, argv = list(sys.path), list(sys.argv)
    yield
    assert (sys.path, sys.argv) == (path, argv)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, which is not on `sys.path`, as with a console script."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay(root: Path, files: dict[str, str]) -> None:
    """Write `files`, by their names below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def relative(dots: str, where: str = "blocks") -> str:
    """`NET` with its neighbour imported relatively."""
    return NET.replace("from blocks", f"from {dots}{where}")


LAYOUTS = {
    "beside": ({"net.py": NET, "blocks.py": BLOCKS}, "net.py:Net"),
    "in a folder": ({"lib/net.py": NET, "lib/blocks.py": BLOCKS}, "lib/net.py:Net"),
    "with spaces": ({"my nets/the net.v2.py": NET, "my nets/blocks.py": BLOCKS}, "my nets/the net.v2.py:Net"),
    "package": (
        {"nets/__init__.py": "", "nets/net.py": relative("."), "nets/blocks.py": BLOCKS},
        "nets/net.py:Net",
    ),
    "nested packages": (
        {
            "zoo/__init__.py": "",
            "zoo/common/__init__.py": "",
            "zoo/common/blocks.py": BLOCKS,
            "zoo/nets/__init__.py": "from .net import Net",
            "zoo/nets/net.py": relative("..", "common.blocks"),
        },
        "zoo/nets/net.py:Net",
    ),
    "a package itself": (
        {"nets/__init__.py": "from .net import Net", "nets/net.py": relative("."), "nets/blocks.py": BLOCKS},
        "nets/__init__.py:Net",
    ),
    "relative without __init__": (
        {"a/nets/net.py": relative("..", "common.blocks"), "a/common/blocks.py": BLOCKS},
        "a/nets/net.py:Net",
    ),
    "package, named from its root": (
        {"nets/__init__.py": "", "nets/net.py": relative("", "nets.blocks"), "nets/blocks.py": BLOCKS},
        "nets/net.py:Net",
    ),
    "package, absolute": ({"nets/__init__.py": "", "nets/net.py": NET, "nets/blocks.py": BLOCKS}, "nets/net.py:Net"),
    "from the working folder": (
        {"lib/net.py": relative("", "shared.blocks"), "shared/blocks.py": BLOCKS},
        "lib/net.py:Net",
    ),
    "dotted": ({"nets/__init__.py": "", "nets/net.py": relative("."), "nets/blocks.py": BLOCKS}, "nets.net:Net"),
    "dotted without __init__": ({"nets/net.py": relative("."), "nets/blocks.py": BLOCKS}, "nets.net:Net"),
    "the package fails": (
        {"nets/__init__.py": "import nowhere_to_be_found", "nets/net.py": NET, "nets/blocks.py": BLOCKS},
        "nets/net.py:Net",
    ),
    "own path": (
        {
            "net.py": "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'lib'))\n" + NET,
            "lib/blocks.py": BLOCKS,
        },
        "net.py:Net",
    ),
    "imported in a circle": (
        {"net.py": NET + "\nimport check\n", "blocks.py": BLOCKS, "check.py": "import net\nassert net.Net\n"},
        "net.py:Net",
    ),
}


@pytest.mark.parametrize(("files", "arch"), LAYOUTS.values(), ids=LAYOUTS)
def test_neighbours_are_found(here: Path, files: dict[str, str], arch: str) -> None:
    lay(here, files)
    for classes in (5, 7):  # the second time, everything is imported already
        assert models.build(arch, num_classes=classes)(torch.zeros(1, 3, 4, 4)).shape == (1, classes)
    assert not list(here.rglob("__pycache__"))


def test_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, LAYOUTS["nested packages"][0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    models.build("../zoo/nets/net.py:Net")


def test_a_link_leads_to_the_files_neighbours(here: Path) -> None:
    lay(here, {"real/net.py": NET, "real/blocks.py": BLOCKS})
    (here / "link.py").symlink_to(here / "real" / "net.py")
    (here / "folder").symlink_to(here / "real")
    models.build("link.py:Net")
    models.build("folder/net.py:Net")


def width(arch: str) -> int:
    return len(models.build(arch).body[0].weight)


def test_each_folder_has_neighbours_of_its_own(here: Path) -> None:
    lay(here, {"a/net.py": NET, "a/blocks.py": BLOCKS, "b/net.py": NET})
    lay(here, {"b/blocks.py": BLOCKS.replace("outputs, 3", "2 * outputs, 3").replace("2d(outputs", "2d(2 * outputs")})
    assert [width(f"{folder}/net.py:Net") for folder in "abab"] == [8, 16, 8, 16]


def test_each_folder_has_paths_of_its_own(here: Path) -> None:
    net = LAYOUTS["own path"][0]["net.py"]
    lay(here, {"a/net.py": net, "a/lib/blocks.py": BLOCKS, "b/net.py": net})
    lay(
        here,
        {"b/lib/blocks.py": BLOCKS.replace("outputs, 3", "2 * outputs, 3").replace("2d(outputs", "2d(2 * outputs")},
    )
    assert [width(f"{folder}/net.py:Net") for folder in "abab"] == [8, 16, 8, 16]


def test_an_edited_neighbour_is_read_again(here: Path) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    assert width("net.py:Net") == 8
    lay(here, {"blocks.py": BLOCKS.replace("outputs, 3", "2 * outputs, 3").replace("2d(outputs", "2d(2 * outputs")})
    assert width("net.py:Net") == 16


def test_a_neighbour_hides_an_installed_package_from_its_folder_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ModuleType("blocks")
    installed.__file__ = str(Path(torch.__file__).parent / "blocks.py")
    monkeypatch.setitem(sys.modules, "blocks", installed)
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    assert (width("net.py:Net"), width("net.py:Net")) == (8, 8)
    assert sys.modules["blocks"] is installed


def test_a_neighbour_with_the_name_of_a_standard_module(here: Path) -> None:
    lay(here, {"net.py": "import copy\ncopy.deepcopy\n" + relative("", "this"), "this.py": BLOCKS, "copy.py": "1 / 0"})
    models.build("net.py:Net")
    assert "this" not in sys.modules


@pytest.mark.parametrize("stem", ["copy", "this", "torch"])
def test_a_file_with_the_name_of_another_module(here: Path, stem: str) -> None:
    before = sys.modules.get(stem)
    lay(
        here,
        {f"{stem}.py": "class Net(__import__('torch').nn.Linear):\n    def __init__(self): super().__init__(2, 3)"},
    )
    assert models.build(f"{stem}.py:Net").out_features == 3
    assert sys.modules.get(stem) is before


def test_imports_that_wait_until_the_code_is_called(here: Path) -> None:
    late = (
        NET.replace("from blocks import block\n", "")
        .replace("self.body", "from blocks import block; self.body", 1)
        .replace("return self.fc", "import later; return later.one * self.fc")
    )
    lay(here, {"net.py": late, "blocks.py": BLOCKS, "later.py": "one = 1"})
    models.build("net.py:Net")(torch.zeros(1, 3, 4, 4))


def test_a_script_sees_no_command_line_and_prints_beside_the_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsing = "import argparse\nprint(argparse.ArgumentParser().parse_args())\n"
    lay(here, {"net.py": parsing + NET, "blocks.py": BLOCKS})
    models.build("net.py:Net")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Namespace()\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import nowhere_to_be_found",
            r"net.py failed: ModuleNotFoundError.*net.py, line 1.*\n.*what brings 'nowhere_to",
        ),
        ("import blocks", r"ZeroDivisionError: division by zero \(blocks.py, line 2\)"),
        ("raise SystemExit(3)", r"ended the program \(exit status 3\)\n.*__main__"),
        ("def Net(: pass", r"SyntaxError: .*\(net.py, line 1\)"),
        ("from .blocks import block", "ZeroDivisionError"),
        ("from .nothing import block", "No module named"),
        ("def Net(): import nowhere_to_be_found", r"net.py:Net failed.*\n.*what brings 'nowhere_to"),
        ("def Net(): exit(2)", r"net.py:Net failed.*exit status 2"),
        ("def Net(): raise RuntimeError('out of luck')", r"out of luck \(net.py, line 1\)"),
    ],
)
def test_errors_say_whose_they_are(here: Path, code: str, message: str) -> None:
    lay(here, {"net.py": code, "blocks.py": "\n1 / 0"})
    with pytest.raises(InputError, match=message):
        models.build("net.py:Net")


# Whole networks, pickled by the name of the module that their classes are in


def pickled(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, module: str = "net") -> None:
    """A network of `folder`/net.py, saved whole by a process that calls its module `module`."""
    with monkeypatch.context() as there:
        there.syspath_prepend(folder)
        found = importlib.import_module("net")
        there.setitem(sys.modules, module, found)
        found.Net.__module__ = module
        torch.save(found.Net(), file)
    for name in ("net", "blocks"):
        del sys.modules[name]


def test_a_trusted_network_finds_its_class(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS, "runs/mark": ""})
    pickled(here, here / "runs" / "whole.pt", monkeypatch)
    assert checkpoint.load("runs/whole.pt", trust_pickle=True)(torch.zeros(1, 3, 4, 4)).shape == (1, 5)


def test_a_trusted_network_finds_its_class_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"net.py": NET, "blocks.py": BLOCKS})
    pickled(tmp_path, tmp_path / "whole.pt", monkeypatch)
    checkpoint.load(tmp_path / "whole.pt", trust_pickle=True)
    with pytest.raises(InputError, match=r"No module named 'net'\n.*in the folder that holds it"):
        checkpoint.load(io.BytesIO((tmp_path / "whole.pt").read_bytes()), trust_pickle=True)


def test_nothing_beside_an_untrusted_file_is_imported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    pickled(here, here / "whole.pt", monkeypatch)
    lay(here, dict.fromkeys(("net.py", "blocks.py", "torch.py", "collections.py"), "open('ran', 'w')"))
    with pytest.raises(InputError, match=r"refused.*net\.Net"):
        checkpoint.load("whole.pt")
    assert not (here / "ran").exists()


def test_a_network_pickled_by_a_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    pickled(here, here / "whole.pt", monkeypatch, module="__main__")
    with pytest.raises(InputError, match=r"Net.*__main__.*\n.*path/to/script.py"):
        checkpoint.load("whole.pt", trust_pickle=True)
    main = sys.modules["__main__"]
    assert isinstance(checkpoint.load("whole.pt", arch="net.py:Net", trust_pickle=True), nn.Module)
    assert sys.modules["__main__"] is main


def test_a_script_brings_its_neighbours_along(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"src/net.py": NET, "src/blocks.py": BLOCKS})
    pickled(here / "src", here / "whole.pt", monkeypatch, module="__main__")
    found = checkpoint.load("whole.pt", arch="src/net.py:Net", trust_pickle=True)
    assert isinstance(found, nn.Module)


def test_a_pickle_that_ends_the_program(tmp_path: Path) -> None:
    class Leaves:
        def __reduce__(self) -> tuple[object, tuple[int]]:
            return sys.exit, (4,)

    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Leaves()))
    with pytest.raises(InputError, match="cannot be unpickled"):
        checkpoint.load(tmp_path / "x.pkl", trust_pickle=True)


# prunekit's own files


def test_a_saved_network_is_read_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"nets/__init__.py": "", "nets/net.py": relative("."), "nets/blocks.py": BLOCKS, "away/mark": ""})
    checkpoint.save(models.build("nets/net.py:Net"), "net.pt")
    monkeypatch.chdir(here / "away")
    with pytest.raises(InputError, match=r"not run unasked: nets/net.py:Net"):
        checkpoint.load("../net.pt")
    with pytest.raises(InputError, match=r"cannot read.*nets/net.py.*\n.*--arch"):
        checkpoint.load("../net.pt", arch="nets/net.py:Net")
    checkpoint.load("../net.pt", arch="../nets/net.py:Net")


@pytest.mark.parametrize("layout", ["beside", "package", "nested packages", "package, named from its root", "own path"])
def test_changed_neighbours_are_told(here: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    files, arch = LAYOUTS[layout]
    lay(here / "a", files)
    lay(here / "a", {"unrelated.py": "1 / 0"})
    monkeypatch.chdir(here / "a")
    checkpoint.save(models.build(arch), "net.pt")
    (here / "a").rename(here / "b")
    monkeypatch.chdir(here / "b")
    lay(here / "b", {"unrelated.py": "2 / 0"})
    checkpoint.load("net.pt", arch=arch)  # neither moving nor what is not imported changes anything
    blocks = next((here / "b").rglob("blocks.py"))
    blocks.write_text(BLOCKS.replace("Act(nn.ReLU)", "Act(nn.SiLU)"))
    if layout == "own path":  # not where imports are looked for by reading
        checkpoint.load("net.pt", arch=arch)
        return
    with pytest.warns(UserWarning, match="not the code that its weights were saved with"):
        checkpoint.load("net.pt", arch=arch)
    blocks.unlink()
    with pytest.raises(InputError, match=r"ModuleNotFoundError.*has changed since"):
        checkpoint.load("net.pt", arch=arch)


def test_an_older_hash_is_that_of_the_file_alone(here: Path) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    together, alone = models.source_digests(Path("net.py"))
    assert together != alone == hashlib.sha256(NET.encode()).hexdigest()
    lay(here, {"net.py": "import torch"})
    assert len(set(models.source_digests(Path("net.py")))) == 1


def test_commands_and_pipes(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lay(here, {"net.py": NET, "blocks.py": BLOCKS})
    torch.save(models.build("net.py:Net").state_dict(), "w.pth")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((here / "w.pth").read_bytes())))
    for source in ("w.pth", "-"):
        assert run(["inspect", source, "--arch", "net.py:Net", "--input-size", "3x8x8"]) == 0
    lay(here, {"blocks.py": "import nowhere_to_be_found"})
    assert run(["inspect", "w.pth", "--arch", "net.py:Net"]) == 2
    assert "Traceback" not in capsys.readouterr().err

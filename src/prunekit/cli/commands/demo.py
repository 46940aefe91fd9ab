"""`prunekit demo`: both pruning methods on the bundled digits, from training to comparison."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import option
from prunekit.cli.history import remember_run
from prunekit.errors import InputError
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.evaluation.score import EvalResult

# file name -> description of the model
_CHAPTERS = {
    "usual": "a small VGG, trained",
    "pruned": "filters with small norms removed",
    "merged": "the same filters, merged (Neuron Merging)",
    "sparse": "trained with the sparsity penalty",
    "slim": "channels with small gammas removed (Network Slimming)",
    "tuned": "and trained a little more",
}
_COLUMNS = ("model", "accuracy", "parameters", "MACs", "size", "latency")


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demonstration."""

    out: str = option("prunekit-demo", flag="--output,-o", metavar="FOLDER", help="Folder for the models.")
    force: bool = option(False, help="Replace the models of an earlier demo.")
    epochs: int = option(20, help="Epochs of training, a quarter of it for tuning.")
    sparsity: float = option(1e-2, help="Strength of the penalty on batch norm's gammas.")
    slim: float = option(0.7, metavar="RATIO", help="Share of the channels that Network Slimming removes.")
    merge: float = option(0.3, metavar="RATIO", help="Share of the channels that Neuron Merging removes.")
    seed: int = option(0, help="Seed of everything random.")


def run(output: Output, options: DemoOptions) -> None:
    """Prune a small VGG with both methods, write and measure each model, and show all in one table."""
    if options.epochs < 1:
        raise InputError(f"--epochs must be at least 1, found {options.epochs}")
    start = time.perf_counter()
    folder = Path(options.out)
    files = {name: folder / f"{name}.pt" for name in _CHAPTERS}
    existing = [str(path) for path in files.values() if path.exists()]
    if existing and not options.force:
        raise InputError(f"{existing[0]} exists", hint="replace it with --force, or choose a folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        results = _story(output, options, files)
    seconds = time.perf_counter() - start
    if output.json:
        facts = {"output": str(folder), "results": [r.to_json() for r in results], "seconds": seconds}
        output.document(document("demo", facts))
        return
    from prunekit.report.terminal.tables import results_table

    output.table(results_table(results, columns=_COLUMNS), data=True)
    output.note(f"{numbers.duration(seconds)} in all. The models are in {folder}: try")
    output.note(f"  prunekit inspect {files['tuned']}")
    output.note("or say how much accuracy may go, and get the smallest network that loses no more:")
    output.note(f"  prunekit fit {files['usual']} --data digits --max-drop 3% -o small.pt")


def _story(output: Output, options: DemoOptions, files: dict[str, Path]) -> list[EvalResult]:
    """Write the models to `files` one after another, and return their measurements."""
    results: list[EvalResult] = []

    def keep(name: str, model: nn.Module) -> nn.Module:
        results.append(_keep(output, model, files[name], options))
        return model

    usual = _trained(output, "training as usual", options, weight_decay=5e-3)
    keep("usual", usual)
    keep("pruned", _prune(output, "merge", usual, options.merge, criterion="l2-norm", restore="none"))
    keep("merged", _prune(output, "merge", usual, options.merge, criterion="l2-norm"))
    sparse = _trained(output, "training with sparsity", options, sparsity=options.sparsity)
    keep("sparse", sparse)
    slim = keep("slim", _prune(output, "slim", sparse, options.slim))
    _train(output, slim, "tuning", options, lr=0.02, epochs=max(1, options.epochs // 4))
    keep("tuned", slim)
    return results


def _trained(output: Output, label: str, options: DemoOptions, **settings: Any) -> nn.Module:
    """Train a new network."""
    import torch

    from prunekit import models

    torch.manual_seed(options.seed)
    model = models.build("vgg_digits", {"gamma": 0.5})
    _train(output, model, label, options, epochs=options.epochs, **settings)
    return model


def _train(output: Output, model: nn.Module, label: str, options: DemoOptions, **settings: Any) -> None:
    from prunekit.data import open_data
    from prunekit.report.terminal.training import watching
    from prunekit.training.config import TrainConfig
    from prunekit.training.entry import train

    config = TrainConfig(batch_size=64, device="cpu", seed=options.seed, **settings)
    images = open_data("digits", "train")
    result = train(model, config, images, open_data("digits", "val"), on_event=watching(output, label))
    remember_run(model, images, config, result)


def _prune(output: Output, method: str, model: nn.Module, ratio: float, **settings: Any) -> nn.Module:
    from prunekit import api

    pruned = api.prune(method, model, ratio=ratio, **settings)
    before, after = pruned.before, pruned.after
    output.note(
        f"{method}: {before.channels} channels to {after.channels}, masked and sliced agree to {pruned.difference:.0e}"
    )
    return pruned.model


def _keep(output: Output, model: nn.Module, path: Path, options: DemoOptions) -> EvalResult:
    """Write the model and measure it on the test digits."""
    from prunekit import checkpoint
    from prunekit.data import open_data
    from prunekit.evaluation.score import evaluate

    checkpoint.save(model, path, force=options.force)
    output.note(f"{path}: {_CHAPTERS[path.stem]}")
    result = evaluate(model, open_data("digits", "test"), latency=True, name=path.stem)
    return dataclasses.replace(result, bytes=path.stat().st_size)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread inside: on images of 8x8 pixels a second costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


COMMAND = Command(run, ("prunekit demo", "prunekit demo -o story --epochs 40", "prunekit demo --json"))

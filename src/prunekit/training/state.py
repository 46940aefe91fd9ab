"""State of a run on disk: enough to resume to the same weights, and replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from prunekit.data import Examples
from prunekit.errors import TrainingError
from prunekit.files.pickles import load_tensors
from prunekit.files.writing import atomic_write
from prunekit.spec import origin_of

_FORMAT = 2


@dataclass
class State:
    """Position and content of a run: `epoch` (from 0) and `step` (within the epoch) are the next to be done.

    Random numbers depend on seed, epoch and step (`prunekit.data.seeded`), so no generator's state is needed.
    `settings` are what a resumed run must agree on, `tally` the sums of the epoch so far, `history` one `EpochEvent`
    per epoch, `tensors` the state dicts; all but these is JSON. `start` and `best` are `Scored` where the best weights
    are kept: those of the beginning, and the best so far.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "train").sample(256)
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> _ = pk.train(model, pk.TrainConfig(epochs=2, device="cpu"), digits, state_path="run.state")
        >>> state = pk.TrainState.load("run.state")
        >>> state.epoch, len(state.history)
        (2, 2)
    """

    settings: Mapping[str, Any]
    epoch: int = 0
    step: int = 0
    tally: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    def save(self, path: str | Path) -> None:
        """Replace the file at `path` atomically: at any time the old one or the new one is there."""
        header = {name: value for name, value in vars(self).items() if name != "tensors"}
        content = {"prunekit_training": _FORMAT, "header": json.dumps(header), "tensors": self.tensors}

        def write(file: BinaryIO) -> None:
            torch.save(content, file)

        atomic_write(path, write, force=True)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read the file that `save` wrote; raise `TrainingError` for anything else."""
        if not Path(path).is_file():
            raise TrainingError(f"there is no training state {path}", hint="start without --resume")
        try:
            with Path(path).open("rb") as stream:
                content = load_tensors(stream, str(path))
            if content["prunekit_training"] > _FORMAT:
                raise TrainingError(f"{path} was written by a newer prunekit", hint="update prunekit")
            if content["prunekit_training"] < _FORMAT:
                raise TrainingError(f"{path} was written by an older prunekit", hint="start anew without --resume")
            return cls(**json.loads(content["header"]), tensors=content["tensors"])
        except TrainingError:
            raise
        except Exception as error:  # a damaged file can make the unpickler raise anything
            raise TrainingError(
                f"{path} is not a training state", hint="expected a file that `prunekit train` saved"
            ) from error

    def must_agree(self, settings: Mapping[str, Any], path: str | Path) -> None:
        """Raise `TrainingError`, naming the differences, unless `settings` are those of this state."""
        asked = json.loads(json.dumps(settings))
        names = [n for n in {**self.settings, **asked} if self.settings.get(n) != asked.get(n)]
        if names:
            differ = "; ".join(f"{n}: {_short(self.settings.get(n))}, now {_short(asked.get(n))}" for n in names)
            raise TrainingError(
                f"{path} belongs to a run with other settings ({differ})",
                hint="resume with the settings it began with, or start anew without --resume",
            )


def identity(
    model: nn.Module, train_set: Examples, val_set: Examples | None, teacher: nn.Module | None
) -> dict[str, Any]:
    """Return what identifies a run besides its settings: the network, its history, the images and the teacher."""
    origin = origin_of(model)
    shapes = {name: list(p.shape) for name, p in model.state_dict().items() if isinstance(p, Tensor)}
    return {
        "architecture": origin.arch if origin and origin.arch else type(model).__name__,
        "tensors of the network": _digest(json.dumps(shapes)),
        "plans": [dict(step) for step in origin.history] if origin else [],
        "training images": _images(train_set),
        "validation images": _images(val_set) if val_set is not None else None,
        "teacher": _weights(teacher) if teacher is not None else None,
    }


def _images(data: Examples) -> str:
    """Identify the examples by their number and what they are, not by name: the folder may have moved."""
    return f"{len(data)} ({_digest(data.identity())})"


def _weights(model: nn.Module) -> str:
    values = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return _digest(*(t.detach().cpu().float().contiguous().numpy().tobytes() for t in values))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:12]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"

"""The file that a search keeps beside its output while it runs: what was asked for, and the trials so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.models import write_report
from prunekit.cli.resuming import differing
from prunekit.errors import InputError
from prunekit.report.documents import dumps

if TYPE_CHECKING:
    from torch import nn

    from prunekit.workflows.fitting.trials import Trial


@dataclass(frozen=True)
class Kept:
    """What an earlier search left: its trials, and its smallest network that meets the goal."""

    trials: tuple[Trial, ...] = ()
    model: nn.Module | None = None


@dataclass(frozen=True)
class FitFile:
    """The state of a search for `target`, the file of its network.

    Attributes:
        target: Where the network goes.
        settings: What the trials depend on.
    """

    target: Path
    settings: Mapping[str, Any]

    @staticmethod
    def path_of(target: Path) -> Path:
        """Return the state's file: `small.fit.json` for `small.pt`."""
        return target.with_suffix(".fit.json")

    @property
    def path(self) -> Path:
        """The state's file."""
        return self.path_of(self.target)

    def recall(self) -> Kept:
        """Return what is stored; nothing where there is no file.

        Raises:
            InputError: The file is none of a search, or of a search with other settings.
        """
        from prunekit import checkpoint
        from prunekit.workflows.fitting.trials import Trial

        if not self.path.exists():
            return Kept()
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            trials = tuple(Trial.from_json(trial) for trial in found["trials"])
            settings, hashed = dict(found["settings"]), found["kept"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path} is not a search that could go on: {error}") from error
        self._must_agree(settings)
        if hashed is None or self._hash() != hashed:
            return Kept(trials)
        # the run's own file, bit for bit, whatever code its architecture is
        return Kept(trials, checkpoint.load(self.target, trust_pickle=True))

    def store(self, trials: Sequence[Trial], *, written: bool) -> None:
        """Write the trials so far; `written` says whether `target` has a network of theirs."""
        kept = self._hash() if written else None
        whole = {"settings": dict(self.settings), "kept": kept, "trials": [trial.to_json() for trial in trials]}
        write_report(str(self.path), dumps(whole) + "\n", force=True)

    def remove(self) -> None:
        """Remove the state of a finished search."""
        self.path.unlink(missing_ok=True)

    def _hash(self) -> str | None:
        return hashlib.sha256(self.target.read_bytes()).hexdigest() if self.target.is_file() else None

    def _must_agree(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        others = differing(before, now, now, length=40)
        if others:
            raise InputError(
                f"{self.path} is a search with other {others}",
                hint="resume with the same settings, begin anew with --force, or name another file with -o",
            )


def must_be_new(target: Path, *, resume: bool, force: bool) -> None:
    """Raise `InputError` where a new search would lose an unfinished one."""
    path = FitFile.path_of(target)
    if path.exists() and not (resume or force):
        raise InputError(f"{path} holds an unfinished search", hint="--resume goes on with it, --force begins anew")

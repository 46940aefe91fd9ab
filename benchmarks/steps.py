"""Trainings of a benchmark that are kept in a folder: what is done is not done again, what was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import prunekit as pk


def kept(folder: Path, name: str, fit: Callable[..., nn.Module]) -> nn.Module:
    """The network `name` of a `folder`; where it is not there, what `fit` returns, which gets the settings of a run."""
    done, state = folder / f"{name}.pt", folder / f"{name}.state"
    if done.exists():
        return pk.load(done)
    model = fit(state_path=state, resume=state.exists(), on_event=_say(name))
    pk.save(model, done, force=True)
    return model


def _say(name: str) -> Callable[[Any], None]:
    def show(event: Any) -> None:
        if isinstance(event, pk.EpochEvent):
            print(f"{name}: {event}", flush=True)

    return show

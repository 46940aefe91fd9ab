"""Destinations of a training run's events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.report.terminal.output import Output
    from prunekit.training.events import Event, Sink


@contextlib.contextmanager
def sinks(
    output: Output, metrics: Path, tensorboard: str | None, on_start: Callable[[], None] = lambda: None
) -> Iterator[Sink]:
    """Yield the sink for the terminal, the file of metrics and, where requested, TensorBoard."""
    from prunekit.report.terminal.training import watching
    from prunekit.training.sinks import MetricsFile, TensorBoard

    with contextlib.ExitStack() as stack:
        receivers: list[Sink] = [watching(output), MetricsFile(metrics)]
        if tensorboard is not None:
            board = TensorBoard(tensorboard)
            stack.callback(board.close)
            receivers.append(board)

        started = False

        def everywhere(event: Event) -> None:
            nonlocal started
            if not started:
                started = True
                on_start()
            for receive in receivers:
                receive(event)

        yield everywhere

"""Turn SIGINT and SIGTERM into a request to stop, granted at the next step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_PATIENCE = 2.0  # seconds after which a second Ctrl-C means "now"; launchers pass one Ctrl-C on twice


class StopSignals:
    """While entered, the first signal sets `requested`; a later SIGINT raises `KeyboardInterrupt`.

    Signals reach only a process's main thread: entered elsewhere, this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._since > _PATIENCE:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, now

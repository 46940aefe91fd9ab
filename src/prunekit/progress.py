"""Progress of long work: the library counts, and whoever called it decides what is shown.

A loop that may take long counts what it has done; nobody has to pass anything down to it:

    count = counter("refitting layers")
    for done, layer in enumerate(layers):
        count(done, len(layers))

Counts go up to the `report_progress` that the work is done in, and nowhere without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[int, int], object]
"""Called with how much is done, and how much there is in all: images, or layers.

Where work has several parts, each counts from the start.
"""
Listener = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is in all."""

_listener: ContextVar[Listener | None] = ContextVar("prunekit_progress", default=None)


@contextmanager
def report_progress(listener: Listener | None) -> Iterator[None]:
    """Call `listener` with the progress of all work inside: pruning, restoring, proving, measuring, reading images.

    Args:
        listener: Called with what is being done, how much of it is done, and how much there is in all (0 where that
            is unknown). One piece of work follows another, and each counts from the start. None stands for silence.

    Examples:
        >>> import prunekit as pk
        >>> heard = []
        >>> with pk.report_progress(lambda what, done, total: heard.append((what, done, total))):
        ...     found = pk.evaluate(pk.load("prunekit:vgg_digits"), pk.open_data("digits", "test"), name="net")
        >>> heard
        [('tracing', 0, 0), ('evaluating net', 256, 355), ('evaluating net', 355, 355)]
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@contextmanager
def counts_to(on_progress: Progress | None) -> Iterator[None]:
    """Call `on_progress` with every count inside; with None, counts go where they went before."""
    if on_progress is None:
        yield
    else:
        with report_progress(lambda _, done, total: on_progress(done, total)):
            yield


def counter(what: str) -> Progress:
    """Return what counts one kind of work: call it with how much is done, and how much there is in all.

    Args:
        what: The work as people know it, such as "refitting layers".

    Examples:
        >>> import prunekit as pk
        >>> with pk.report_progress(print):
        ...     pk.counter("ranking filters")(3, 54)
        ranking filters 3 54
    """

    def count(done: int, total: int) -> None:
        listener = _listener.get()
        if listener is not None:
            listener(what, done, total)

    return count

"""A model beside its exported file, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunekit.report import numbers
from prunekit.report.terminal.tables import table

if TYPE_CHECKING:
    from prunekit.evaluation.latency import Latency
    from prunekit.exporting.int8 import Int8Score, Quantised
    from prunekit.exporting.writer import Exported
    from prunekit.methods.manidp.runtimes.files import ExportedBuckets

_RUNS_ON = {"onnx": "ONNX Runtime", "pt2": ".pt2"}


def side_by_side(
    done: Exported | ExportedBuckets,
    times: Mapping[str, Latency],
    size: int | None,
    small: tuple[Quantised, Int8Score] | None = None,
) -> Any:
    """Return accuracy, size and latency of both as a table, and of the int8 file where there is one.

    A column without a figure is left out.
    """
    parity = done.parity
    rows = [
        ("PyTorch", numbers.percent(parity.accuracy), numbers.data_size(size), *_times(times.get("model"))),
        (
            _RUNS_ON[done.format],
            numbers.percent(parity.exported_accuracy),
            numbers.data_size(done.size),
            *_times(times.get("exported")),
        ),
    ]
    if small is not None:
        file, score = small
        accuracy, size_of = numbers.percent(score.accuracy), numbers.data_size(len(file.content))
        rows.append(("ONNX Runtime, int8", accuracy, size_of, *_times(times.get("int8"))))
    columns = ["runs on", "accuracy", "size", "latency", "p95"]
    shown = [i for i in range(len(columns)) if any(row[i] != numbers.NONE for row in rows)]
    return table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])


def parity_line(done: Exported | ExportedBuckets) -> str:
    """Return the agreement of both in one line."""
    parity = done.parity
    over = numbers.counted(parity.images, "image" if parity.accuracy is not None else "random input")
    several = len(parity.outputs) > 1
    what = "max |Δoutput|" if several or parity.agreement is None else "max |Δlogit|"
    worst = f" ('{parity.worst}', the worst of {len(parity.outputs)} outputs)" if several else ""
    same = f", top-1 the same on {numbers.percent(parity.agreement)}" if parity.agreement is not None else ""
    folded = f"; {numbers.counted(len(done.folded), 'batch norm')} folded" if done.folded else ""
    left = f"; {parity.undecided} left out, whose gates or route hang on rounding" if parity.undecided else ""
    return f"{what} {parity.difference:.1e}{worst} over {over}{same}{left}{folded}"


def _times(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return numbers.NONE, numbers.NONE
    return numbers.milliseconds(latency.p50), numbers.milliseconds(latency.p95)

"""`prunekit compare`: networks side by side, as a table, a file for other programs, a picture or a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import DATA, READING, DataOptions, ReadingOptions, option
from prunekit.cli.measuring import CompareOptions, Models, measured
from prunekit.cli.models import check_report, write_report
from prunekit.errors import InputError, counted
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult


@dataclass(frozen=True)
class ReportOptions:
    """The form of the comparison."""

    format: str = option("table", choices=("table", "csv", "markdown"), help="Format of the result on standard output.")
    picture: str | None = option(
        metavar="FILE", help="Draw accuracy against MACs and latency there: .png, .svg or .pdf (needs Matplotlib)."
    )
    html: str | None = option(metavar="FILE", help="Write one self-contained page there.")
    force: bool = option(False, help="Replace files that exist.")

    def check(self, data: DataOptions) -> None:
        """Raise `InputError`, before any work, for files that cannot be written and charts without figures."""
        check_report(self.html, force=self.force)
        check_report(self.picture, force=self.force)
        if self.picture is not None:
            from prunekit.report.pictures.png import check_picture

            check_picture(self.picture)
            if not data.given:
                raise InputError("a picture of accuracies needs images", hint="say which with --data")


def run(
    output: Output,
    models: Models,
    data: DataOptions,
    options: CompareOptions,
    report: ReportOptions,
    reading: ReadingOptions,
) -> None:
    """Measure all models and show them in the requested form."""
    options.check()
    report.check(data)
    results = [found.result for found in measured(output, models, data, options, reading)]
    from prunekit.report.terminal.tables import latency_note

    written = _write(results, data, report)
    if output.json:
        facts: dict[str, Any] = {"results": [result.to_json() for result in results], "files": written}
        output.document(document("compare", facts))
    else:
        _show(output, results, report.format)
        if note := latency_note(results):
            output.note(note)
        for path in written:
            output.note(f"wrote {path}")


def _show(output: Output, results: list[EvalResult], format: str) -> None:
    from prunekit.report.terminal import tables

    if format == "table":
        output.table(tables.results_table(results), data=True)
    elif format == "markdown":
        output.data(tables.markdown(*tables.result_cells(results)))
    else:
        rows = [tables.flat(result) for result in results]
        output.data(tables.csv_text(list(rows[0]), [list(row.values()) for row in rows]))


def _write(results: list[EvalResult], data: DataOptions, report: ReportOptions) -> list[str]:
    """Write the page and the picture, where requested; return the files written."""
    from prunekit.report.pages import comparison

    written = []
    if report.html is not None:
        page = comparison.comparison_page("Networks compared", results, _about(results[0], data))
        write_report(report.html, page, force=report.force)
        written.append(report.html)
    if report.picture is not None:
        from prunekit.report.pictures import png

        charts, about = comparison.comparison_charts(results), _about(results[0], data)
        png.draw(charts, Path(report.picture), about=about, force=report.force)
        written.append(report.picture)
    return written


def _about(result: EvalResult, data: DataOptions) -> str:
    """Describe in one line how the figures were obtained."""
    parts = [f"{counted(result.images, 'image')} of {data.named}"] if data.given else []
    if result.latency_ms is not None:
        timing = result.latency_ms
        parts.append(
            f"latency: the median of a forward pass of {timing.batch} on {timing.device} and half the distance of the "
            f"quartiles, {numbers.counted(timing.threads, 'thread')}"
        )
    means = "" if result.images == 0 else ", the mean over these images where a network has gates"
    return "; ".join([*parts, f"MACs are for one input{means}"])


COMMAND = Command(
    run,
    (
        "prunekit compare model.pt small.pt --data digits",
        "prunekit compare model.pt small.pt --data digits --html report.html --picture report.png",
        "prunekit compare a.pt b.pt c.pt --data path/to/images --format markdown >> RESULTS.md",
        "prunekit compare model.pt small.pt --no-latency --format csv",
        "prunekit compare model.pt small.pt small.onnx --data digits",
        "prunekit compare model.pt gated.pt@40% gated.pt@60% --data digits",
    ),
    {"data": DATA, "options": "Measuring", "report": "Report", "reading": READING},
)

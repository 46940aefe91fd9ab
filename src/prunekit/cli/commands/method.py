"""The command of a pruning method, made from what its plug-in says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunekit.cli.build import Command
from prunekit.cli.models import STREAM, output_path, read_model, spec_of, write_model
from prunekit.cli.options import READING, ModelArgument, OutputOptions, ReadingOptions
from prunekit.report.documents import document
from prunekit.report.output import Output

if TYPE_CHECKING:
    from prunekit.api import Pruned


def command_for(name: str) -> Command:
    """The command of the method `name`: its `Config` becomes flags, its examples lead the help."""
    from prunekit.methods import registry

    method = registry.get(name)

    def run(output: Output, model: ModelArgument, config: Any, where: OutputOptions, reading: ReadingOptions) -> None:
        _prune(output, name, model, config, where, reading)

    # the generator of options reads the annotation, which is known only now
    run.__annotations__["config"] = method.Config
    return Command(run, tuple(method.examples), {"config": "Method", "where": "Output", "reading": READING})


def _prune(output: Output, name: str, source: str, config: Any, where: OutputOptions, reading: ReadingOptions) -> None:
    """Prune, prove it, write it, and say what changed."""
    from prunekit import api

    target = output_path(source, where, name, output)
    network, _ = read_model(source, reading)
    spec_of(network)
    pruned = api.prune(name, network, config=config)
    written = None if where.dry_run else write_model(pruned.model, target, output, force=where.force)
    if output.json:
        output.document(document(name, {"output": written, "settings": config.to_json(), **_facts(pruned)}))
    else:
        from prunekit.report.pruning import report

        report(output, pruned, dry_run=where.dry_run)
        if written not in (None, STREAM):
            output.data(str(written))


def _facts(pruned: Pruned) -> dict[str, Any]:
    """What a program may want to know about a finished surgery."""
    from prunekit.report.inspection import frozen_channels

    return {
        "before": pruned.before.to_json(),
        "after": pruned.after.to_json(),
        "plan": pruned.plan.to_json(),
        "protected": list(pruned.plan.notes.get("protected", [])),
        "frozen": frozen_channels(pruned.graph.groups),
        "seconds": pruned.seconds,
        "verify": {"difference": pruned.difference, "seconds": pruned.verify_seconds},
    }

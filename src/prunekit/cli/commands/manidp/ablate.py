"""`prunekit manidp ablate`: what each loss is worth, beside a dynamic and a static control."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.commands.manidp.train import GateTraining
from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import DATA, READING, DataOptions, ModelArgument, ReadingOptions, option
from prunekit.cli.models import beside, check_inputs, describe_source, read_model, spec_of, write_report
from prunekit.errors import InputError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.report.documents import document, dumps
from prunekit.report.terminal.output import Output
from prunekit.report.terminal.training import watching

if TYPE_CHECKING:
    from prunekit.methods.manidp.variants import AblationRow

_RESULTS, _PAGE = "results.json", "ablation.html"


@dataclass(frozen=True)
class AblateOptions:
    """The cost at which all are compared, and where everything is kept."""

    target_macs: str = option("50%", metavar="SHARE", help="Mean MACs of an image, as a share of the dense network's.")
    out: str | None = option(
        flag="--output,-o", metavar="FOLDER", help="Folder for networks and results (default: MODEL-ablation)."
    )
    resume: bool = option(False, help="Go on with what is in the folder.")

    def share(self) -> float:
        """Return the target as a share, 0 to 1; raise `InputError` for anything else."""
        text = self.target_macs.strip()
        try:
            found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            found = 0.0
        if not 0 < found < 1:
            raise InputError(f"--target-macs {text} is no share of the dense MACs", hint="half of them is 50%")
        return found


def run(
    output: Output,
    *,
    model: ModelArgument,
    data: DataOptions,
    recipe: GateRecipe,
    config: GateTraining,
    options: AblateOptions,
    reading: ReadingOptions,
) -> None:
    """Train each variant from the same network, measure all at the same cost, and show them side by side."""
    config.check()
    target = options.share()
    check_inputs(model, data, reading)
    folder = Path(options.out) if options.out is not None else beside(model, "ablation", "")
    if folder.exists() and not options.resume:
        raise InputError(f"{folder} exists", hint="--resume goes on with it; -o names another")
    from prunekit.workflows.ablation import Ablation
    from prunekit.workflows.sweeps.points import fingerprint

    network, _ = read_model(model, reading)
    train_set, test_set = (data.images(output, split, spec_of(network), reading) for split in ("train", "test"))
    suited = config.as_published().suited_to(len(train_set))
    settings = {"gates": recipe.to_json(), "training": suited.settings(), "target_macs": target}
    header = {"weights": fingerprint(network), "data": str(data.data), **settings}
    done = _earlier(folder / _RESULTS, header)
    folder.mkdir(parents=True, exist_ok=True)

    def facts() -> dict[str, Any]:
        rows = [done[label].to_json() for label in ablation.labels if label in done]
        fields = {"output": str(folder), "model": describe_source(model), **header, "images": len(test_set)}
        return document("manidp.ablate", {**fields, "rows": rows})

    ablation = Ablation(network, recipe, suited, target, train_set, test_set, folder, watching(output))
    for label in ablation.labels:
        if label not in done:
            output.note(f"{label} ...")
            done[label] = ablation.row(label)
            write_report(str(folder / _RESULTS), dumps(facts()) + "\n", force=True)
    _show(output, folder, facts(), [done[label] for label in ablation.labels])


def _earlier(path: Path, header: dict[str, Any]) -> dict[str, AblationRow]:
    """Return the rows that are there already, by label.

    Raises:
        InputError: They are of another network, other data or other settings, or no rows.
    """
    from prunekit.methods.manidp.variants import AblationRow

    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = {key: found[key] for key in header}
        rows = {row["label"]: AblationRow.from_json(row) for row in found["rows"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not an ablation that could go on: {error}") from error
    differing = [key.replace("_", " ") for key in header if before[key] != json.loads(dumps(header[key]))]
    if differing:
        raise InputError(
            f"{path} is an ablation of other {' and '.join(differing)}", hint="name another folder with -o"
        )
    return rows


def _show(output: Output, folder: Path, facts: dict[str, Any], rows: list[AblationRow]) -> None:
    from prunekit.report.pages.ablation import TITLE, ablation_cells, ablation_page
    from prunekit.report.terminal.tables import table

    about = f"{facts['images']:,} images of {facts['data']}; MACs are without those of the gates"
    write_report(str(folder / _PAGE), ablation_page(facts["model"], about, rows), force=True)
    if output.json:
        output.document(facts)
        return
    columns, cells = ablation_cells(rows)
    output.table(table(columns, cells, title=f"{TITLE} {facts['model']}"), data=True)
    for row in rows:
        if row.error is not None:
            output.warn(f"{row.label}: {row.error}")
    output.note(f"everything is in {folder}, the page in {folder / _PAGE}")


COMMAND = Command(
    run,
    (
        "prunekit manidp ablate model.pt --data digits --epochs 6 --batch-size 64 -o ablation",
        "prunekit manidp ablate model.pt --data path/to/images --epochs 100 --target-macs 40% --resume",
    ),
    {"recipe": "Gates", "data": DATA, "config": "Training", "options": "Ablation", "reading": READING},
)

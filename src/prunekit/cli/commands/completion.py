"""`prunekit completion`: the script that lets a shell complete commands, flags and choices."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli.framework.build import Command
from prunekit.errors import unknown_name
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

SHELLS = ("bash", "zsh", "fish")

Shell = Annotated[str, typer.Argument(metavar="|".join(SHELLS), help="Shell of the script.", show_default=False)]


def run(output: Output, shell: Shell) -> None:
    """Print the script."""
    import typer.completion

    if shell not in SHELLS:
        raise unknown_name("shell", shell, SHELLS)
    script = typer.completion.get_completion_script(  # type: ignore[attr-defined]
        prog_name="prunekit", complete_var="_PRUNEKIT_COMPLETE", shell=shell
    )
    if output.json:
        output.document(document("completion", {"shell": shell, "script": script}))
    else:
        output.data(script)


COMMAND = Command(
    run,
    (
        'eval "$(prunekit completion bash)"   # in ~/.bashrc',
        'eval "$(prunekit completion zsh)"    # in ~/.zshrc, after compinit',
        "prunekit completion fish > ~/.config/fish/completions/prunekit.fish",
    ),
)

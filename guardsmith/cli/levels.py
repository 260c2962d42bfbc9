"""The command levels: what a judge's similarities mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guardsmith.core.console import print_line


def levels(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Pictures of unprotected people or objects: FOLDER/CLASS/IDENTITY/."),
    ],
    judge: Annotated[str, typer.Option(help="Judge: dino, clip, face, or module:NAME.")],
    judge_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the judge's encoder.  [default: the usual one]")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Size in pixels of the base's pictures.")] = 512,
) -> None:
    """Measure what a judge's similarities mean, on pictures of unprotected identities; prints YAML.

    Every class has a folder, named as in prompts (person, dog), with a folder for each identity, of two pictures or more: at
    least two identities of a class, better twenty.
    """
    from guardsmith.config.judge import JudgeSpec
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.gate.levels import identities, levels_as_yaml, measure_levels
    from guardsmith.metrics import find_judge

    find_judge(judge)
    quiet_libraries()
    spec = JudgeSpec.model_validate({"name": judge, "model": judge_model})
    result = measure_levels(identities(folder), spec, size, str(folder))
    typer.echo(levels_as_yaml(result), nl=False)
    print_line("next: put it into a file, and name it as judge.levels in the recipe or with --levels")

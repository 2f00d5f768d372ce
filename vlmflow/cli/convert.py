"""The command that converts published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import JsonOption
from vlmflow.cli.screen import emit


@app.command()
def convert(
    family: Annotated[str, typer.Argument(help="Whose checkpoint it is: vilbert.")],
    source: Annotated[Path, typer.Argument(help="The published pickle, or a folder with it and the other files.")],
    folder: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is empty, or does not exist yet.")],
    config: Annotated[Path | None, typer.Option("--config", help="The published configuration, JSON.")] = None,
    vocabulary: Annotated[Path | None, typer.Option("--vocab", help="The model's vocab.txt.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Answers in the order of the outputs: a JSON list, or a text, one a line."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a published pickle to safetensors, checked against its architecture; the pickle is never run.

    Example: `vlmflow convert vilbert multi_task_model.bin models/vilbert --config bert_base_6layer_6conect.json
    --vocab vocab.txt --answers answers.json`
    """
    from vlmflow.models.convert import ConversionInputs, convert_weights

    inputs = ConversionInputs(config=config, vocabulary=vocabulary, answers=answers)
    report = convert_weights(family, source, folder, inputs)
    if as_json:
        emit(report.model_dump_json())
        return
    count = f"{report.num_tensors} tensors, {report.num_parameters:,} parameters"
    typer.echo(f"{report.folder}: {', '.join(report.files)} ({count})")
    for item in report.missing:
        typer.echo(f"missing: {item}")

"""The command that measures models: evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import (
    AddressOption,
    ConfigOption,
    EndpointOption,
    JsonOption,
    PolicyOption,
    ProfileOption,
    UnboundOption,
    VerboseOption,
    make_job,
    shown_progress,
)
from vlmflow.cli.screen import Screen
from vlmflow.errors import ConfigError

_TASKS = "retrieval, caption, answer, zeroshot, match or moderate"


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help=f"What is measured: {_TASKS}.")],
    data: Annotated[
        str,
        typer.Argument(
            help="COCO or Karpathy captions (.json), Flickr30k (.json, .token), VQAv2 questions (.json), a folder with "
            "a folder per class, or any table (.csv, .jsonl, .parquet)."
        ),
    ],
    profile: ProfileOption = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Folder or prefix of the images. Default: where DATA is.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="Of a Karpathy file (default: test); of a token file: a text file of image names."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="VQA's answers. Default: the file named after the questions.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", help="A table with what is true, joined to the table DATA.")
    ] = None,
    on: Annotated[str | None, typer.Option("--on", help="Column to join by. Default: the one that both have.")] = None,
    where: Annotated[
        str | None, typer.Option("--where", help="Only rows of which this SQL condition is true (DuckDB).")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="WHAT=NAME: the column that holds uri, captions, class, text, match, ..."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", help="JSON with the names of the classes; ImageNet needs it.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", help='Prompt of a class, with {}. May be repeated. Default: "a photo of a {}."'),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Measure this result file (caption, answer); run no model.")
    ] = None,
    catalog: Annotated[
        str | None, typer.Option("--catalog", help="Keep the results here; the same command goes on from them.")
    ] = None,
    scratch: Annotated[
        str | None, typer.Option("--scratch", help="Where a temporary catalog goes that all nodes of a cluster reach.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many images, or pairs of `match`, for a trial.")
    ] = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a profile's models on DATA, by the field's metrics, beside published figures of the same benchmark.

    - **retrieval**: Recall@1, 5, 10 both ways (COCO 5k and 1k, Flickr30k)
    - **caption**: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr; SPICE and METEOR 1.5 need Java and say so
    - **answer**: accuracy of the VQA challenge, by question type and answer type
    - **zeroshot**: top-1, top-5, mean per class, with prompt ensembles
    - **match**: ROC AUC and accuracy of image-text pairs
    - **moderate**: precision, recall and AP of what is flagged, by label where DATA has labels

    An image without a result counts as wrong, in moderation as `review`. Nothing is kept unless `--catalog` says where;
    with it, an interrupted evaluation goes on, and one that is done runs no model again. `--limit` takes the first
    images; of zeroshot the first of each class in turn.

    Try it on the demo's images, from a checkout:

    `vlmflow evaluate moderate vlmflow/starter/demo/manifest.csv --truth vlmflow/starter/demo/truth.csv
    --column flag=must_flag --profile starter`

    `vlmflow evaluate match vlmflow/starter/demo/manifest.csv --truth vlmflow/starter/demo/truth.csv
    --column mismatch=is_title_wrong --profile starter`

    `vlmflow evaluate caption vlmflow/starter/demo/manifest.csv --truth vlmflow/starter/demo/truth.csv
    --where "is_title_wrong = 'false'" --profile starter`

    On COCO: `vlmflow evaluate caption dataset_coco.json --images coco/ --profile large --catalog coco-captions/`
    """
    from vlmflow.evaluation import TASKS, Choices, ReadOptions, evaluate_predictions, read_dataset
    from vlmflow.evaluation import evaluate as run
    from vlmflow.evaluation.prompts import check_templates, read_class_names
    from vlmflow.views_evaluate import print_evaluation

    known = next((name for name in TASKS if name == task), None)
    if known is None:
        raise ConfigError(f"no task {task} can be evaluated", remedy=f"Use {_TASKS}.")
    if known != "zeroshot":
        _refuse({"--classes": classes, "--template": template}, f"{known}, which asks with no names of classes")
    if known != "moderate":
        _refuse({"--policy": policy, "--accept-unbound": accept_unbound}, f"{known}, which decides nothing")
    if predictions is not None:
        of_models = {"--profile": profile, "--config": config, "--catalog": catalog, "--scratch": scratch}
        of_runs = {"--ray-address": ray_address, "--endpoint": endpoint}
        _refuse({**of_models, **of_runs}, "--predictions, with which no model is run")
    if catalog is not None:
        _refuse({"--scratch": scratch}, "an evaluation that --catalog keeps")
    templates = check_templates(template or ())
    options = ReadOptions(images, split, annotations, truth, on, where, _columns(column))
    dataset = read_dataset(known, data, options)
    if predictions is not None:
        report = evaluate_predictions(dataset.first(limit), predictions)
    else:
        job = make_job(
            data,
            catalog or "unused",  # without --catalog a scratch catalog takes its place
            config,
            endpoint,
            profile=profile,
            policy=policy,
            limit=limit,
            ray_address=ray_address,
            accept_unbound=accept_unbound,
        )
        choices = Choices(
            catalog=None if catalog is None else job.catalog,
            scratch=scratch,
            class_names=None if classes is None else read_class_names(classes, dataset.classes),
            templates=templates,
        )
        with shown_progress(as_json=as_json, verbose=verbose, is_kept=catalog is not None) as display:
            report = run(dataset.first(job.limit), job, choices, progress=display)
    if as_json:
        typer.echo(json.dumps({"event": "report", **report.model_dump(mode="json")}))
    else:
        print_evaluation(report, Screen())


def _refuse(options: Mapping[str, object], what: str) -> None:
    """Refuses options that would be left out of account, so that nobody takes a figure for another than it is."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{given[0]} is not for {what}", remedy="Leave it out.")


def _columns(given: list[str] | None) -> dict[str, str]:
    columns = {}
    for text in given or ():
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise ConfigError(f"--column {text}", remedy="Write WHAT=NAME, such as captions=title.")
        columns[role] = name
    return columns

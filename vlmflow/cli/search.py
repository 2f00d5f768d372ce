"""Commands that look into a catalog: search, duplicates, titles, alt-text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs, write_output
from vlmflow.cli.options import (
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    ProfileOption,
    as_its_catalog,
    catalog_config,
    catalog_of,
    make_job,
)
from vlmflow.cli.screen import Screen, emit, show_result
from vlmflow.errors import ConfigError

if TYPE_CHECKING:
    from vlmflow.config import Job

WhereOption = Annotated[
    str | None, typer.Option("--where", help="Only rows of which this SQL condition is true (DuckDB).")
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Write all of it to this CSV file.")]


@app.command()
def search(
    catalog: CatalogOnly,
    text: Annotated[str | None, typer.Argument(help="What the images should show.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="An image file to find others like it.")] = None,
    like: Annotated[str | None, typer.Option("--like", help="Uri of an image of the catalog.")] = None,
    where: WhereOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=10_000, help="How many images.")] = 10,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with small pictures; flagged ones are blurred.")
    ] = None,
    csv: CsvOption = None,
    show_flagged: Annotated[
        bool, typer.Option("--show-flagged", help="In the page: flagged images (review, block) as they are.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector; use no index.")] = False,
    build_index: Annotated[
        bool, typer.Option("--build-index", help="Bring the index up to date first; alone: do no more than that.")
    ] = False,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the images of CATALOG by a text, by an image, or by one of its own images.

    Small catalogs are searched exactly. `--build-index` makes an approximate index for large ones, and updates it;
    rows that it does not cover yet are still compared one by one.

    Example: `vlmflow search catalog/ "red leather bag" --where "decision = 'allow'" --html bags.html`
    """
    from vlmflow.search.query import Query
    from vlmflow.search.searcher import search_images
    from vlmflow.views_search import print_index, print_search, search_csv

    check_outputs(html, csv)
    is_asked = text is not None or image is not None or like is not None
    of_queries = {"--where": where, "--html": html, "--csv": csv, "--exact": exact or None}
    left_out = [name for name, value in of_queries.items() if value is not None]
    if left_out and not is_asked:
        raise ConfigError(
            f"{', '.join(left_out)} without a query", remedy="Say what to search for: a text, --image or --like."
        )
    if show_flagged and html is None:
        raise ConfigError("--show-flagged without a page", remedy="Write one with --html.")
    job = query_job(catalog, profile, config, endpoint)
    place = catalog_of(catalog, endpoint, job)
    console = Screen(stderr=as_json)
    if build_index:
        from vlmflow.search.build import update_index

        report = update_index(place)
        if not is_asked:
            if as_json:
                emit(report.model_dump_json())
            else:
                print_index(report, console)
            return
        print_index(report, console)
    query = Query(text=text, image=image, like=like)
    result = search_images(place, query, where=where, top_k=top_k, job=job, exact=exact)
    if html is not None:
        from vlmflow.search.page import search_html
        from vlmflow.search.thumbnails import make_thumbnails

        thumbnails = make_thumbnails(result.hits, place, job=job, show_flagged=show_flagged)
        write_output(html, search_html(result, thumbnails, show_flagged=show_flagged))
    if csv is not None:
        write_output(csv, search_csv(result))
    if as_json:
        emit(result.model_dump_json())
    else:
        print_search(result, console)


@app.command()
def duplicates(
    catalog: CatalogOnly,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="exact (equal bytes), perceptual (look) or semantic. Default: all."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Least cosine with the representative of a semantic group. Default: 0.95."),
    ] = None,
    where: WhereOption = None,
    csv: CsvOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Group the images of CATALOG that are the same: to the byte, or by their embeddings.

    Each group has a representative, the image with the most pixels, with which every member was compared.

    Example: `vlmflow duplicates catalog/ --csv duplicates.csv`
    """
    from vlmflow.search.duplicates import THRESHOLD, Kind, find_duplicates
    from vlmflow.views_search import duplicates_csv, print_duplicates

    check_outputs(csv)
    known: dict[str, Kind] = {"exact": "exact", "perceptual": "perceptual", "semantic": "semantic"}
    for name in kind or ():
        if name not in known:
            raise ConfigError(f"--kind {name}", remedy=f"Use {' or '.join(known)}.")
    if threshold is not None and kind and "semantic" not in kind:
        raise ConfigError(
            f"--threshold {threshold:g} is of semantic groups, and --kind asks for none",
            remedy="Leave it out, or give --kind semantic too.",
        )
    report = find_duplicates(
        catalog_config(catalog, endpoint),
        kinds=[known[name] for name in kind or known],
        threshold=THRESHOLD if threshold is None else threshold,
        where=where,
    )
    if csv is not None:
        write_output(csv, duplicates_csv(report))
    show_result(report, print_duplicates, as_json=as_json)


@app.command()
def titles(
    catalog: CatalogOnly,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=1_000_000, help="How many rows.")] = 20,
    where: WhereOption = None,
    csv: CsvOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the rows of CATALOG whose text (such as a title) fits the image least, by the stored match score.

    Where the model has no matching head, that is the cosine of the two.

    Example: `vlmflow titles catalog/ --top-k 100 --csv titles.csv`
    """
    from vlmflow.search.titles import find_titles
    from vlmflow.views_search import print_titles, titles_csv

    check_outputs(csv)
    report = find_titles(catalog_config(catalog, endpoint), top_k=top_k, where=where)
    if csv is not None:
        write_output(csv, titles_csv(report))
    show_result(report, print_titles, as_json=as_json)


@app.command(name="alt-text")
def alt_text(
    catalog: CatalogOnly,
    where: WhereOption = None,
    csv: CsvOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the images of CATALOG whose alternative text breaks a rule, those that share a text with others included.

    The texts of all images are the column alt_text of the images table; alt_text_rule is null where every rule of a
    single image holds.

    Example: `vlmflow alt-text catalog/ --where "decision = 'allow'" --csv to-write.csv`
    """
    from vlmflow.alt_text_report import broken_alt_texts
    from vlmflow.views_search import alt_texts_csv, print_alt_texts

    check_outputs(csv)
    found = broken_alt_texts(catalog_config(catalog, endpoint), where=where)
    if csv is not None:
        write_output(csv, alt_texts_csv(found))
    if as_json:
        for piece in found.as_json():
            emit(piece, end="")
        emit("")
    else:
        print_alt_texts(found, Screen())


def query_job(
    catalog: str, profile: str | None, config: Path | None, endpoint: str | None, *, has_queries: bool = True
) -> Job | None:
    """The job whose models embed the query; None: those of the newest run.

    Args:
        has_queries: if not, images alone are read, and a job file that names no profile will do.
    """
    if profile is None and config is None:
        return None
    return make_job(
        catalog,  # in place of a source, which is not read
        catalog,
        config,
        endpoint,
        profile=profile,
        tasks="embed",
        pools=(),  # they divide a run's tasks, of which this may be none
        defaults=lambda data: as_its_catalog(data) | ({} if has_queries else {"profile": "starter"}),
    )

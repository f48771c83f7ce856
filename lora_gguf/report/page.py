"""Write the page and the plot: each whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from string import Template

from lora_gguf.files.output import write_bytes
from lora_gguf.report import charts
from lora_gguf.report.content import Column, Content, file_rows
from lora_gguf.text import json_text, versions

LIBRARY = "window.vegaEmbed = vegaEmbed;"
FILES = (Column("role", "file"), Column("name", "name"), Column("size", "size", "bytes"))
PLOT_SCALE = 2  # pixels of a PNG for one of the chart's


def write_page(
    path: str | os.PathLike,
    content: Content,
    command: Sequence[str],
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Write ``content`` as one page that needs nothing else; ``command`` are the command line's words. ``FileError`` as
    ``write_bytes``.
    """
    write_bytes(path, page_of(content, command).encode(), force=force, inputs=inputs)


def write_plot(
    path: str | os.PathLike, content: Content, *, force: bool = False, inputs: Iterable[str | os.PathLike] = ()
) -> None:
    """Write the main heat maps and histograms as a PNG, or an SVG if ``path`` ends so."""
    import vl_convert

    rows = content.report[content.rows]
    summary = [f"{content.figure['value']} {content.figure['label']}", *content.lines]
    figure = json_text(charts.figure(content.title, summary, rows, charts.shown(content.measures, rows)))
    if os.fspath(path).lower().endswith(".svg"):
        image = vl_convert.vegalite_to_svg(figure).encode()
    else:
        image = vl_convert.vegalite_to_png(figure, scale=PLOT_SCALE)
    write_bytes(path, image, force=force, inputs=inputs)


def page_of(content: Content, command: Sequence[str]) -> str:
    """Return the page's HTML; its figures are those of ``content.report``, embedded as JSON under that key."""
    library, script = _library(), _inline(_part("page.js"))
    return Template(_part("page.html")).substitute(
        policy=policy((library, script)),
        title=html.escape(content.title),
        style=_part("page.css"),
        data=json_text(page_data(content, command), indent=None).replace("<", "\\u003c").replace("&", "\\u0026"),
        library=library,
        script=script,
    )


def page_data(content: Content, command: Sequence[str]) -> dict:
    """Return what the page's script reads."""
    rows = content.report[content.rows]
    measures = charts.shown(content.measures, rows)
    return {
        "title": content.title,
        "figure": content.figure,
        "lines": content.lines,
        "tables_first": content.tables_first,
        "best": content.best,
        "next": content.run,
        "warnings": content.warnings,
        "run": {"command": shlex.join(command), "versions": versions(), "files": file_rows(content.files)},
        "report": content.report,
        "rows": content.rows,
        "tables": [vars(table) | {"columns": [vars(column) for column in table.columns]} for table in content.tables],
        "columns": {
            "accounts": [vars(column) for column in content.accounts],
            "files": [vars(column) for column in FILES],
        },
        "charts": {
            "maps": {name: _map(name, measures, rows) for name in measures},
            "histograms": {name: charts.histogram(name) for name in measures if not charts.measure_of(name).nominal},
        },
        "config": {"light": charts.config(dark=False), "dark": charts.config(dark=True)},
    }


def _map(name: str, measures: Sequence[str], rows: Sequence[dict]) -> dict:
    measure = charts.measure_of(name)
    return {
        "title": measure.title,
        "about": measure.about,
        "wide": charts.heat_map(name, measures, rows),
        "tall": charts.heat_map(name, measures, rows, tall=True),
    }


def policy(scripts: Iterable[str]) -> str:
    """Return the Content-Security-Policy: these inline scripts may run, and nothing may be fetched from anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in a scope of their own: they have thousands of short names."""
    import vl_convert

    return _inline(f"(() => {{{vl_convert.javascript_bundle(LIBRARY)}\n}})();")


def _inline(script: str) -> str:
    """Return ``script`` so that it can stand in a page: nothing in it ends its element, and line ends are those that
    the browser hashes.
    """
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _part(name: str) -> str:
    return resources.files("lora_gguf.report").joinpath(name).read_text(encoding="utf-8")

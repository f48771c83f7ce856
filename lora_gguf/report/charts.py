"""The charts as Vega-Lite specifications without their data: rows of dicts with ``layer``, ``kind`` and the
measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

HISTOGRAM_BINS = 24
CELL, TALL_CELL, PRINTED_CELL = 28, 18, 20  # pixels
NARROW_FROM = 0.8  # where all tensors keep at least so much, the colours tell these apart
EXCESS = 1.25  # a tensor that keeps more acts too strongly: the colours then go to 2
VERDICTS = ("#2f8fc4", "#d1451b")  # right, or wrong
UNKNOWN = "#8884"
NO_LAYER = "–"  # where the axis of layers shows the tensors of none


@dataclass(frozen=True)
class Measure:
    """A column of the rows: what it is called, how d3 formats it, and what it says."""

    title: str
    format: str
    about: str
    nominal: bool = False


MEASURES = {
    "kept": Measure("delta kept", ".3f", "How strongly the adapter acts: 1 as trained, 0 erased by rounding."),
    "delta_per_step": Measure(
        "delta / step", ".3~g", "The update's rms over that of the step between two values that the type can hold; "
        "far below 1, rounding to nearest erases it."
    ),
    "delta_norm": Measure("delta norm", ".3~g", "How large the update is: its Frobenius norm."),
    "changed": Measure("codes changed", ".1%", "The share of the stored codes that differ from the base's."),
    "noise": Measure("noise / delta", ".3~g", "The rms of what rounding added, over that of the update."),
    "correlation": Measure("correlation", ".3~g", "Of the achieved change with the update."),
    "holds": Measure("holds", "", "Whether the tensor holds the base plus the update, within rounding.", nominal=True),
    "type": Measure("type", "", "The type that the tensor is stored in.", nominal=True),
}  # fmt: skip
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def measure_of(name: str) -> Measure:
    """Return what is shown of the rows' value ``name``; ``kept.nearest`` is ``kept``, of the way to merge called
    nearest.
    """
    measure, _, way = name.partition(".")
    return replace(MEASURES[measure], title=f"{MEASURES[measure].title}, {way}") if way else MEASURES[measure]


def value_of(row: dict, name: str) -> float | str | None:
    """Return a row's value of a measure."""
    measure, _, way = name.partition(".")
    value = row.get(measure)
    return value.get(way) if way and value is not None else value


def shown(measures: Iterable[str], rows: Iterable[dict]) -> list[str]:
    """Return the measures that some row has."""
    rows = list(rows)
    return [name for name in measures if any(value_of(row, name) is not None for row in rows)]


def heat_map(measure: str, measures: Sequence[str], rows: Sequence[dict], tall: bool = False) -> dict:
    """Return layers by kinds of tensor, coloured by ``measure``; the tooltip has all ``measures``. ``tall`` has layers
    downwards.
    """
    n_layers, n_kinds = len({row["layer"] for row in rows}), len({row["kind"] for row in rows})
    layers: dict[str, Any] = {
        "field": "at",
        "type": "ordinal",
        "sort": {"field": "layer", "op": "min"},
        "title": "layer",
    }
    kinds: dict[str, Any] = {"field": "kind", "type": "nominal", "sort": None, "title": None}
    layers["axis"] = {"labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False}
    kinds["axis"] = {"labelAngle": -90, "orient": "top"} if tall else {"labelAngle": 0}
    kinds["axis"] |= {"labelPadding": 6, "labelLimit": 140, "domain": False, "ticks": False}
    kinds["scale"] = layers["scale"] = {"paddingInner": 0.06}
    across, down = (kinds, layers) if tall else (layers, kinds)
    return {
        "width": "container",
        "height": TALL_CELL * n_layers if tall else CELL * n_kinds,
        "transform": [{"calculate": f"datum.layer == null ? '{NO_LAYER}' : '' + datum.layer", "as": "at"}],
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {"x": across, "y": down, "color": _colour(measure, rows), "tooltip": _tooltip(measures)},
    }


def _colour(measure: str, rows: Sequence[dict]) -> dict:
    shown_as = measure_of(measure)
    legend: dict[str, object] = {"orient": "top", "title": shown_as.title, "titleOrient": "left"}
    if shown_as.nominal:
        verdict = {"scale": {"domain": [True, False], "range": list(VERDICTS)}} if measure == "holds" else {}
        words = {"labelExpr": "datum.value ? 'right' : 'wrong'"} if measure == "holds" else {}
        return {"field": measure, "type": "nominal", "legend": legend | {"columns": 4} | words, **verdict}
    digits = ".2f" if _scale(measure, rows).get("domain") == [NARROW_FROM, 1] else ".1f"
    legend |= {"format": shown_as.format.replace(".3f", digits), "tickCount": 5}
    quantity = {"field": measure, "type": "quantitative", "scale": _scale(measure, rows), "legend": legend}
    # codes of another type than the base's have nothing that they could be compared with
    same = " && (!datum.base_type || datum.base_type === datum.type)" if measure == "changed" else ""
    return {"condition": {"test": f"isValid(datum.{measure}){same}", **quantity}, "value": UNKNOWN}


def _scale(measure: str, rows: Sequence[dict]) -> dict:
    if measure.partition(".")[0] != "kept":
        return {"zero": True, "range": "heatmap"}
    kept = [value for row in rows if isinstance(value := value_of(row, measure), (int, float))]
    too_much = max(kept, default=0) > EXCESS
    if kept and min(kept) >= NARROW_FROM and not too_much:
        return {"domain": [NARROW_FROM, 1], "clamp": True, "range": "heatmap", "interpolate": "rgb"}
    return {
        "domain": [0, 2 if too_much else 1],
        "clamp": True,
        "range": "ramp" if too_much else "diverging",
        "interpolate": "rgb",
    }


def _tooltip(measures: Sequence[str]) -> list[dict]:
    fields = [{"field": "name", "type": "nominal", "title": "tensor"}]
    for name in measures:
        measure = measure_of(name)
        quantity = {"type": "nominal"} if measure.nominal else {"type": "quantitative", "format": measure.format}
        fields.append({"field": name, "title": measure.title, **quantity})
    return fields


def histogram(measure: str) -> dict:
    """Return how many tensors have which value of ``measure``."""
    quantity = {"field": measure, "type": "quantitative", "bin": {"maxbins": HISTOGRAM_BINS}}
    axis = {"format": measure_of(measure).format, "labelOverlap": "parity", "labelSeparation": 10}
    count = {"aggregate": "count", "type": "quantitative", "title": "tensors"}
    return {
        "width": "container",
        "height": 130,
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": quantity | {"axis": axis, "title": measure_of(measure).title},
            "y": count | {"axis": {"tickCount": 4}},
        },
    }


def figure(title: str, subtitle: Sequence[str], rows: Sequence[dict], measures: Sequence[str]) -> dict:
    """Return a chart for print: the first two measures as heat maps, and their histograms."""
    chosen = list(measures[:2])
    printed = {"width": {"step": PRINTED_CELL}, "height": {"step": PRINTED_CELL}}
    maps = [heat_map(name, measures, rows) | printed for name in chosen]
    bars = [histogram(name) | {"width": 260} for name in chosen if not measure_of(name).nominal]
    return {
        "title": {"text": title, "subtitle": list(subtitle), "anchor": "start", "offset": 16},
        "background": "white",
        "padding": 16,
        "data": {"values": list(rows)},
        "vconcat": [*maps, {"hconcat": bars}],
        "resolve": {"scale": {"color": "independent"}},
        "config": config(dark=False),
    }


def config(dark: bool) -> dict:
    """Return the charts' colours and fonts, on a light or a dark page."""
    text, muted, grid = ("#e6e9ee", "#aab2bd", "#333b46") if dark else ("#1c2430", "#5a6472", "#e3e7ec")
    # pale is little and dark is much, on either page
    heat = ["#e9f0f8", "#9dc4e8", "#3c82c4", "#16498a"]
    kept, excess = ["#c8401a", "#f3c9a8", "#b9d9e6", "#1f7fb0"], ["#5a55b8", "#7d3bb0", "#5f2490"]
    category = [
        "#4f9be0",
        "#f0a03c",
        "#45b87f",
        "#e5645b",
        "#a57be0",
        "#c9b037",
        "#4cc3c7",
        "#e07bb4",
        "#9aa5b1",
        "#b5865a",
    ]
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {"labelColor": muted, "titleColor": muted, "gridColor": grid, "domainColor": grid, "tickColor": grid,
                 "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
        "legend": {"labelColor": muted, "titleColor": muted,
                   "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
        "title": {"color": text, "subtitleColor": muted, "fontSize": 15, "subtitleFontSize": 12},
        "bar": {"color": category[0]},
        "range": {"heatmap": {"scheme": heat}, "diverging": {"scheme": kept}, "ramp": {"scheme": [*kept, *excess]},
                  "category": category},
    }  # fmt: skip

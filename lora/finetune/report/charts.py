"""The charts of the report, as specifications in Vega-Lite: charts_of(evidence) -> Chart.

A method has the same colour, shape and dash in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora.finetune.colours import COLOURS
from lora.finetune.comparison.analysis import Analysis, MethodResult
from lora.finetune.data.corpus import MOST_CLASSES
from lora.finetune.metrics import is_share
from lora.finetune.report.evidence import Evidence
from lora.finetune.report.mistakes import reports_of

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # names the version; nothing is fetched
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4])
HEIGHT = 260  # pixels

Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart. `about` says in words what it shows, for those who cannot see it."""

    key: str
    title: str
    about: str
    spec: Spec


def charts_of(evidence: Evidence) -> list[Chart]:
    """Returns the charts that have something to show, in the order of the page."""
    analysis = evidence.analysis
    charts = [
        *_cost_charts(analysis),
        *_curve_charts(evidence),
        _rates_chart(analysis),
        _confusion_chart(evidence),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(key: str, title: str, about: str, values: Sequence[Any], **spec: Any) -> Chart:
    whole = {
        "$schema": SCHEMA, "description": about, "width": "container", "height": HEIGHT,
        "data": {"values": list(values)}, **spec,
    }  # fmt: skip
    return Chart(key, title, about, whole)


SHOWN = {"name": "shown", "value": None}
"""The list of methods that the reader chose; all of them if it is null."""
IF_SHOWN = {"filter": "!shown || indexof(shown, datum.method) >= 0"}


def _method_scales(analysis: Analysis, channel: str, values: Sequence[Any]) -> Spec:
    """Returns the encoding of the methods by colour and by a second channel."""
    names = [result.name for result in analysis.methods]

    def encoding(choices: Sequence[Any]) -> Spec:
        chosen = [choices[i % len(choices)] for i in range(len(names))]
        return {
            "field": "method", "type": "nominal", "title": None,
            "scale": {"domain": names, "range": chosen},
        }  # fmt: skip

    return {"color": encoding(COLOURS), channel: encoding(values)}


def _axis(field: str, title: str, share: bool, **more: Any) -> Spec:
    return {
        "field": field, "type": "quantitative", "title": title, "scale": {"zero": False},
        "axis": {"format": "~%" if share else "~g"}, **more,
    }  # fmt: skip


def _cost_charts(analysis: Analysis) -> list[Chart]:
    """Returns the score against trainable parameters, and against seconds of training."""
    parameters = [(r, float(r.summaries[0]["trainable"])) for r in analysis.methods]
    seconds = [(r, r.median("train_seconds")) for r in analysis.methods]
    return [
        _cost_chart(analysis, "parameters", "trainable parameters", parameters),
        _cost_chart(analysis, "seconds", "seconds of training", seconds),
    ]


def _cost_chart(
    analysis: Analysis, key: str, title: str, costs: Sequence[tuple[MethodResult, float | None]]
) -> Chart:  # fmt: skip
    share, metric = is_share(analysis.metric), f"{analysis.split} {analysis.metric}"
    values = [
        {"method": r.name, "cost": cost, "score": r.mean, "low": r.low, "high": r.high}
        for r, cost in costs
        if cost
    ]
    numbers = [cost for _, cost in costs if cost] or [1.0]
    scale: Spec = {"type": "linear", "zero": False, "padding": 20}
    if max(numbers) > 20 * min(numbers):
        scale = {"type": "log", "nice": False, "padding": 20}
    names, form = _method_scales(analysis, "shape", SHAPES), ".2%" if share else ".4f"
    tooltip = [
        {"field": "method", "type": "nominal"},
        {"field": "cost", "type": "quantitative", "title": title, "format": ",.0f"},
        *(
            {"field": f, "type": "quantitative", "title": t, "format": form}
            for f, t in (("score", metric), ("low", "95 % from"), ("high", "to"))
        ),
    ]
    x = {
        "field": "cost", "type": "quantitative", "title": title, "scale": scale,
        "axis": {"format": "~s", "tickCount": 5, "labelSeparation": 8},
    }  # fmt: skip
    return _chart(
        key, f"Score against {title}",
        f"The {metric} of each method with its 95 % interval, against its {title}."
        " The table of methods has the numbers.",
        values,
        params=[SHOWN], transform=[IF_SHOWN],
        encoding={"x": x, "tooltip": tooltip, "color": names["color"]},
        layer=[
            {"mark": {"type": "rule", "strokeWidth": 2},
             "encoding": {"y": _axis("low", metric, share), "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
             "encoding": {"y": _axis("score", metric, share), "shape": names["shape"]}},
        ],
    )  # fmt: skip


def _curve_charts(evidence: Evidence) -> list[Chart]:
    """Returns the losses and the metric on dev over the epochs, with the band of the seeds."""
    analysis = evidence.analysis
    names = list(dict.fromkeys(n for curves in evidence.curves.values() for n in curves))
    charts = []
    for number, name in enumerate(names):
        share = name == analysis.metric and is_share(name)
        title = f"dev {name}" if name == analysis.metric else name
        values = [
            {"method": method, "epoch": p.epoch, "mean": p.mean, "low": p.low, "high": p.high}
            for method, curves in evidence.curves.items()
            for p in curves.get(name, ())
        ]
        if len({value["epoch"] for value in values}) < 2:
            continue  # after one evaluation there is no curve
        several = any(len(result.seeds) > 1 for result in analysis.methods)
        band = " The band spans the lowest and the highest seed." * several
        charts.append(_curves(analysis, f"curve-{number}", title, band, values, share))
    return charts


def _curves(
    analysis: Analysis, key: str, title: str, band: str, values: list[Spec], share: bool
) -> Chart:  # fmt: skip
    form = ".2%" if share else ".4f"
    tooltip = [
        {"field": "method", "type": "nominal"},
        {"field": "epoch", "type": "quantitative", "format": ".2~f"},
        {"field": "mean", "type": "quantitative", "title": title, "format": form},
        *({"field": f, "type": "quantitative", "title": f"{f}est seed", "format": form}
          for f in ("low", "high")),
    ]  # fmt: skip
    names = _method_scales(analysis, "strokeDash", DASHES)
    x = {"field": "epoch", "type": "quantitative", "title": "epoch", "scale": {"nice": False}}
    few = len(values) <= 20 * len(analysis.methods)
    line = {"type": "line", "strokeWidth": 2, "point": {"size": 30} if few else False}
    return _chart(
        key, f"{title[0].upper()}{title[1:]} over the epochs",
        f"The {title} of each method over the epochs, the mean of its seeds.{band}",
        values,
        params=[SHOWN], transform=[IF_SHOWN],
        encoding={"x": x, "tooltip": tooltip, "color": names["color"]},
        layer=[
            {"mark": {"type": "area", "opacity": 0.15, "line": False},
             "encoding": {"y": _axis("low", title, share), "y2": {"field": "high"}}},
            {"mark": line,
             "encoding": {"y": _axis("mean", title, share), "strokeDash": names["strokeDash"]}},
        ],
    )  # fmt: skip


def _rates_chart(analysis: Analysis) -> Chart | None:
    """Returns the score on dev over the learning rate; None if no rates were searched."""
    values = [
        {
            "method": result.name, "rate": tried.rate, "score": tried.score,
            "chosen": tried.rate == result.search.chosen,
        }
        for result in analysis.methods
        if result.search
        for tried in result.search.tried
        if tried.score is not None
    ]  # fmt: skip
    if not values:
        return None
    share, title = is_share(analysis.searched_by), f"dev {analysis.searched_by}"
    tooltip = [
        {"field": "method", "type": "nominal"},
        {"field": "rate", "type": "quantitative", "format": "~g"},
        {"field": "score", "type": "quantitative", "title": title,
         "format": ".2%" if share else ".4f"},
        {"field": "chosen", "type": "nominal"},
    ]  # fmt: skip
    x = {
        "field": "rate", "type": "quantitative", "title": "learning rate",
        "scale": {"type": "log", "nice": False, "padding": 10},
        "axis": {"format": "~g", "tickCount": 6},
    }  # fmt: skip
    names = _method_scales(analysis, "strokeDash", DASHES)
    size = {"condition": {"test": "datum.chosen", "value": 200}, "value": 30}
    return _chart(
        "rates", f"{title[0].upper()}{title[1:]} over the learning rate",
        f"The {title} of each learning rate that was tried, by method. The larger point is the rate"
        " that was chosen. The table of rates has the numbers.",
        values,
        params=[SHOWN], transform=[IF_SHOWN],
        encoding={
            "x": x, "y": _axis("score", title, share), "tooltip": tooltip, "color": names["color"],
        },
        layer=[
            {"mark": {"type": "line", "strokeWidth": 2},
             "encoding": {"strokeDash": names["strokeDash"]}},
            {"mark": {"type": "point", "filled": True, "opacity": 1}, "encoding": {"size": size}},
        ],
    )  # fmt: skip


def _confusion_chart(evidence: Evidence) -> Chart | None:
    """Returns the confusion matrix of the method that the reader chooses; None if there are no
    classes, or more than a reader can see."""
    if evidence.task != "classification":
        return None
    reports = reports_of(evidence.answers)
    names = [result.name for result in evidence.analysis.ranked]
    labels = [each.label for each in reports[names[0]].classes]
    if len(labels) > MOST_CLASSES:
        return None
    values = [
        {"method": name, "true": true, "predicted": label, "rows": count,
         "share": count / (sum(counts) or 1)}
        for name in names
        for true, counts in zip(labels, reports[name].matrix, strict=True)
        for label, count in zip(labels, counts, strict=True)
    ]  # fmt: skip
    axis = {"type": "nominal", "sort": labels, "axis": {"labelAngle": 0, "labelLimit": 110}}
    # On the blues of the scheme, white is easier to read from 0.75 on.
    ink = {"condition": {"test": "datum.share > 0.75", "value": "white"}, "value": "black"}
    return _chart(
        "confusion", "Confusion matrix",
        "The rows of each class by the class that was predicted, summed over the seeds of the"
        " chosen method. The table of confusions has the numbers.",
        values,
        params=[{"name": "matrix", "value": names[0],
                 "bind": {"input": "select", "options": names, "name": "Method: "}}],
        transform=[{"filter": "datum.method === matrix"}],
        encoding={
            "x": {"field": "predicted", "title": "predicted", **axis},
            "y": {"field": "true", "title": "class", **axis},
        },
        layer=[
            {"mark": "rect",
             "encoding": {
                 "color": {"field": "share", "type": "quantitative", "title": "share of the class",
                           "scale": {"domain": [0, 1], "scheme": "blues"},
                           "legend": {"format": "~%", "orient": "bottom"}},
                 "tooltip": [
                     *({"field": f, "type": "nominal"} for f in ("true", "predicted")),
                     {"field": "rows", "type": "quantitative", "format": ","},
                     {"field": "share", "type": "quantitative", "format": ".1%"},
                 ]}},
            {"mark": {"type": "text", "fontSize": 12},
             "encoding": {"text": {"field": "rows", "type": "quantitative", "format": ","},
                          "color": ink}},
        ],
    )  # fmt: skip

"""Renders a report as one HTML page: page_of(evidence) -> bytes."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import time
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from lora import __version__
from lora.finetune.report.charts import charts_of
from lora.finetune.report.contents import configurations, lead_of, tables_of
from lora.finetune.report.evidence import Evidence
from lora.finetune.report.formats import FORMATS

VERDICT_ANSWERS = ("Which is best?", "Is that real?", "What does it cost?")
"""What the three sentences of a verdict answer, in their order."""
UNPRINTABLE = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127], "\N{REPLACEMENT CHARACTER}")
"""Characters that HTML cannot contain."""


def page_of(evidence: Evidence) -> bytes:
    """Returns the page. It contains everything that it needs, and its policy forbids the browser
    to fetch anything or to run any script but its own."""
    tables = tables_of(evidence)
    charts = charts_of(evidence)
    analysis = evidence.analysis
    data = {
        "charts": {chart.key: chart.spec for chart in charts},
        "files": {
            f"{table.key}.{ending}": write(table)
            for table in tables.values()
            for ending, write in FORMATS.items()
        } | configurations(evidence),
    }  # fmt: skip
    scripts = [_resource("page.js"), charting_library()]
    verdict = analysis.verdict
    asked = VERDICT_ANSWERS if len(verdict) == len(VERDICT_ANSWERS) else [""] * len(verdict)
    html = _templates().get_template("page.html").render(
        analysis=analysis,
        tables=tables,
        charts={chart.key: chart for chart in charts},
        data=data,
        verdict=list(zip(asked, verdict, strict=True)),
        lead=lead_of(analysis),
        incomplete=evidence.incomplete,
        runs=len(evidence.runs),
        style=Markup(_resource("page.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_source_hash(script) for script in scripts],
        made=f"{time.strftime('%Y-%m-%d %H:%M')} by lora-from-scratch {__version__}",
    )  # fmt: skip
    return html.encode("utf-8", errors="replace")


def _templates() -> jinja2.Environment:
    """Returns the templates, which escape everything that is not Markup."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: Any) -> Any:
    """Returns a text without the characters that HTML cannot contain."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.translate(UNPRINTABLE)
    return value


def _resource(name: str) -> str:
    """Returns the text of a file of this package."""
    return files("lora.finetune.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(script: str) -> str:
    """Returns a script's hash, as Content-Security-Policy names a script that may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


BUNDLE = """
import sys, vl_convert
sys.stdout.buffer.write(vl_convert.javascript_bundle("window.drawCharts(vegaEmbed);").encode())
"""


@cache
def charting_library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, which vl-convert contains.

    It takes two seconds to bundle, in another process: in this one, vl-convert would let no
    other thread run meanwhile.
    """
    done = subprocess.run([sys.executable, "-c", BUNDLE], stdout=subprocess.PIPE, check=True)
    # The HTML parser must not see the end of the script before its end.
    script = re.sub(r"</(?=script)", r"<\\/", done.stdout.decode(), flags=re.IGNORECASE)
    return script.replace("<!--", r"<\!--")

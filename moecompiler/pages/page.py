"""A template with its style and its script as one HTML page: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2

from moecompiler.pages.figures import counted, duration, figure

_SHARED = files(__package__) / "shared"


def render_page(
    package: str, filters: Mapping[str, Callable[..., Any]], *, template: str = "page.html.j2", **values: Any
) -> str:
    """A template of ``package``'s folder ``page``, with the ``values``.

    ``style`` is ``base.css`` of all pages and the folder's own ``style.css``, ``script`` likewise; ``policy`` is the content
    security policy under which that script alone may run. Names among the values may be anybody's: all are escaped.
    """
    own = files(package) / "page"

    def read(name: str) -> str:
        place = own if (own / name).is_file() else _SHARED
        return (place / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"counted": counted, "duration": duration, "figure": figure, "percent": "{:.2%}".format}
    environment.filters |= filters
    script = read("base.js") + read("script.js")
    return environment.get_template(template).render(
        style=read("base.css") + read("style.css"), script=script, policy=_policy(script), **values
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )

"""Render a template and its data as one HTML file, with a content security policy that lets it load nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, *, loaders: Sequence[BaseLoader] = (), **data: Any) -> str:
    """The page of a template and its data. loaders: template loaders that are tried first."""
    where = ChoiceLoader([*loaders, PackageLoader("llmq.report.page")])
    environment = Environment(
        loader=where, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breaks"] = breaks
    style, script = _part("style.css"), _part("script.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    page = environment.get_template(template)
    return page.render(style=Markup(style), script=Markup(script), policy=policy, llmq=version("llmq"), **data)


def breaks(name: str) -> Markup:
    """A dotted name with allowed line breaks after its dots, slashes, colons and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[./:_])", name))


@cache
def _part(name: str) -> str:
    return (files("llmq.report.page") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

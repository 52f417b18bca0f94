"""The frame of a page: data is text, the policy fits the page's own style and script, what is missing is an error."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib.resources import files

import jinja2
import pytest

from llmq.report.page.frame import breaks, render

TEMPLATE = '<meta content="{{ policy }}"><style>{{ style }}</style><script>{{ script }}</script><p>{{ name }}</p>'


def page(template: str = TEMPLATE, **data: object) -> str:
    return render("own.j2", loaders=[jinja2.DictLoader({"own.j2": template})], **data)


def test_data_is_escaped() -> None:
    made = page(name="<b>&\"'{{ 1 }}")
    assert "<p>&lt;b&gt;&amp;&#34;&#39;{{ 1 }}</p>" in made


def test_the_policy_is_of_the_very_style_and_script() -> None:
    made = page(name="")
    policy = html.unescape(re.search(r'content="([^"]*)"', made)[1])  # type: ignore[index]
    wanted = "default-src 'none'; "
    for part, name in (("style", "style.css"), ("script", "script.js")):
        text = re.search(rf"<{part}>(.*?)</{part}>", made, re.DOTALL)[1]  # type: ignore[index]
        assert text == (files("llmq.report.page") / "templates" / name).read_text(encoding="utf-8")
        wanted += f"{part}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'; "
    assert policy == f"{wanted}base-uri 'none'"


def test_what_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="name"):
        page()


def test_a_template_of_one_s_own_goes_first_and_the_page_s_own_are_there() -> None:
    shipped = [path.name for path in (files("llmq.report.page") / "templates").iterdir() if path.name.endswith(".j2")]
    assert "report.html.j2" in shipped
    loaders = [jinja2.DictLoader({"report.html.j2": "mine"})]
    assert render("report.html.j2", loaders=loaders) == "mine"
    with pytest.raises(jinja2.TemplateNotFound):
        render("none.j2")


def test_a_name_may_be_broken_after_its_parts() -> None:
    assert str(breaks("a.b/c:d_e")) == "a.<wbr>b/<wbr>c:<wbr>d_<wbr>e"
    assert str(breaks("<b>.c")) == "&lt;b&gt;.<wbr>c"

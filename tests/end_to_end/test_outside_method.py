"""A method from outside: one file in a package of its own, an entry point, nothing changed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq import methods
from llmq.cli import options
from llmq.recipe import catalog
from llmq.recipe.recipe import Recipe
from tests.conftest import ROOT
from tests.forked import Command, Server
from tests.llmq.refusal import refused

METHOD = '''
"""A method of somebody else's: keeps every weight's largest codes only."""

from __future__ import annotations

from llmq.methods import Method, round_to_nearest


class Coarse(Method):
    """Rounds to nearest and lets the smallest codes go.

    its_option: codes up to this magnitude become 0; loud: whether it says so.
    """

    def __init__(self, *, its_option: int = 1, loud: bool = False) -> None:
        self.least, self.loud = its_option, loud

    def quantize(self, weight, scheme, stats, scale_dtype):
        """See `Method.quantize`."""
        found = round_to_nearest(weight, scheme, scale_dtype, "minmax")
        found.codes[found.codes.abs() <= self.least] = 0
        return found
'''

SHORT = ["--group-size", "32", "--samples", "2", "--seqlen", "32"]


def install(folder: Path, entry_point: str, **files: str) -> Path:
    """A distribution as pip leaves it behind: modules, and the metadata that names an entry point."""
    info = folder / "mymethod-1.0.dist-info"
    info.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mymethod\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llmq.methods]\n{entry_point}\n")
    (info / "RECORD").write_text("".join(f"{name}.py,,\n" for name in files))
    return folder


@pytest.fixture
def run(forked: Server) -> Callable[..., Command]:
    """The command line in a process that sees the distribution: run(site, 'methods')."""
    return lambda site, *words: forked.run(*words, path=[site], COLUMNS="200", TERM="dumb")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method installed."""
    return install(tmp_path_factory.mktemp("site"), "coarse = mymethod:Coarse", mymethod=METHOD)


def words(text: str) -> str:
    return " ".join(text.split())


def test_it_is_listed_with_its_options(site: Path) -> None:
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "kernels", ROOT / "eval")))
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "TERM": "dumb"}

    def shown(*given: str) -> str:
        command = [sys.executable, "-m", "llmq.cli", *given]
        return words(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)

    row = shown("methods").partition("coarse")[2]
    for said in (
        "(quantize, from another package) Rounds to nearest and lets the smallest codes go",
        "--its-option: codes up to this magnitude become 0. Default 1.",
        "--loud: ",
    ):
        assert said in row
    help_of = shown("quantize", "--help")
    assert "--its-option" in help_of and "codes up to this magnitude become 0" in help_of and "--no-loud" in help_of


@pytest.mark.slow
def test_it_runs_with_its_option(
    site: Path, tiny_model: Path, text_file: Path, tmp_path: Path, run: Callable[..., Command]
) -> None:
    smallest = {}
    for option in (None, 3):
        out = tmp_path / f"out {option}"
        chosen = () if option is None else ("--its-option", option)
        done = run(site, "quantize", tiny_model, "-o", out, "--method", "coarse", *chosen, "--calib", text_file, *SHORT)
        assert done.returncode == 0, done.stderr
        packed = first_packed(out)
        codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], -1).flatten() - 8
        smallest[option] = int(codes[codes != 0].abs().min())
        assert bool((codes == 0).any())
        report = json.loads((out / "report.json").read_text())
        assert report["recipe"]["methods"] == ["coarse"]
        assert report["recipe"]["options"] == ({} if option is None else {"its_option": 3})
    assert smallest == {None: 2, 3: 4}


def first_packed(out: Path) -> Tensor:
    """The first packed weight of a folder."""
    for file in sorted(out.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name.endswith("weight_packed"):
                return value
    raise AssertionError(f"{out} holds no packed weight")


@pytest.mark.slow
def test_it_joins_a_recipe(
    site: Path, tiny_model: Path, text_file: Path, tmp_path: Path, run: Callable[..., Command]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("methods: awq+coarse\nscheme: {group_size: 32}\noptions: {its_option: 0, alphas: 2}\n")
    done = run(site, "quantize", tiny_model, "-o", tmp_path / "out", "--recipe", file, "--calib", text_file, *SHORT)
    assert done.returncode == 0, done.stderr
    done = run(site, "plan", tiny_model, "--method", "coarse", "--its-option", "two")
    assert done.returncode == 2 and "--its-option" in words(done.stderr)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Lets this process see a distribution, for a while."""
    caches = (catalog._outside, catalog.describe, catalog.known)

    def see(site: Path) -> None:
        monkeypatch.syspath_prepend(str(site))
        for cache in caches:
            cache.cache_clear()

    yield see
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("mymethod", None)


def made(*names: str, **options: object) -> methods.Pipeline:
    return methods.make(Recipe.from_dict({"methods": list(names), "options": options}))


def test_it_is_a_method_like_others(site: Path, inside: Callable[[Path], None]) -> None:
    inside(site)
    quantizer = made("smoothquant", "coarse", its_option=4).quantizer
    assert (type(quantizer).__name__, vars(quantizer)) == ("Coarse", {"least": 4, "loud": False})
    refused(lambda: made("coarse", "gptq"), "coarse and gptq both quantize")
    refused(lambda: made("coarse", "awq"), "write 'awq+coarse'")
    refused(lambda: made("rtn", its_option=2), "choose a method that has it (coarse)")
    refused(lambda: made("coarse", its_option=2.5), "its-option must be a whole number")
    refused(lambda: made("coarce"), "did you mean 'coarse'?")


KMEANS = (
    METHOD.replace(
        "        found.codes[found.codes.abs() <= self.least] = 0\n        return found",
        "        return QuantizedWeight((found.codes + 8).to(torch.uint8), found.scale, None, scheme)",
    )
    .replace("import Method, round", "import Method, QuantizedWeight, round")
    .replace("from llmq", "import torch\nfrom llmq")
)


@pytest.mark.slow
def test_what_no_format_stores_is_refused_by_the_plan(
    tmp_path: Path, tiny_model: Path, text_file: Path, run: Callable[..., Command]
) -> None:
    """Before any work, with the method's and the weight's name."""
    site = install(tmp_path / "site", "coarse = mymethod:Coarse", mymethod=KMEANS)
    done = run(site, "plan", tiny_model, "--method", "coarse", "--calib", text_file, *SHORT)
    said = words(done.stderr)
    assert done.returncode == 2 and "Traceback" not in said, said
    for word in (
        "'coarse'",
        "model.layers.0.self_attn.q_proj.weight",
        "codes to pack must be int8",
        "codes int8 [8, 64]",
    ):
        assert word in said, said


def test_what_is_no_literal_is_shown_as_it_stands(tmp_path: Path, inside: Callable[[Path], None]) -> None:
    """Arguments with or without names, annotations of all kinds, a default that is an expression."""
    signature = "self, its_option: int = 1 + LEAST, share: Optional[float] = None, *, loud: bool = False"
    changed = METHOD.replace("self, *, its_option: int = 1, loud: bool = False", signature)
    extra = "\nfrom typing import Optional\n\nLEAST = 2\n\n\nclass Coarse"
    inside(install(tmp_path / "site", "coarse = mymethod:Coarse", mymethod=changed.replace("\nclass Coarse", extra)))
    found = catalog.describe("coarse")
    assert [(o.name, o.kind, o.default) for o in found.options] == [
        ("its_option", int, "1 + LEAST"),
        ("share", float, None),
        ("loud", bool, False),
    ]
    assert vars(made("coarse").quantizer)["least"] == 3
    assert vars(made("coarse", share=0.5, its_option=2).quantizer)["least"] == 2


HELPED = METHOD.replace(
    "\n\nclass Coarse(Method)",
    '''
from dataclasses import dataclass


@dataclass
class Settings:
    """Says how. Not a method, though it comes first."""

    wrong: int = 0


class _Shared(Method):
    scheme = {"bits": 3}

    def __init__(self, *, its_option: int = 1, loud: bool = False) -> None:
        self.least, self.loud = its_option, loud


class Coarse(_Shared)''',
).replace(
    """    def __init__(self, *, its_option: int = 1, loud: bool = False) -> None:
        self.least, self.loud = its_option, loud

    def quantize""",
    "    def quantize",
)


@pytest.mark.parametrize("entry_point", ["coarse = mymethod:Coarse", "coarse = mymethod"])
def test_a_helper_class_before_it_hides_nothing(
    entry_point: str, tmp_path: Path, inside: Callable[[Path], None]
) -> None:
    """What is described is what runs: the class derived from Method, here through another class of the file."""
    assert HELPED.count("def __init__") == 1 and "class Coarse(_Shared)" in HELPED
    inside(install(tmp_path / "site", entry_point, mymethod=HELPED))
    found = catalog.describe("coarse")
    assert (found.kind, found.roles, found.scheme) == ("Coarse", ("quantize",), {"bits": 3})
    assert found.summary == "Rounds to nearest and lets the smallest codes go"
    assert [(o.name, o.default) for o in found.options] == [("its_option", 1), ("loud", False)]
    assert methods.find("coarse").__name__ == "Coarse"
    quantizer = made("coarse", its_option=4).quantizer
    assert (type(quantizer).__name__, vars(quantizer)) == ("Coarse", {"least": 4, "loud": False})


def test_a_module_without_a_method_is_named(tmp_path: Path, inside: Callable[[Path], None]) -> None:
    inside(install(tmp_path / "site", "coarse = mymethod", mymethod="class Coarse:\n    pass\n"))
    refused(lambda: made("coarse"), "'coarse'", "no class derived from Method")


BROKEN = {
    "import error": (
        "coarse = mymethod:Coarse",
        METHOD.replace("from llmq.methods", "import nowhere_to_be_found\nfrom llmq.methods"),
        "nowhere_to_be_found",
    ),
    "no method": ("coarse = mymethod:Coarse", "class Coarse:\n    '''Not one.'''\n", "not a class derived from"),
    "no class": ("coarse = mymethod:Coarsest", METHOD, "Coarsest"),
    "no module": ("coarse = yourmethod:Coarse", METHOD, "yourmethod"),
    "no package": ("coarse = yourpackage.methods:Coarse", METHOD, "yourpackage"),
    "a package that fails": ("coarse = mymethod.inner:Coarse", "raise RuntimeError('no licence')\n", "no licence"),
    "no Python": ("coarse = mymethod:Coarse", "class Coarse(:\n", "mymethod.py cannot be read"),
    "no plain scheme": (
        "coarse = mymethod:Coarse",
        METHOD.replace("    def __i", "    scheme = dict(bits=8)\n\n    def __i"),
        "scheme",
    ),
}


# What is well written and cannot be imported is found out when it is used.
LATE = ("import error", "no method")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_one_is_named_when_it_is_used(kind: str, tmp_path: Path, inside: Callable[[Path], None]) -> None:
    entry_point, text, named = BROKEN[kind]
    inside(install(tmp_path / "site", entry_point, mymethod=text))
    refused(lambda: made("coarse"), "'coarse'", named)
    found, broken = catalog.known()
    assert {"awq", "gptq", "rtn", "smoothquant"} <= {method.name for method in found}
    assert len(broken) == (kind not in LATE) and all("'coarse'" in said for said in broken)
    assert {"damping", "alpha"} <= {option.name for option in options.method_options()}
    refused(lambda: made("rtn", damping=0.1), "choose a method that has it (gptq, vq)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["import error", "a package that fails"])
def test_a_broken_one_takes_nothing_down(
    kind: str, tiny_model: Path, text_file: Path, tmp_path: Path, run: Callable[..., Command]
) -> None:
    entry_point, text, named = BROKEN[kind]
    site = install(tmp_path / "site", entry_point, mymethod=text)
    done = run(site, "plan", tiny_model, "--method", "coarse", "--calib", text_file, *SHORT)
    said = words(done.stderr)
    assert done.returncode == 2 and "Traceback" not in said, said
    assert said.count("error:") == 1 and "'coarse'" in said and named in said, said
    listed = run(site, "methods")
    assert listed.returncode == 0 and "smoothquant" in listed.stdout, listed.stderr
    if kind not in LATE:
        assert "warning:" in listed.stderr and "'coarse'" in words(listed.stderr), listed.stderr
    assert run(site, "quantize", "--help").returncode == 0

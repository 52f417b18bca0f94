"""The rules of docs/design.md that can be read off the source: imports, names, sizes, no pickle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "llmq": ROOT / "llmq",
    "llmq_kernels": ROOT / "kernels" / "llmq_kernels",
    "llmq_eval": ROOT / "eval" / "llmq_eval",
}
MAY_IMPORT = {
    "llmq": {"llmq", "llmq_kernels"},
    "llmq_kernels": {"llmq_kernels"},
    "llmq_eval": {"llmq_eval", "llmq"},
}
MODEL_NAMES = re.compile(
    r"(?<!o)llama(?![-._]cpp)|mistral|mixtral|qwen|gemma|gpt2|gpt_neox|falcon|deepseek|phi3|bloom|mamba|glm4|olmo|cohere|opt-\d"
    r"|q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|input_layernorm|self_attn"
    r"|position_embeddings|attention_mask",
    re.IGNORECASE,
)


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Top-level names of every absolute import in the file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def may_reach_everything(file: Path) -> bool:
    return file.parent == ROOT / "llmq" / "cli"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = {
        str(file.relative_to(ROOT)): sorted(reached)
        for file in sources(package)
        if not may_reach_everything(file) and (reached := imports(file) & set(PACKAGES) - MAY_IMPORT[package])
    }
    assert not wrong


# Folders and files of llmq/, lowest first: each imports only what stands in earlier groups (docs/design.md, §2).
GROUPS = (
    {"errors", "validate", "machine", "ranks", "spill", "watch", "demo"},
    {"checkpoint", "discovery", "grids"},
    {"recipe", "numerics", "formats", "block"},
    {"data", "methods", "inference"},
    {"planning", "training"},
    {"report"},
    {"streaming", "push", "export"},
    {"allocation"},
    {"job"},
    {"adapters"},
    {"cli"},
)
MOST_NAMES = 29


def module_name(file: Path) -> str:
    """The dotted name of a module of llmq."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(file: Path, modules: set[str]) -> set[str]:
    """Every module of llmq that the file imports, inside functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & modules


def room(module: str) -> str:
    """The folder or file directly under llmq/ that a module is in; llmq itself, which only hands on names, is none."""
    return module.partition(".")[2].partition(".")[0]


def imports_of_llmq() -> dict[str, set[str]]:
    """Module → the modules that it imports."""
    modules = {module_name(file) for file in sources("llmq")}
    return {module_name(file): modules_imported(file, modules) for file in sources("llmq")}


def test_every_room_has_its_group() -> None:
    assert {room(module) for module in imports_of_llmq()} - {""} == set().union(*GROUPS)


def test_a_folder_imports_only_earlier_groups() -> None:
    level = {name: i for i, group in enumerate(GROUPS) for name in group}
    wrong = [
        f"{module} imports {other}"
        for module, reached in imports_of_llmq().items()
        for other in reached
        if room(module)
        and room(other)
        and room(other) != room(module)
        # The ground is files without folders: they may build on each other, in a row.
        and (level[room(other)] > level[room(module)] or level[room(other)] == level[room(module)] > 0)
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    """Inner imports are counted; a package that hands on the names of its modules is not."""
    left = {
        module: {other for other in reached if other != module and not module.startswith(other + ".")}
        for module, reached in imports_of_llmq().items()
    }
    while free := [module for module, reached in left.items() if not reached & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_the_hall_is_small() -> None:
    names = [path.name for path in (ROOT / "llmq").iterdir() if path.name != "__pycache__"]
    assert len(names) <= MOST_NAMES, sorted(names)


def test_kernels_know_torch_and_nothing_above_it() -> None:
    above = {"transformers", "accelerate", "datasets", "huggingface_hub", "compressed_tensors", "typer", "rich"}
    wrong = {str(file.relative_to(ROOT)): found for file in sources("llmq_kernels") if (found := imports(file) & above)}
    assert not wrong


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_plain_folders_stay_plain(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"a regular package named {folder} shadows PyPI's"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_files_are_short() -> None:
    long = {}
    for folder in (*PACKAGES.values(), ROOT / "scripts", ROOT / "tests"):
        for file in folder.rglob("*.py"):
            limit = 199 if file.parent == ROOT / "llmq" / "methods" else 400
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > limit:
                long[str(file.relative_to(ROOT))] = lines
    assert not long


def test_no_model_is_named() -> None:
    named = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sources("llmq")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if MODEL_NAMES.search(line)
    ]
    assert not named


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pickle(package: str) -> None:
    wrong = []
    for file in sources(package):
        if imports(file) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
            wrong.append(f"{file.relative_to(ROOT)}: imports a pickler")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


@pytest.mark.slow
def test_imports_without_triton() -> None:
    """A machine without a GPU build of torch has no triton: all three packages must import there."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"sys.path[:0] = {[str(folder.parent) for folder in PACKAGES.values()]!r}\n"
        "import llmq, llmq_kernels, llmq_eval\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Modules that decide nothing of their own: what they do is seen where the command line is called.
EXCUSED = {
    "cli/adapters": "options to one call each; tests/llmq/adapters and tests/end_to_end call the commands",
    "cli/app": "options to one call each; tests/end_to_end calls the commands",
    "cli/evaluate": "options to one call each; tests/eval calls the commands",
    "cli/push": "options to one call; tests/llmq/test_push.py has what it calls",
    "cli/tune": "options to one call each; tests/kernels/test_tune.py has what it calls",
}


def decides(file: Path) -> bool:
    """Whether some function or class of a module has a branch."""
    branches = (ast.If, ast.For, ast.While, ast.Try, ast.Match)
    bodies = (ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(
        isinstance(inner, branches)
        for node in ast.walk(tree)
        if isinstance(node, bodies)
        for statement in node.body
        for inner in ast.walk(statement)
    )


def has_tests(module: str) -> bool:
    """Whether a module, named by its path, has a test file of its own name; a package's may lie inside or beside it."""
    folder, name = (ROOT / "tests" / "llmq" / module).parent, module.rpartition("/")[2]
    places = [folder / f"test_{name.lstrip('_')}.py"]
    if (ROOT / "llmq" / module).is_dir():
        inside = folder / name
        places += [inside / "test_init.py", inside / f"test_{name}.py"]
    # A module whose tests need a folder of their own.
    places.append(folder / name / f"test_{name}.py")
    return any(place.is_file() for place in places)


def deciding() -> set[str]:
    """Every module of llmq that decides something, by its path without the ending; a package by its folder."""
    found = {file for file in sources("llmq") if decides(file)}
    paths = {file.relative_to(ROOT / "llmq").with_suffix("").as_posix() for file in found}
    return {path.removesuffix("/__init__") for path in paths} - {"__init__"}


def test_every_module_that_decides_has_tests_of_its_name() -> None:
    without = {module for module in deciding() if not has_tests(module)}
    assert without <= EXCUSED.keys(), "write tests/llmq/<folder>/test_<module>.py"


def test_nothing_is_excused_that_is_not_there() -> None:
    assert EXCUSED.keys() <= deciding()
    assert not [module for module in EXCUSED if has_tests(module)]


def test_a_new_module_would_be_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    new = tmp_path / "llmq" / "discovery" / "new.py"
    new.parent.mkdir(parents=True)
    new.write_text("def f(x: int) -> int:\n    return x\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(PACKAGES, "llmq", tmp_path / "llmq")
    assert deciding() == set()
    new.write_text("class C:\n    def f(self, x: int) -> int:\n        if x:\n            return 1\n        return x\n")
    assert deciding() == {"discovery/new"} and not has_tests("discovery/new")
    tests = tmp_path / "tests" / "llmq" / "discovery" / "test_new.py"
    tests.parent.mkdir(parents=True)
    tests.touch()
    assert has_tests("discovery/new")

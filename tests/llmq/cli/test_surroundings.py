"""Terminals that are not UTF-8, closed pipes, users without a name or a home: no traceback, and readable text."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmq.cli import surroundings
from tests.forked import Server

ROOT = Path(__file__).parents[3]
NOBODY = 54321
# Commands one after the other, each with its output in a file; whatever one imports, it imports in these surroundings.
SEVERAL = """
import json, os, sys, traceback
folder, user, *commands = json.load(sys.stdin)
if user is not None:
    os.setreuid(user, -1)  # Only the real user changes: the files of this interpreter may be root's own.
from llmq.cli import main
told, codes = os.dup(1), []
for i, words in enumerate(commands):
    file = os.open(os.path.join(folder, f"printed-{i}"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = ["llmq", *words]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
    except BaseException:
        traceback.print_exc()
        codes.append(-1)
    sys.stdout.flush(), sys.stderr.flush()
os.write(told, json.dumps(codes).encode())
"""


def around(drop: str = "", **more: str) -> dict[str, str]:
    """The environment with these changes, in which a process finds this tree."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    kept = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", drop)}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def several(
    folder: Path, *commands: Sequence[str], codes: Sequence[int] = (), user: int | None = None, **more: str
) -> list[bytes]:
    """What commands print that run in one process, which end with these codes (all with 0 if none is given)."""
    given = json.dumps([str(folder), user, *commands])
    command = [sys.executable, "-c", SEVERAL]
    done = subprocess.run(command, env=around(**more), input=given.encode(), capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    printed = [(folder / f"printed-{i}").read_bytes() for i in range(len(commands))]
    ended = json.loads(done.stdout)
    for words, wanted, code, text in zip(commands, codes or [0] * len(commands), ended, printed, strict=True):
        assert code == wanted and b"Traceback" not in text, (words, code, text.decode(errors="replace"))
    return printed


@pytest.mark.parametrize(
    ("given", "encoding", "printed"),
    [
        ("8 × 4 → 2 …", "ascii", b"8 x 4 -> 2 ..."),
        ("8 × 4 → 2 …", "latin-1", b"8 \xd7 4 -> 2 ..."),
        ("8 × 4 → 2 …", "cp1252", b"8 \xd7 4 -> 2 \x85"),
        ("± ≈ ▲ ‖D‖ α", "ascii", b"+/- ~ ^ ||D|| alpha"),
        ("café ﬁ 日本", "ascii", b"cafe fi ??"),
        ("a\udcffb", "utf-8", b"a?b"),  # a file name that is not UTF-8
        ("日本 ×", "utf-8", "日本 ×".encode()),
    ],
)
def test_what_a_terminal_does_not_have(
    given: str, encoding: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding=encoding))
    surroundings.settle()
    print(given, end="", flush=True)
    assert kept.getvalue() == printed


def test_what_is_no_fault_of_the_terminal() -> None:
    with pytest.raises(UnicodeDecodeError):
        surroundings.plain(UnicodeDecodeError("utf-8", b"x", 0, 1, "why"))


@pytest.mark.slow
def test_commands_in_the_c_locale(tmp_path: Path) -> None:
    """Where not only what is printed is ASCII, but the names of files, too."""
    commands = (
        "plan demo --method rtn",
        "quantize demo --method rtn -o FOLDER/q",
        "inspect FOLDER/q",
        "plan ./nowhere-\u65e5",
        "inspect demo",
        "recipes",
        "methods",
        "plan --help",
        "generate demo \u03b1 --tokens 2",
        "eval demo --max-windows 2 --window 64 --out FOLDER/out",
        "compare FOLDER/out",
    )
    words = [line.replace("FOLDER", str(tmp_path)).split() for line in commands]
    codes = [2 if "nowhere" in line else 0 for line in commands]
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    planned, run, inspected, refused, *others = several(tmp_path, *words, codes=codes, COLUMNS="150", **c_locale)
    for shown in (planned, run, inspected, refused, *others):
        shown.decode("ascii")
    assert b"->" in planned and re.search(rb"\d+ x \d+", planned)
    assert b"verified" in run and b"int4 g128" in inspected and b"?" in refused
    assert b"perplexity" in others[-1]


@pytest.mark.slow
def test_a_pipe_that_is_closed() -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    line = f"{sys.executable} -m llmq.cli methods | true"
    done = subprocess.run(["sh", "-c", line], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"COLUMNS": "1"}, {"COLUMNS": "5", "TERM": "dumb"}])
def test_terminals_that_can_do_little(more: dict[str, str], forked: Server) -> None:
    done = forked.run("inspect", "demo", **more)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import getpass
    import pwd

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    surroundings.name_user()
    assert getpass.getuser() == f"uid{os.getuid()}"
    home = Path.home()
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HOME")
    surroundings.name_user()
    assert Path.home() == home
    # Somebody else could have made it first.
    home.rmdir()
    home.symlink_to(tmp_path)
    monkeypatch.delenv("HOME")
    surroundings.name_user()
    assert Path.home() != home and Path.home().parent == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    surroundings.name_user()
    assert os.environ["HOME"] == str(tmp_path)
    monkeypatch.setenv("HOME", "/none")
    surroundings.name_user()
    assert Path.home().is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_commands_of_a_user_without_a_name_and_a_home() -> None:
    import tempfile

    # pytest's own folders can be read by their owner only.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        commands = (
            f"quantize demo --method rtn -o {folder}/out",
            "plan demo --method rtn",
            "eval demo --max-windows 1 --window 64",
            "generate demo the --tokens 2",
            "inspect demo",
        )
        several(Path(folder), *(words.split() for words in commands), user=NOBODY, drop="HOME", TMPDIR=folder)


@pytest.mark.slow
def test_results_and_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Without a place for the results, which is named."""
    nowhere = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    commands = "eval demo --max-windows 2 --window 64", "plan demo --method rtn"
    evaluated, _ = several(tmp_path, *(words.split() for words in commands), codes=(2, 0), **nowhere)
    assert b"/proc/none" in evaluated

"""Terminals that are not UTF-8, closed pipes, users without a name or a home: no traceback, and readable text."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmq.cli import surroundings

ROOT = Path(__file__).parents[3]
NOBODY = 54321
UNNAMED = """
# Only the real user changes: the files of this interpreter may be root's own.
import os, sys
os.setreuid({0}, -1)
sys.argv = ["llmq", *sys.argv[1:]]
from llmq.cli import main
main()
"""


def llmq(*words: str, code: str | None = None, drop: str = "", **more: str) -> subprocess.CompletedProcess[bytes]:
    """`llmq` with these arguments, and these changes of its environment."""
    environment: Mapping[str, str] = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", drop)}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    start = ["-m", "llmq.cli"] if code is None else ["-c", code]
    given = {**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, *start, *words], env=given, capture_output=True, timeout=120)


def finished(done: subprocess.CompletedProcess[bytes], code: int = 0) -> bytes:
    assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done.stdout + done.stderr


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
@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        *(
            ("ascii", words)
            for words in ("plan demo --method rtn", "inspect demo", "recipes", "methods", "plan --help")
        ),
        ("ascii", "generate demo \u03b1 --tokens 2"),
        ("latin-1", "plan demo --method rtn"),
        ("cp1252", "plan demo --method rtn"),
    ],
)
def test_commands(encoding: str, words: str) -> None:
    shown = finished(llmq(*words.split(), PYTHONIOENCODING=encoding, COLUMNS="150"))
    shown.decode(encoding)
    if words.startswith("plan demo"):
        assert b"->" in shown and (encoding != "ascii" or re.search(rb"\d+ x \d+", shown))


@pytest.mark.slow
def test_a_run_in_the_c_locale(tmp_path: Path) -> None:
    words = ("quantize", "demo", "--method", "rtn", "-o", str(tmp_path / "out"))
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert b"verified" in finished(llmq(*words, **c))
    assert b"int4 g128" in finished(llmq("inspect", str(tmp_path / "out"), **c))
    assert b"?" in finished(llmq("plan", "./nowhere-\u65e5", **c), code=2)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["plan demo --method rtn", "methods", "inspect demo"])
def test_a_pipe_that_is_closed(words: str) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    line = f"{sys.executable} -m llmq.cli {words} | true"
    done = subprocess.run(["sh", "-c", line], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"COLUMNS": "1"}, {"COLUMNS": "5", "TERM": "dumb"}, {"TERM": "dumb"}])
def test_terminals_that_can_do_little(more: dict[str, str]) -> None:
    finished(llmq("inspect", "demo", **more))


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
@pytest.mark.parametrize(
    "words",
    [
        "plan demo --method rtn",
        "quantize demo --method rtn -o OUT",
        "eval demo --max-windows 1 --window 64",
        "generate demo the --tokens 2",
        "inspect demo",
    ],
)
def test_commands_of_a_user_without_a_name_and_a_home(words: str) -> None:
    import tempfile

    # pytest's own folders can be read by their owner only.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        given = [word.replace("OUT", f"{folder}/out") for word in words.split()]
        finished(llmq(*given, code=UNNAMED.format(NOBODY), drop="HOME", TMPDIR=folder))


@pytest.mark.slow
def test_results_and_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """An evaluation and its comparison in ASCII; then without a place for the results, which is named."""
    words = ("eval", "demo", "--max-windows", "2", "--window", "64", "--out", str(tmp_path))
    finished(llmq(*words, PYTHONIOENCODING="ascii"))
    assert b"perplexity" in finished(llmq("compare", str(tmp_path), PYTHONIOENCODING="ascii"))
    nowhere = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    assert b"/proc/none" in finished(llmq(*words[:-2], **nowhere), code=2)
    finished(llmq("plan", "demo", "--method", "rtn", **nowhere))

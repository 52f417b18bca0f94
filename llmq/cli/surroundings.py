"""Makes the command line work where something usual is missing: a UTF-8 terminal, the user's name, a home folder."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import tempfile
import unicodedata
from pathlib import Path

WORDS = {
    "×": "x", "→": "->", "←": "<-", "…": "...", "–": "-", "—": "-", "−": "-", "·": "*", "±": "+/-", "≈": "~", "≤": "<=",
    "≥": ">=", "▲": "^", "▼": "v", "↑": "(higher is better)", "↓": "(lower is better)", "‖": "||", "⟨": "<", "⟩": ">",
    "α": "alpha", "β": "beta", "λ": "lambda", "Δ": "delta", "’": "'", "‘": "'", "“": '"', "”": '"', "•": "*", "█": "#",
    "━": "-", "╸": "-", "╺": "-", "│": "|", "─": "-",
}  # fmt: skip
"""What is printed for a character that the terminal does not have."""
HANDLER = "llmq-plain"


def settle() -> None:
    """Prepare standard output, standard error and the environment of this process; call it before other imports."""
    codecs.register_error(HANDLER, plain)
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 has every character but the halves of a broken one, which file names can contain.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
    name_user()


def plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: ASCII for what cannot be encoded. Raises any other error."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(letter: str) -> str:
    if letter in WORDS:
        return WORDS[letter]
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def name_user() -> None:
    """Give a user whom the system does not know a name, and a home in the temporary folder if the environment has none
    that can be written to (Docker sets / for a user by number).

    torch asks for the name, the hub's cache and `llmq eval` for the home; in a container that runs under any number,
    both fail.
    """
    try:
        import pwd
    except ImportError:  # no such list on Windows, where every user has a name
        return
    user = os.getuid()
    with contextlib.suppress(KeyError):
        pwd.getpwuid(user)
        return
    os.environ.setdefault("USER", f"uid{user}")
    home = os.environ.get("HOME")
    if not home or not os.access(home, os.W_OK):
        os.environ["HOME"] = str(_own_folder(os.geteuid()))


def _own_folder(user: int) -> Path:
    """A folder that only this user can write to, the same in every run where that is possible."""
    folder = Path(tempfile.gettempdir()) / f"llmq-home-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid == user and not folder.is_symlink():
            return folder
    return Path(tempfile.mkdtemp(prefix="llmq-home-"))

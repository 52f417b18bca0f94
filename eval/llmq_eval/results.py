"""Results of an evaluation: one JSON file per model, every number with its protocol, interval and samples.

`llmq eval` writes `Results`; `llmq compare` and the pages read nothing else. Values are plain Python; a number that is
not finite, or unknown, is None in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from llmq.errors import LlmqError

FORMAT = 1
"""The version of the file format; other versions are refused."""


class Damaged(LlmqError):
    """A file that is incomplete, or has other contents."""


AGAIN = "remove it, or run `llmq eval` again"


@dataclass(frozen=True)
class Measure:
    """One number.

    task: 'perplexity:demo', 'divergence:demo', 'hellaswag', 'speed', 'memory'. metric: 'perplexity', 'kl', 'top1',
    'acc', 'acc_norm', 'decode_tokens_per_second', 'resident_bytes' … low, high: its 95 % interval, None if there is
    none. higher_is_better: None if neither direction is better. samples: one number per window or document, in the same
    order in every model of the same protocol, so that differences can be tested in pairs; for 'perplexity' they are
    nats per token of each window, so that value = exp(mean(samples)); else value is their mean or their median. base:
    the base model of a divergence, as in `Results.base`.
    """

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    higher_is_better: bool | None
    protocol: str
    samples: list[float] | None = None
    base: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """(task, metric, protocol), unique within a model's results."""
        return self.task, self.metric, self.protocol


_MEASURE = TypeAdapter(Measure)


@dataclass
class Results:
    """All measures of one model.

    model: a hub id, 'demo', or a folder's absolute path; base: the same for its base model. bytes: of its weight files;
    bits_per_weight: of the whole model. fingerprint: of the model's files, 16 hexadecimal digits.
    """

    model: str
    base: str | None
    bytes: int
    bits_per_weight: float
    versions: dict[str, str]
    machine: dict[str, str]
    fingerprint: str
    measures: list[Measure] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model's name in tables: the last part of its path or id."""
        return Path(self.model).name or self.model

    def find(self, task: str, metric: str, protocol: str | None = None) -> Measure | None:
        """The measure of a task, by a given protocol, else by the first one; or None."""
        wanted = (task, metric)
        return next((m for m in self.measures if m.key[:2] == wanted and protocol in (None, m.protocol)), None)

    def with_measures(self, measures: Iterable[Measure]) -> Results:
        """These results with others added; a measure with the same task, metric and protocol is replaced."""
        # Each keeps its place, so that the same numbers give the same file.
        whole = {measure.key: measure for measure in (*self.measures, *measures)}
        return replace(self, measures=list(whole.values()))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format": FORMAT} | plain(asdict(self)), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def load(file: Path) -> Results:
        """Read a file that `save` wrote. Raises LlmqError if it cannot be read, Damaged if it is not a results file."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise LlmqError(f"{file} was written by another version of llmq: {AGAIN}")
            data["measures"] = [_numbers(measure) for measure in data["measures"]]
            return TypeAdapter(Results).validate_python(data)
        except OSError as error:
            raise LlmqError(f"{file} cannot be read ({error.strerror}): {AGAIN}") from error
        except ValidationError as error:
            wrong = error.errors()[0]
            told = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
            raise Damaged(f"{file} holds no results of `llmq eval` ({told}): {AGAIN}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Damaged(f"{file} holds no results of `llmq eval` ({error}): {AGAIN}") from error

    def path(self, out: Path) -> Path:
        """The file that `save` writes: <out>/results/<name>-<fingerprint><4 digits of the path's hash>.json."""
        place = hashlib.sha256(self.model.encode()).hexdigest()[:4]
        return out / "results" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.name)}-{self.fingerprint}{place}.json"

    def keep(self, out: Path, note: Callable[[str], None] = lambda _: None) -> Results:
        """Merge them with the stored results of the same model under `out`, and return all of them.

        Results that another process saved meanwhile are kept too. note: is called if the existing file is not a results
        file.
        """
        file = self.path(out)
        with lock(out):
            whole = self
            if file.is_file():
                try:
                    old = Results.load(file)
                    versions = old.versions | self.versions
                    whole = replace(old, base=self.base or old.base, versions=versions, machine=self.machine)
                    whole = whole.with_measures(self.measures)
                except Damaged:
                    note(f"{file} holds no readable results: it is replaced")
            whole.save(out)
        return whole

    def save(self, out: Path) -> Path:
        """Write them under `out` atomically; returns the path."""
        file = self.path(out)
        write(file, self.to_json())
        return file


def write(file: Path, text: str) -> None:
    """Write a text file atomically: a killed process leaves the old file. Raises LlmqError."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise LlmqError(f"{file} cannot be written: {error.strerror}; give another folder as --out") from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises LlmqError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmqError(f"{folder} cannot be made: {error.strerror}; give another folder as --out") from error


def forget(*files: Path) -> None:
    """Delete files if they exist. Raises LlmqError."""
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise LlmqError(f"{file} cannot be removed: {error.strerror}; give another folder as --out") from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder for one process at a time. Raises LlmqError if it cannot be written."""
    make_folder(folder)
    held = FileLock(folder / ".lock")
    try:
        held.acquire()
    except OSError as error:
        raise LlmqError(f"{folder} cannot be written: {error.strerror}; give another folder as --out") from error
    try:
        yield
    finally:
        held.release()


def measure_from(data: dict[str, Any]) -> Measure:
    """A measure from its fields in a file. Raises ValueError, TypeError or KeyError if they are invalid."""
    return _MEASURE.validate_python(_numbers(data))


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a measure, with nan for required numbers that `plain` replaced by None."""
    samples = data.get("samples")
    return data | {
        "value": math.nan if data["value"] is None else data["value"],
        "samples": samples and [math.nan if one is None else one for one in samples],
    }


def plain(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value

"""The output folder as ranks see it that do not write: they learn of each line that rank 0 adds to the journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq import ranks
from llmq.checkpoint.sink import Sink


def open_sink(out: Path, fingerprint: Mapping[str, Any], units: int) -> Sink:
    """`Sink.open` on rank 0; on other ranks what follows it. Raises LlmqError on all ranks if rank 0 cannot open it."""
    sink: Sink | None = None
    with ranks.failing_together():
        if ranks.first():
            sink = Sink.open(out, fingerprint, units)
    if sink is None:
        sink = Follower(out, units, -1)
    if ranks.size() > 1:
        vars(sink).update(ranks.tell({name: vars(sink)[name] for name in ("done", "finished", "_entries", "_unit_of")}))
    return sink


class Follower(Sink):
    """A sink that only reads. Whatever would write waits until rank 0 has written."""

    def commit(self, unit: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
        """See `Sink.commit`; nothing is looked at."""
        self._follow()

    def replace(self, unit: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
        """See `Sink.replace`; nothing is looked at but the unit."""
        self._follow()
        self._infos.pop(unit, None)

    def record(self, name: str, payload: Mapping[str, Any]) -> None:
        """See `Sink.record`; nothing is looked at."""
        self._follow()

    def finish(self, config: Mapping[str, Any], aux: Mapping[str, Path], extra: Mapping[str, str | bytes]) -> None:
        """See `Sink.finish`; nothing is looked at."""
        self._follow()

    def _follow(self) -> None:
        self._take(ranks.tell(b""))

"""A model on the hub whose weights are read over the network as they are needed, and never written to a disk.

huggingface_hub finds the files, and does the requests with its tokens, redirects and retries. Added here: a request
asks for the bytes of one tensor, or of a piece of it, and several pieces are asked for side by side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.checkpoint import hub
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PIECE = 1 << 25
"""Bytes that one request asks for at most."""
CONNECTIONS = 4
"""Requests side by side."""


def open_remote(model: str, *, token: str | None = None, trust_remote_code: bool = False) -> tuple[Path, Remote]:
    """A folder with a hub model's small files, and the store that has its weights.

    Raises LlmqError as `hub.resolve` does, and if the model is no hub id.
    """
    if model == "demo" or hub.is_path(model) or Path(model).exists():
        raise LlmqError(f"{model} is not on the hub: --stream-hub is for a hub id, as 'org/name'; leave it out")
    info: ModelInfo = hub.repository(model, "model", token=token)  # type: ignore[assignment]
    folder, weights = hub.without_weights(model, info, token, trust_remote_code)
    return folder, Remote(model, info, folder, weights, token)


class Remote:
    """The weight files of a repository on the hub, of one commit, as a `Store`.

    folder: where the files would be.
    """

    def __init__(self, name: str, info: ModelInfo, folder: Path, weights: list[str], token: str | None) -> None:
        self.name, self.commit, self.token = name, info.sha, token
        files = {file.rfilename: file for file in info.siblings or []}
        self.files = {folder / weight: weight for weight in weights}
        self.sizes = {path: files[weight].size or 0 for path, weight in self.files.items()}
        self.hashes = {
            path: (found.lfs.sha256 if (found := files[weight]).lfs else found.blob_id) or self.commit or ""
            for path, weight in self.files.items()
        }

    def size(self, path: Path) -> int | None:
        """See `Store.size`."""
        return self.sizes.get(path)

    def proof(self, path: Path) -> Iterator[bytes]:
        """See `Store.proof`: the hash that the hub has of the file."""
        yield self.hashes[path].encode()

    def told(self, bytes: int) -> tuple[str, ...]:
        """See `Store.told`."""
        return (
            f"{bytes / 2**30:.1f} GiB of weights are read from the hub as they are needed and never written to a disk; "
            "what reads them twice (scores for a budget, distillation, a run that is resumed) fetches them again",
        )

    def read(self, path: Path, begin: int, into: memoryview) -> int:
        """See `Store.read`. Raises LlmqError where the hub refuses, or the connection breaks again and again."""
        count = min(len(into), max(0, self.sizes[path] - begin))
        pieces = [(at, min(count, at + PIECE)) for at in range(0, count, PIECE)]
        if len(pieces) < 2:
            for start, stop in pieces:
                self._fetch(path, begin + start, into[start:stop])
            return count
        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            for _ in pool.map(lambda piece: self._fetch(path, begin + piece[0], into[piece[0] : piece[1]]), pieces):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return count

    def _fetch(self, path: Path, begin: int, into: memoryview) -> None:
        """Fill a piece; after a broken connection the rest of it is asked for."""
        done, broken = 0, 0
        while done < len(into):
            try:
                got, problem = self._answer(path, begin + done, into[done:])
            except Exception as error:
                if not _passes(error):
                    raise hub.explain(error, self.name, "model") from error
                got, problem = 0, error
            done += got
            if done == len(into):
                return
            if got:
                broken = 0
                continue
            broken += 1
            if broken == hub.ATTEMPTS:
                raise LlmqError(
                    f"{self.name}: {self.files[path]}: the connection to the hub broke {broken} times at byte "
                    f"{begin + done}{f' ({type(problem).__name__})' if problem else ''}; finished blocks are kept, run "
                    "the same command again"
                ) from problem
            time.sleep(2 ** (broken - 1))

    def _answer(self, path: Path, begin: int, into: memoryview) -> tuple[int, Exception | None]:
        """Ask for the bytes of a file from `begin` on: how many came, and what broke the connection, if it broke."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
            httpx,
        )

        url = hf_hub_url(self.name, self.files[path], revision=self.commit)
        # Without compression on the way, bytes are those of the file.
        asked = {"Range": f"bytes={begin}-{begin + len(into) - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(token=self.token) | asked
        done = 0
        with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and (begin, len(into)) != (0, self.sizes[path]):
                raise LlmqError(
                    f"{self.name}: the hub's server sends whole files only, which --stream-hub cannot use: leave it out"
                )
            # Not outside: there, what breaks the body would be taken for an answer that is to be repeated.
            try:
                for part in response.iter_bytes():
                    into[done : done + len(part)] = part
                    done += len(part)
            except (httpx.TransportError, ConnectionError) as error:
                return done, error
        return done, None


def _passes(error: Exception) -> bool:
    """Whether a request that failed so may work a little later."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    # The client is closed for all threads when the connection of one breaks.
    return isinstance(error, (httpx.TransportError, ConnectionError)) or "client has been closed" in str(error)

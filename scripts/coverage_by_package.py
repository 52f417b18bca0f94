"""The percentage of lines that the tests ran, by package and folder; printed by `make coverage`.

    python -m slipcover --json --out build/coverage.json -m pytest -n 2
    python scripts/coverage_by_package.py build/coverage.json

Only lines run by the test processes themselves are counted, not those of programs that they start by `python -m`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path, PurePosixPath


def folder_of(file: str) -> str:
    """llmq/methods/gptq.py → llmq/methods; files in subfolders count for the same folder."""
    parts = PurePosixPath(file).parts
    depth = 1 + next(i for i, part in enumerate(parts) if part in {"llmq", "llmq_kernels", "llmq_eval"})
    return "/".join(parts[: min(depth + 1, len(parts) - 1)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what slipcover wrote as JSON")
    args = parser.parse_args()
    lines: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file, told in json.loads(args.file.read_text())["files"].items():
        for name in (folder_of(file), "all"):
            lines[name][0] += told["summary"]["covered_lines"]
            lines[name][1] += told["summary"]["covered_lines"] + told["summary"]["missing_lines"]
    width = max(map(len, lines))
    for name, (run, total) in sorted(lines.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"{name:{width}}  {run / total:6.1%} of {total:6,} lines")


if __name__ == "__main__":
    main()

"""The command line: one file per group of commands; `app` puts them together."""

from llmq.cli.app import main

__all__ = ["main"]

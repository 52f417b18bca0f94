"""python -m llmq.cli: the same as `llmq`."""

from llmq.cli.app import main

main()

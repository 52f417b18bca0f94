"""Evaluation of models. They are loaded only through `from_pretrained`, so any tool's output can be measured."""

from llmq_eval.perplexity import Perplexity, perplexities, perplexity

__all__ = ["Perplexity", "perplexities", "perplexity"]

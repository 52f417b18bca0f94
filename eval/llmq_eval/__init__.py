"""How good a model is: perplexity. Sees models only through `from_pretrained`, so it can measure any tool's output."""

from llmq_eval.perplexity import Perplexity, perplexities, perplexity

__all__ = ["Perplexity", "perplexities", "perplexity"]

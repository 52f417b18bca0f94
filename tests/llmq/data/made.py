"""Words with accents and a bee in them, and the chat template of the tests' tokenizer."""

from __future__ import annotations

import random

WORDS = ["a", "bee", "sees", "déjà", "vu", "at", "noon", ";", "128", "bees", "see", "none", "\U0001f41d"]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


def text(words: int, seed: int = 0) -> str:
    """Lines of ten words."""
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(WORDS, k=10)) for _ in range(words // 10))
    return "\n".join(lines) + "\n"


TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{{ '\n' }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

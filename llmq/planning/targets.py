"""The names of quantized modules, in all spellings, as a configuration's targets.

A target that matches no module of a class costs a line in stock transformers' log for each, so that not all spellings
can be listed: those that a class does not have are alternatives in a regular expression.
"""

from __future__ import annotations

import re


def targets(quantized: set[str], others: set[str]) -> list[str]:
    """A target `re:…` for each place of quantized modules in the blocks of a decoder, sorted.

    quantized: the modules' names, in all spellings that are known; others: those of modules that must not match. A
    name matches from the parent of the list of blocks on, because loaders differ in what stands before it, and with
    any number in the list: a block that is left alone has to be ignored by its name. Where a name is in no list, or one
    of the others would match, the names themselves.
    """
    holders: set[str] = set()
    places: set[str] = set()
    for name in quantized:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        if at < 2:
            return sorted(quantized)
        holders.add(r"\.".join(map(re.escape, parts[at - 2 : at])))
        places.add(r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts[at:]))
    # Not all spellings are known of each place: that of a routed expert's weight is no parameter's.
    found = [rf"(.*\.)?({'|'.join(sorted(holders))})\.{place}$" for place in sorted(places)]
    if any(re.match(pattern, name) for pattern in found for name in others):
        return sorted(quantized)
    return [f"re:{pattern}" for pattern in found]

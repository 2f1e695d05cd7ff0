"""The windows of a neuron as the report shows them: at most 128 tokens of each."""

from typing import Any

from entangle.runs.contexts_file import Kept, packed, unpacked

TOKENS = 128


def cut(kept: Kept, neuron: str) -> dict[str, Any]:
    """Return the neuron's ``scale``, ``unit`` and ``shown``, its windows; nothing of an older file.

    Of each window ``first`` is the place of the first token that is shown, and ``end`` that of the
    first one after them. The ``levels`` are those of the counted tokens among them, which are the
    last.
    """
    found = kept.neurons[neuron]
    if "scale" not in found:
        return {}
    shown = []
    for one in found["windows"]:
        levels, length = unpacked(one["levels"]), len(kept.windows[str(one["window"])])
        first = max(min(one["position"] - TOKENS // 2, length - TOKENS), 0)
        end = min(first + TOKENS, length)
        skipped = length - len(levels)
        part = levels[max(first - skipped, 0) : max(end - skipped, 0)]
        place = {key: one[key] for key in ("why", "window", "position")}
        shown.append(place | {"first": first, "end": end, "levels": packed(part)})
    return {"scale": found["scale"], "shown": shown, "unit": found.get("unit")}

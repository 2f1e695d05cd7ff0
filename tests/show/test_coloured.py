"""No token changes how a terminal shows what follows."""

from typing import Any

import pytest

from entangle import printed
from entangle.show.coloured import plain, quoted, visible

WILD = "a\x1b[31mred\x9b0m\x7f\u202e\u2028\r\n\t\0é猫"


def test_control_characters_are_shown_as_signs_or_escapes() -> None:
    for text in (visible(WILD), quoted(WILD)):
        assert text.isprintable()
        assert "[31mred" in text
        assert text.strip('"').endswith("é猫")
    assert visible(" the") == " the"
    assert visible("\x1b\x9b") == "␛\\u009b"
    assert plain("a\x1b[31m\r\n\tb\u202e") == "a␛[31m␍\n\tb\\u202e"


WORD: dict[str, Any] = {"token": WILD, "value": 1.0, "deviation": 2.0}
MOVED: dict[str, Any] = {"token": WILD, "before": 0.1, "change": 0.1, "error": 0.1}
NUMBERS = ("kl", "kl_error", "kl_tail", "agreement", "agreement_error", "nats", "nats_error")


@pytest.mark.parametrize("kind", ["on_text", "words", "steered", "generated"])
def test_printed_tokens_do_not_reach_the_terminal_as_they_are(kind: str) -> None:
    numbers = ("values", "quantiles", "quantile_errors", "shades")
    side = {"side": "reads", "what": "row", "neuron": "a:0", "through": [], "top": [WORD]}
    setting = {"setting": "zero", "value": 0.0, "value_error": 0.0, "up": [MOVED], "down": []}
    setting |= dict.fromkeys(NUMBERS, 0.5) | {"continuation": WILD}
    about = {"model": "m", "tokens": 3, "text": "t", "windows": 1, "length": 4}
    results: dict[str, dict[str, Any]] = {
        "on_text": {
            "neurons": [
                {"neuron": "a:0", "side": "output", "tokens": [WILD]}
                | {key: [0.5] for key in numbers}
            ]
        },
        "words": {
            "neurons": [{"neuron": "a:0", "words": [side | {"bottom": []}], "missing": []}],
            "file": "f",
        },
        "steered": about
        | {"neuron": "a:0", "settings": [setting], "prompt": WILD, "continuation": WILD},
        "generated": {"model": "m", "device": "cpu", "text": WILD, "weight_bytes": 9, "threads": 1}
        | {"tokens": 3, "prompt_tokens": 1, "seconds": 1.0, "first_seconds": 1.0}
        | {"tokens_per_second": 2.0},
    }
    text = getattr(printed, kind)(results[kind])
    assert "[31mred" in text
    assert text.replace("\n", "").replace("\t", "").isprintable()

"""Names that match shell patterns, against fnmatch on each pair."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.model.patterns import chosen, unmatched

NAMES = [f"model.layers.{block}.{role}" for block in (0, 1, 10) for role in ("mlp.up", "attn.q")]
SOME = st.lists(st.sampled_from(["*", "*.1.*", "*.up", "*.attn.?", NAMES[3], "*.nothing"]))


@given(SOME, SOME)
def test_a_name_is_chosen_by_any_pattern_and_by_no_excluded_one(
    patterns: list[str], exclude: list[str]
) -> None:
    expected = [
        any(fnmatchcase(name, one) for one in patterns)
        and not any(fnmatchcase(name, one) for one in exclude)
        for name in NAMES
    ]
    if patterns and exclude and not any(expected):
        with pytest.raises(LookupError, match="no layer is left"):
            chosen(NAMES, patterns, exclude)
    else:
        assert chosen(NAMES, patterns, exclude) == expected


def test_the_first_pattern_without_a_name_is_told() -> None:
    assert unmatched(NAMES, ["*.up", "*.down", "*.gate"]) == "*.down"
    assert unmatched(NAMES, ["*"]) is None

"""Choice of layers by shell patterns of their names; it imports no torch."""

import fnmatch
from collections.abc import Iterable, Sequence

Patterns = str | Sequence[str]

INPUT = ":input"  # after the name of a layer: its inputs


def as_list(patterns: Patterns) -> list[str]:
    """Return one pattern or several as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def unmatched(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches no name, or None."""
    known = dict.fromkeys(names)
    missing = (pattern for pattern in patterns if pattern not in known)
    return next((pattern for pattern in missing if not fnmatch.filter(known, pattern)), None)


def chosen(names: Iterable[str], patterns: Sequence[str], exclude: Sequence[str]) -> list[bool]:
    """Return for each name whether it matches a pattern, and none in ``exclude``.

    Without patterns none does, and that is no error: only inputs may be asked for.

    Raises:
        LookupError: all names that match are excluded.
    """
    wanted, unwanted = {*patterns}, {*exclude}

    def matches(name: str, some: set[str]) -> bool:
        return name in some or any(fnmatch.fnmatchcase(name, pattern) for pattern in some)

    found = [matches(name, wanted) and not matches(name, unwanted) for name in names]
    if patterns and exclude and not any(found):
        raise LookupError(
            f"no layer is left: those that match {', '.join(patterns)} also match an excluded "
            f"pattern ({', '.join(exclude)})"
        )
    return found

"""The forms of the JSON files that commands add to a run: every reader checks a whole file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entangle.runs import store

# A mapping by name (by ``...`` for any name), a list of one form, or the types of a value.
Form = Mapping[Any, Any] | Sequence[Any]
TEXT, COUNT, NUMBER = (str,), (int,), (int, float)
KNOWN = (*NUMBER, type(None))  # what was NaN is null


def read_added(file: Path, form: Form, command: str) -> dict[str, Any]:
    """Return what a command added to a run in this file; empty without the file.

    Raises:
        OSError: the file is damaged.
        ValueError: it has another form.
    """
    content = store.read_json(file) if file.is_file() else {}
    try:
        check_form(content, form, file.name)
    except ValueError as error:
        raise ValueError(another_form(file, command, str(error))) from error
    return content


def another_form(file: Path, command: str, reason: str) -> str:
    """Return the message that a file is not as ``command`` writes it."""
    return (
        f"{file} was not written by this version of entangle {command} ({reason}): delete it and run "
        f"entangle {command} again"
    )


def check_form(value: Any, form: Form, place: str) -> None:
    """Check that a value has a form; what a form does not name is not looked at.

    Raises:
        ValueError: it has not. The message says where, beginning with ``place``.
    """
    if isinstance(form, Mapping):
        _check_type(value, (dict,), place)
        for name, own in form.items():
            if name is not ... and name not in value:
                raise ValueError(f"{place} has no {name}")
            for key in value if name is ... else (name,):
                check_form(value[key], own, f"{place}, {key}")
    elif isinstance(form, list):
        _check_type(value, (list,), place)
        for number, one in enumerate(value):
            check_form(one, form[0], f"{place} {number}")
    else:
        _check_type(value, form, place)


def _check_type(value: Any, types: Sequence[type], place: str) -> None:
    if type(value) not in types:
        names = " or ".join(_NAMES[kind] for kind in types)
        raise ValueError(f"{place} is {str(value)[:40]!r}, expected {names}")


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    dict: "an object",
    list: "a list",
}

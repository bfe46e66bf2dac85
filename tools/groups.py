"""Groups of options: several verbs take the same ones, and say so with one parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints


def grouped(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as the command line sees it: a parameter whose type is a dataclass becomes an option for each of its fields that
    is typed as options are (``Annotated``); other fields keep their defaults."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    # the required come first where Python or a reader wants them so
    parameters.sort(key=lambda each: each.default is not inspect.Parameter.empty)

    @functools.wraps(verb)
    def with_options(**given: Any) -> Any:
        arguments = {
            name: group(**{option.name: given.pop(option.name) for option in _options(group)})
            for name, group in groups.items()
        }
        return verb(**given, **arguments)

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
        if get_origin(hints[field.name]) is Annotated
    ]

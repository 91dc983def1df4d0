"""What single layers get: rules by a layer's name, or by a pattern of names such as "layer3.*"."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from snows.errors import UsageError, first_line, listed

Rules = dict[str, Any]  # name or pattern (fnmatch) -> what the layers get that it matches
DENSE = "dense"  # the rule that leaves a layer as it is


def rule_of(name: str, rules: Rules) -> Any:
    """The rule of the layer's own name, else of the first pattern that matches it; None where none does."""
    if name in rules:
        return rules[name]
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def names_any(pattern: str, names: Collection[str]) -> bool:
    """Whether a name or pattern names any of the layers."""
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def check_patterns(patterns: Iterable[str], names: Iterable[str], origin: str) -> None:
    """Refuse patterns that no layer's name matches; origin: where they come from, for the message.

    Raises:
        UsageError: it lists them, and the names that there are.
    """
    names = list(names)
    idle = [pattern for pattern in patterns if not names_any(pattern, names)]
    if idle:
        raise UsageError(f"{origin}: no prunable layer is named {listed(idle)}; those are {listed(names)}.")


def once(pairs: list[tuple[str, Any]]) -> Rules:
    """An object of json, none of whose names stands there twice."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"layer rules: {listed(twice)} stand{'s' * (len(twice) == 1)} there twice.")
    return dict(pairs)


def read_rules(path: str | Path) -> Rules:
    """The rules of a json file, an object of names or patterns; what they may say is the pattern's affair.

    Raises:
        UsageError: the file is missing, no json, or no object, or has a name twice.
    """
    try:
        rules = json.loads(
            Path(path).read_text("utf-8-sig"), object_pairs_hook=once
        )  # with or without a byte order mark
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} must hold an object of layer names, not one nested without end.") from error
    except ValueError as error:  # no json, no text, or a number of thousands of digits
        raise UsageError(f"{path} is not json: {first_line(error)}.") from error
    if not isinstance(rules, dict) or not rules:
        raise UsageError(f'{path} must hold an object such as {{"layer3.*": 0.9, "fc": "dense"}}.')
    return rules

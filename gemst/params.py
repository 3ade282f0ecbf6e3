"""Reading params.yaml: overrides applied, and refusals that name the field, the value and what is allowed."""

from __future__ import annotations

from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gemst.config import Config
from gemst.errors import GemstError


def load(path: Path = Path("params.yaml"), overrides: list[str] | None = None) -> Config:
    """Read `path`, apply overrides such as "tuning.rank=64", and check the result.

    Raises GemstError naming the field, the value given and what is allowed.
    """
    if not path.is_file():
        raise GemstError(f"{path} is no file", "Run gemst in a project folder, or name a file with --params")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GemstError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GemstError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    for override in overrides or []:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise GemstError(_explain(error, path)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise GemstError(f"--set {override!r} is not NAME=VALUE", "Write for example --set tuning.rank=64")
    *sections, leaf = name.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise GemstError(f"--set {override!r}: {section!r} is a value, not a section")
        tree = inner
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    tree[leaf] = text if isinstance(value, date) else value  # no parameter is a date: it is a name


def _explain(error: ValidationError, path: Path) -> str:
    """All faults on one line, each as field, value and what is allowed."""
    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "the whole"
        if fault["type"] == "extra_forbidden":
            faults.append(f"{where} is not a parameter{_nearest(fault['loc'])}")
        elif isinstance(fault["input"], dict) and fault["type"] == "value_error":  # parameters that do not go together
            said = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{where}: {said}" if fault["loc"] else said)
        else:
            faults.append(f"{where} = {fault['input']!r}: {fault['msg']}")
    return f"{path}: " + "; ".join(faults)


def _nearest(location: tuple[int | str, ...]) -> str:
    """Name the parameters that do exist beside a misspelt one."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    names = list(section.model_fields)
    close = get_close_matches(str(location[-1]), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known here: {', '.join(names)})"

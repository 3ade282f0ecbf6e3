"""Reading params.yaml: overrides applied, and refusals that name the field, the value and what is allowed."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gemst.config import Config
from gemst.errors import GemstError


class _Loader(yaml.SafeLoader):
    """YAML without dates, and with numbers that stay text where they would not be printed as they were written.

    In YAML 1.1 12:30 is 750, 010 is 8 and 2.50 is 2.5, whatever they were meant to name. Where a number is wanted,
    pydantic reads one from the text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (SafeLoader's own form)
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def as_written(self, node: yaml.ScalarNode) -> int | float | str:
        """The number that prints as `node` does, else its text; .inf and .nan are numbers."""
        text = str(self.construct_scalar(node))
        if text.lower().endswith(("inf", "nan")):
            return float(self.construct_yaml_float(node))
        for kind in (int, float):
            try:
                number: int | float = kind(text)
            except ValueError:
                continue
            if str(number) == text:
                return number
        return text


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.as_written)


def load(path: Path = Path("params.yaml"), overrides: list[str] | None = None) -> Config:
    """Read `path`, apply overrides such as "tuning.rank=64", and check the result.

    Raises GemstError naming the field, the value given and what is allowed.
    """
    if not path.is_file():
        raise GemstError(f"{path} is no file", "Run gemst in a project folder, or name a file with --params")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:  # of bytes that are not UTF-8, of a !!timestamp that is none
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
        tree[leaf] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        tree[leaf] = text


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

"""Where a recipe's values come from: a YAML file, overrides on top, paths made absolute. What they mean is recipe.py's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engine import InputError
from selfreward.recipe_errors import nearest, shown

PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes"
TEMPLATE_KEYS = (  # a path, or the name of a shipped file
    "judge.template",
    "judge.model_template",
    "prompts.template",
    "evaluation.pairwise_template",
)
PATH_KEYS = (
    "model",
    "m1",
    "judge_model",
    "prompt_model",
    "tokenizer",
    "data.ift",
    "data.eft",
    "data.eft_heldout",
    "data.heldout",
    "data.ranked",
    "prompts.file",
    *TEMPLATE_KEYS,
)


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-6` is a number; `no`, `010` and `1:30` are strings. A key may stand once.

    Aliases are refused: a value could hold itself.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor} is not read; write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is no plain word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|nan)"
_Loader.yaml_implicit_resolvers = {}  # not YAML 1.1's
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$"), list("-+.0123456789"))


def recipe_file(name_or_file: str | Path) -> Path:
    name = str(name_or_file)
    if isinstance(name_or_file, Path) or is_path(name):
        return Path(name_or_file).expanduser().absolute()
    if name not in recipe_names():
        shipped = ", ".join(recipe_names())
        hint = nearest(name, recipe_names())
        raise InputError(f"recipe {name!r} is not shipped{hint}; use one of {shipped}, or the path of a .yaml file")
    return RECIPES / f"{name}.yaml"


def is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml", ".jinja")) or name.startswith("package:")


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"recipe {file}{_yaml_place(error)}; expected YAML") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {file} holds {shown(values)}; expected keys and values")
    return values


def _yaml_place(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return f": {error}"


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}, the value read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"override {override!r}: the value is not YAML{_yaml_place(error)}") from None
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, group by group."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def with_absolute_paths(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """Strings under path keys become absolute paths; values of a wrong type stay for the validation to name."""
    for key in PATH_KEYS:
        value = at(values, key)
        if not isinstance(value, str) or not value or (key in TEMPLATE_KEYS and not is_path(value)):
            continue
        path = _absolute(value, base)
        change: Any = str(path) if key in TEMPLATE_KEYS else path
        for part in reversed(key.split(".")):
            change = {part: change}
        values = merged(values, change)
    return values


def _absolute(value: str, base: Path) -> Path:
    if value.startswith("package:"):
        return PACKAGE / value.removeprefix("package:")
    return base / Path(value).expanduser()


def at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values

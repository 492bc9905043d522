"""Configuration: frozen pydantic models, TOML files with one base, and overrides of any key."""

import copy
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

ConfigType = TypeVar("ConfigType", bound="Config")

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "none_required": "nothing",
}


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, no conversion of types.

    "10" and 10.0 are not integers, true is not a number, 1 is accepted for a float. Lists (of TOML,
    JSON or Python) become tuples, so that a configuration is hashable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: _to_tuple(value) for key, value in data.items()}
        return data


def _to_tuple(value: Any) -> Any:
    return tuple(_to_tuple(item) for item in value) if isinstance(value, list) else value


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file and merge it over the file named by its optional top-level `base`.

    `base` is relative to the file that names it, tables are merged key by key and the child wins.
    A base may have a base. Raises FileNotFoundError for a missing file and ValueError for a file
    that is not TOML or a cycle of bases.
    """
    return _read_chain(Path(path), ())


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(item) for item in (*seen, resolved))
        raise ValueError(f"base is a cycle: {chain}; expected files that end; remove one base")
    if not path.is_file():
        named_by = f" (the base of {seen[-1]})" if seen else ""
        raise FileNotFoundError(
            f"{path}{named_by} is not a file; expected a TOML file; check the path"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}; expected key = value lines") from error
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"base is {base!r}; expected the path of a TOML file ({path})")
    return _merge(_read_chain(path.parent / base, (*seen, resolved)), data)


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in child.items():
        below = merged.get(key)
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both_tables else value
    return merged


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of data with every "a.b=value" set.

    The value is parsed as TOML; what is not TOML (a bare word, a path) and dates are strings. A
    number in the key is an index into a list that exists: "model.blocks.0.norm=...".
    """
    result = copy.deepcopy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ValueError(
                f"override is {override!r}; expected key.subkey=value; for example train.steps=10"
            )
        _assign(result, parts, _parse_value(text.strip(), override), override)
    return result


def _assign(table: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    here: Any = table
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
            if not last:
                here.setdefault(index, {})
        else:
            where = ".".join(parts[:depth])
            raise ValueError(
                f"override is {override!r}; expected a key that exists; {where} holds {here!r}, "
                "which has no keys"
            )
        if last:
            here[index] = value
        else:
            here = here[index]


def _parse_value(text: str, override: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"override is {override!r}; expected a TOML value: {error}") from error
        return text
    if set(parsed) != {"value"} or isinstance(parsed["value"], date | datetime | time):
        return text
    return parsed["value"]


def validate(cls: type[ConfigType], data: Mapping[str, Any], *, source: str) -> ConfigType:
    """Build cls from data; every mistake becomes one ValueError line that names key and source."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        problems: list[dict[str, Any]] = [dict(p) for p in error.errors(include_url=False)]
        names = [_locate(cls, problem["loc"])[0] for problem in problems]
        # Each type that a value may have and has not is a problem of its own.
        first = [problem for problem, name in zip(problems, names, strict=True) if name == names[0]]
        more = f"; {len(set(names)) - 1} more" if len(set(names)) > 1 else ""
        raise ValueError(f"{_explain(cls, first)}{more} ({source})") from None


def _explain(cls: type[Config], problems: Sequence[dict[str, Any]]) -> str:
    """Describe what is wrong with one key; several problems are those of a union's types."""
    problem = problems[0]
    name, owners = _locate(cls, problem["loc"])
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing; expected a value; set it"
    if kind == "extra_forbidden":
        known = sorted({field for owner in owners for field in owner.model_fields})
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else "remove it"
        return f"{name} is an unknown key; expected one of {', '.join(known)}; {hint}"
    if kind == "value_error":
        return _join(name, str(context["error"]), owners)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = str(context.get("discriminator", "kind")).strip("'")
        found = repr(context["tag"]) if "tag" in context else "missing"
        tags = ", ".join(repr(tag) for owner in owners for tag in _tags(owner))
        return f"{name}.{key} is {found}; expected one of {tags}"
    if kind == "literal_error":
        return f"{name} is {value!r}; expected {context['expected']}"
    if kind in _EXPECTED:
        expected = [_EXPECTED[other["type"]] for other in problems if other["type"] in _EXPECTED]
        return f"{name} is {value!r}; expected {' or '.join(dict.fromkeys(expected))}"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name} is {value!r}; expected: {message}"


def _join(name: str, message: str, owners: Sequence[type[Config]]) -> str:
    """Put the key before a validator's own message, which begins with a field or says it all."""
    subject = message.split(" ")[0].split(".")[0].split("[")[0]
    above, _, last = name.rpartition(".")
    if last == subject:
        return f"{above}.{message}" if above else message
    if name and subject in {field for owner in owners for field in owner.model_fields}:
        return f"{name}.{message}"
    return f"{name}: {message}" if name else message


def _locate(cls: type[Config], loc: tuple[str | int, ...]) -> tuple[str, list[type[Config]]]:
    """Return the key as a user writes it, and the configurations that own its last part.

    pydantic's location holds the tag or the type of a union beside the keys (`float`, `tuple[...]`);
    they are left out of the name.
    """
    name = ""
    owners: list[type[Config]] = [cls]
    below: list[type[Config]] = [cls]
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
            continue
        fields = [owner.model_fields[part] for owner in below if part in owner.model_fields]
        tagged = [owner for owner in below if part in _tags(owner)]
        if not fields and tagged and len(below) > 1:
            below = tagged
            continue
        if not fields and not below:
            continue
        name += f".{part}" if name else part
        owners = below
        # Without a field it is a key of a dictionary, whose values these are.
        if fields:
            below = [found for field in fields for found in _configs_in(field.annotation)]
    return name, below if below and below is not owners else owners


def _tags(owner: type[Config]) -> tuple[Any, ...]:
    field = owner.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


def _configs_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from _configs_in(argument)

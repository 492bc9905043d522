"""Configurations without pydantic, for exported files: read back what was checked when written."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

ConfigType = TypeVar("ConfigType", bound="Config")
_MISSING: Any = object()


def Field(default: Any = _MISSING, **rules: Any) -> Any:
    """The default of a field; its rules were checked when the file was written."""
    return default


def model_validator(**options: Any) -> Callable[[Any], Any]:
    """A check of several fields, which was made when the file was written."""
    return lambda function: function


class Config:
    """An immutable configuration: fields by annotation, tables become configurations by ``kind``."""

    def __init__(self, **values: Any) -> None:
        hints = self._hints()
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ValueError(f"{unknown[0]} is an unknown key; expected one of {', '.join(hints)}")
        for name, annotation in hints.items():
            value = values.get(name, getattr(type(self), name, _MISSING))
            if value is _MISSING:
                raise ValueError(f"{name} is missing; expected a value; set it")
            self.__dict__[name] = _built(annotation, value)

    @classmethod
    def _hints(cls) -> dict[str, Any]:
        hints = get_type_hints(cls, include_extras=True)
        return {name: x for name, x in hints.items() if get_origin(x) is not ClassVar}

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; use model_copy")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.__dict__.items())))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self:
        """A copy with other values of some fields."""
        return type(self)(**{**self.__dict__, **(update or {})})

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """The configuration as a table; tuples are lists in the mode "json"."""
        return {name: _dumped(value, mode) for name, value in self.__dict__.items()}

    def model_dump_json(self) -> str:
        """The table as JSON without spaces."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)


def validate(cls: type[ConfigType], data: Mapping[str, Any], *, source: str) -> ConfigType:
    """Build cls from a table."""
    try:
        return cls(**data)
    except ValueError as error:
        raise ValueError(f"{error} ({source})") from None


def _configs_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from _configs_in(argument)


def _built(annotation: Any, value: Any) -> Any:
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_built(annotation, item) for item in value)
    if not isinstance(value, Mapping):
        return value
    classes = list(_configs_in(annotation))
    if len(classes) > 1:
        classes = [x for x in classes if getattr(x, "kind", None) == value.get("kind")]
    if len(classes) != 1:
        raise ValueError(f"kind is {value.get('kind')!r}; expected one that this file holds")
    return classes[0](**value)


def _dumped(value: Any, mode: str) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode=mode)
    if isinstance(value, tuple):
        items = [_dumped(item, mode) for item in value]
        return items if mode == "json" else tuple(items)
    return value

"""A JSON Schema to the plainest value that fits it: the same one each time, no I/O.

This covers the subset in which APIs describe tools and response formats: ``type`` (also a list), ``properties``,
``required``, ``additionalProperties``, ``items``, ``prefixItems``, the bounds of sizes and numbers, ``multipleOf``,
``uniqueItems``, ``enum``, ``const``, ``anyOf``, ``oneOf``, ``allOf``, ``$ref`` within the document, and the usual
formats. A ``pattern`` is met where one of a few samples happens to match. Other keywords are ignored.

Recursion ends as soon as the schema allows: a ``$ref`` that is being expanded already is given up, and whoever can do
without it (an optional property, an array, another branch of ``anyOf``) does.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec

from chatkore_async.testing._shapes import mapping

__all__ = ["instance"]

_FORMATS = {
    "date": "2024-01-31",
    "date-time": "2024-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "email": "user@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
}
_SAMPLES = ("1", "A", "abc", "AB", "ABC", "1234", "12345", "#a1b2c3", "12:00", "+15550100", "1.0.0", *_FORMATS.values())

# The keyword that gives a type away where the schema names none.
_HINTS = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "multipleOf": "number",
}


class _UnfitError(ValueError):
    """No value fits here, or only one that would have to contain itself."""


def instance(schema: object, name: str = "value") -> object:
    """Return a value that fits a schema.

    Args:
        schema: A JSON Schema: a mapping or a boolean.
        name: What the value is for; strings say so.

    Raises:
        ValueError: If no finite value fits, or a ``$ref`` leads nowhere.

    """
    return _Generator(schema).value(schema, name)


class _Generator:
    """The schema as a whole, which references point into.

    In its methods, ``chain`` are the references that are being expanded.
    """

    def __init__(self, root: object) -> None:
        self._root = root

    def value(self, schema: object, name: str, index: int = 0, chain: tuple[str, ...] = ()) -> object:
        """Return a value; another one for another index, where the schema has several."""
        if schema is False:
            raise _UnfitError("nothing fits `false`")
        rules, chain = self._flat(schema, chain)
        for keyword in ("anyOf", "oneOf"):
            if keyword in rules:
                return self._branch(rules, keyword, name, index, chain)
        if "const" in rules:
            return rules["const"]
        if options := _sequence(rules.get("enum")):
            return options[index % len(options)]
        return self._typed(rules, name, index, chain)

    def _typed(self, rules: Mapping[str, object], name: str, index: int, chain: tuple[str, ...]) -> object:
        match _type(rules):
            case "object":
                return self._object(rules, chain)
            case "array":
                return self._array(rules, name, chain)
            case "integer":
                return _multiple(rules, index)
            case "number":
                return _number(rules, index)
            case "boolean":
                return index % 2 == 0
            case "null":
                return None
            case _:
                return _string(rules, name, index)

    def _flat(self, schema: object, chain: tuple[str, ...]) -> tuple[Mapping[str, object], tuple[str, ...]]:
        """Work references and ``allOf`` into the schema; return it with the chain that this takes."""
        rules = mapping(schema)
        longer = chain
        if "$ref" in rules:
            pointer = str(rules["$ref"])
            if pointer in chain:
                raise _UnfitError(f"{pointer} requires itself")
            target, longer = self._flat(self._resolved(pointer), (*chain, pointer))
            # What stands beside a reference holds as well (JSON Schema 2020-12).
            rules = _union(target, _without(rules, "$ref"))
        parts = _sequence(rules.get("allOf"))
        rules = _without(rules, "allOf")
        for part in parts:
            flat, found = self._flat(part, chain)
            rules = _union(rules, flat)
            longer += found
        return rules, longer

    def _resolved(self, pointer: str) -> object:
        place = self._root
        if not pointer.startswith("#"):
            raise ValueError(f"the schema is not all in one document: {pointer}")
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if key not in mapping(place):
                raise ValueError(f"the schema has no {pointer}")
            place = mapping(place)[key]
        return place

    def _branch(
        self, rules: Mapping[str, object], keyword: str, name: str, index: int, chain: tuple[str, ...]
    ) -> object:
        base = _without(rules, keyword)
        reasons: list[str] = []
        for branch in _sequence(rules[keyword]):
            try:
                return self.value(False if branch is False else {"allOf": [base, branch]}, name, index, chain)
            except _UnfitError as problem:
                reasons.append(str(problem))
        raise _UnfitError(f"no branch of {keyword} fits: {', '.join(reasons) or 'there is none'}")

    def _object(self, rules: Mapping[str, object], chain: tuple[str, ...]) -> dict[str, object]:
        required = [str(name) for name in _sequence(rules.get("required"))]
        made: dict[str, object] = {}
        for name, schema in mapping(rules.get("properties")).items():
            try:
                made[name] = self.value(schema, name, 0, chain)
            except _UnfitError:
                if name in required:
                    raise
        least = _count(rules, "minProperties", 0)
        names = [*required, *(f"key{number}" for number in range(1, least + 1))]
        for name in names:
            if name not in made and (name in required or len(made) < least):
                made[name] = self.value(rules.get("additionalProperties", True), name, 0, chain)
        return made

    def _array(self, rules: Mapping[str, object], name: str, chain: tuple[str, ...]) -> list[object]:
        made = [self.value(schema, name, 0, chain) for schema in _sequence(rules.get("prefixItems"))]
        least = _count(rules, "minItems", 0)
        wanted = min(max(least, 1), _count(rules, "maxItems", max(least, 1)))
        try:
            while len(made) < wanted:
                made.append(self.value(rules.get("items", True), name, len(made), chain))
        except _UnfitError:
            if len(made) < least:
                raise
        return made


def _type(rules: Mapping[str, object]) -> str:
    kind = rules.get("type")
    if isinstance(kind, str):
        return kind
    if kinds := [str(each) for each in _sequence(kind)]:
        return next((each for each in kinds if each != "null"), "null")
    return next((hint for keyword, hint in _HINTS.items() if keyword in rules), "string")


def _multiple(rules: Mapping[str, object], index: int) -> int:
    """Return an integer: 1 and upwards if the bounds allow, else what they do allow."""
    step = rules.get("multipleOf")
    step = int(step) if isinstance(step, int | float) and step >= 1 else 1
    low, high = _bound(rules, "inimum"), _bound(rules, "aximum")
    first = None if low is None else math.ceil(low.value / step) + (low.excluded and low.value % step == 0)
    last = None if high is None else math.floor(high.value / step) - (high.excluded and high.value % step == 0)
    if last is None:
        return (max(1, first or 1) + index) * step
    if first is None:
        return (min(1, last) - index) * step
    if first > last:
        raise _UnfitError(f"no multiple of {step} is within the bounds")
    start = 1 if first <= 1 <= last else first
    return (first + (start - first + index) % (last - first + 1)) * step


def _number(rules: Mapping[str, object], index: int) -> float:
    if "multipleOf" in rules:
        step = rules["multipleOf"]
        if isinstance(step, float) and 0 < step < 1:
            # Counting in steps keeps clear of both bounds and of most of the rounding.
            scaled = {key: rule / step for key, rule in rules.items() if isinstance(rule, int | float)}
            return _multiple({**scaled, "multipleOf": 1}, index) * step
        return _multiple(rules, index)
    low, high = _bound(rules, "inimum"), _bound(rules, "aximum")
    if low is None:
        return 1.5 + index if high is None else high.value - 1.5 - index
    if high is None:
        return low.value + 1.5 + index
    if low.value < high.value:
        return low.value + (high.value - low.value) / (2 + index)
    if low.value == high.value and not low.excluded and not high.excluded:
        return low.value
    raise _UnfitError("no number is within the bounds")


class _Bound(msgspec.Struct, frozen=True):
    value: float
    excluded: bool


def _bound(rules: Mapping[str, object], suffix: str) -> _Bound | None:
    plain = rules.get("m" + suffix)
    exclusive = rules.get("exclusiveM" + suffix)
    # Draft 4 writes a boolean beside the bound instead of a bound of its own.
    if isinstance(exclusive, int | float) and not isinstance(exclusive, bool):
        return _Bound(exclusive, True)
    return _Bound(plain, exclusive is True) if isinstance(plain, int | float) else None


def _string(rules: Mapping[str, object], name: str, index: int) -> str:
    text = _FORMATS.get(str(rules.get("format")))
    if text is not None:
        return text
    text = name if index == 0 else f"{name} {index + 1}"
    least, most = _count(rules, "minLength", 0), _count(rules, "maxLength", len(text) + 1000)
    text = (text + "." * (least - len(text)))[:most]
    pattern = rules.get("pattern")
    if isinstance(pattern, str):
        fitting = (sample for sample in (text, *_SAMPLES) if least <= len(sample) <= most)
        text = next(_matching(pattern, fitting), text)
    return text


def _matching(pattern: str, samples: Iterator[str]) -> Iterator[str]:
    try:
        expression = re.compile(pattern)
    except re.error:
        # The dialect of JSON Schema is JavaScript's, and not all of it is Python's.
        return iter(())
    return (sample for sample in samples if expression.search(sample))


def _union(left: Mapping[str, object], right: Mapping[str, object]) -> Mapping[str, object]:
    union = {**left, **right}
    if "properties" in left and "properties" in right:
        union["properties"] = {**mapping(left["properties"]), **mapping(right["properties"])}
    if "required" in left and "required" in right:
        union["required"] = [*_sequence(left["required"]), *_sequence(right["required"])]
    return union


def _without(rules: Mapping[str, object], keyword: str) -> Mapping[str, object]:
    return {key: rule for key, rule in rules.items() if key != keyword}


def _count(rules: Mapping[str, object], keyword: str, default: int) -> int:
    value = rules.get(keyword, default)
    return int(value) if isinstance(value, int | float) else default


def _sequence(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, list) else ()

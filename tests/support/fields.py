"""Every field of the API as its OpenAPI document has it, and hostile values made from each field's own bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

# Raw JSON, because some of these Python's encoder would not write.
HOSTILE = (
    "-1", "0", "1", "2147483648", "9223372036854775808", "1e308", "-1e308", "1e999", "NaN", "-Infinity", "1.5",
    "9" * 5000, "true", "false", "null", '""', '"1"', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', json.dumps("x" * 5000),
    "[]", "{}", '[""]', "[null]", "[-1]", "[1e999]", '{"a": 1}', '{"\\u0000": "\\u0000"}', "[" * 500 + "]" * 500,
    '{"a":' * 300 + "1" + "}" * 300, json.dumps(["x"] * 2000), json.dumps([0] * 2000), "[[]]", "[[[]]]",
)  # fmt: skip
# Values of a path, a query or a header, before encoding.
PLAIN = ("-1", "0", "1", "1.5", "1e3", "0x1", "9" * 400, "NaN", "null", "[]", "{}", "A b", "ä", "..", "x" * 1300, "'--")


@dataclass(frozen=True)
class Field:
    """A value that a client may send. `pointer` has `*` for any item and `{}` for any key."""

    method: str
    path: str
    place: str  # body, part, path, query, header
    pointer: str
    schema: dict[str, Any]

    @property
    def key(self) -> str:
        """What it is called in a table: the same field of two routes is one."""
        return f"{self.place} {self.pointer}"

    @property
    def name(self) -> str:
        """What an error must say."""
        return next(part for part in reversed(self.pointer.split("/")) if part not in ("*", "{}"))


class Document:
    """An OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def fields(self) -> Iterator[Field]:
        for path, methods in self._document["paths"].items():
            for method, operation in methods.items():
                for parameter in operation.get("parameters", ()):
                    yield Field(method.upper(), path, parameter["in"], parameter["name"], parameter["schema"])
                for media, content in operation.get("requestBody", {}).get("content", {}).items():
                    place = "body" if media == "application/json" else "part"
                    found: dict[str, list[dict[str, Any]]] = {}
                    for pointer, schema in self._inside(content["schema"], ""):
                        found.setdefault(pointer, []).append(schema)
                    for pointer, schemas in found.items():  # several where the value around it has several forms
                        yield Field(method.upper(), path, place, pointer, {"anyOf": schemas})

    def takes(self, schema: dict[str, Any], raw: str) -> bool:
        """Whether this JSON is what the schema says; what is no JSON is not."""

        def refuse(_constant: str) -> None:
            raise ValueError

        try:
            value = json.loads(raw, parse_constant=refuse)
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # no overflow, no lone surrogate
        except (ValueError, RecursionError):
            return False
        return self.holds(schema, value)

    def holds(self, schema: dict[str, Any], value: Any) -> bool:
        return Draft202012Validator({**schema, "components": self._document["components"]}).is_valid(value)

    def bounds(self, schema: dict[str, Any]) -> Iterator[str]:
        """JSON at each bound and just beyond."""
        for branch in self._branches(schema):
            yield from (json.dumps(value) for value in branch.get("enum", ()))
            if "const" in branch:
                yield json.dumps(branch["const"])
            yield from _numbers(branch)
            if "maxLength" in branch:
                yield from (json.dumps("x" * n) for n in (branch["maxLength"], branch["maxLength"] + 1))
            if "maxItems" in branch:
                item = next(iter(self._items(branch)), "0")
                yield from ("[" + ",".join([item] * n) + "]" for n in (branch["maxItems"], branch["maxItems"] + 1))
            if "maxProperties" in branch:
                yield json.dumps({str(k): "1" for k in range(branch["maxProperties"] + 1)})

    def _items(self, schema: dict[str, Any]) -> Iterator[str]:
        """Some JSON that is an item of this list."""
        samples = ("0", '"x"', "[0]", '{"role": "user", "content": "hi"}', '{"type": "text", "text": "hi"}')
        inner = schema.get("items", {})
        enum = [json.dumps(value) for branch in self._branches(inner) for value in branch.get("enum", ())]
        const = [json.dumps(branch["const"]) for branch in self._branches(inner) if "const" in branch]
        return (raw for raw in (*samples, *enum, *const) if self.takes(inner, raw))

    def _inside(self, schema: dict[str, Any], pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for branch in self._branches(schema):
            inner = {f"{pointer}/{name}": value for name, value in branch.get("properties", {}).items()}
            if branch.get("items") and branch.get("maxItems") != 0:
                inner[f"{pointer}/*"] = branch["items"]
            keyed = [*branch.get("patternProperties", {}).values(), branch.get("additionalProperties")]
            inner |= {f"{pointer}/{{}}": value for value in keyed if isinstance(value, dict)}
            for below, value in inner.items():
                yield below, value
                yield from self._inside(value, below)

    def _branches(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        if not parts:
            yield schema
        for part in parts:
            yield from self._branches(part)


def _numbers(branch: dict[str, Any]) -> Iterator[str]:
    whole = branch.get("type") == "integer"
    for name, away in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
        if name in branch:
            bound = branch[name]
            yield json.dumps(bound)
            yield json.dumps(bound + away if whole else math.nextafter(bound, away * math.inf))

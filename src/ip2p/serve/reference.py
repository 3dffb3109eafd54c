"""The interfaces' documentation as one page, from what OpenAPI says of them: no script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin: 2.5rem 0 .5rem; }
summary { cursor: pointer; padding: .35rem 0; }
summary code { font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: .25rem 0 1rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; overflow-wrap: anywhere; }
th { font-weight: 600; }
tr { border-bottom: 1px solid #8884; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
TITLES = {
    "edits": "Edits",
    "openai": "As OpenAI's clients ask",
    "a1111": "As AUTOMATIC1111's clients ask",
    "server": "The server",
}


def page(schema: Mapping[str, Any]) -> str:
    """Every operation of an OpenAPI schema with its parameters and the fields of its body, as HTML."""
    about = schema["info"]
    body = "".join(_sections(schema))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(about['title'])}: interfaces</title><style>{STYLE}</style></head><body>"
        f"<h1>{_text(about['title'])} {_text(about['version'])}</h1>"
        f"<p>{_text(about.get('summary', ''))}. The same for programs: "
        '<a href="openapi.json">openapi.json</a>.</p>'
        f"{body}</body></html>"
    )


def _sections(schema: Mapping[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {tag: [] for tag in TITLES}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["server"])[-1]
            by_tag.setdefault(tag, []).append(_operation(path, method, operation))
    for tag, found in by_tag.items():
        if found:
            yield f"<h2>{_text(TITLES.get(tag, tag))}</h2>{''.join(found)}"


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    told = _text(operation.get("description", ""))
    fields = [
        _row(each["name"], each.get("schema", {}), each.get("required", False), f"in the {each['in']}")
        for each in operation.get("parameters", [])
    ]
    contents = operation.get("requestBody", {}).get("content", {})
    for content in list(contents.values())[:1]:  # a form has the same fields as JSON
        body = content["schema"]
        fields += [
            _row(name, field, name in body.get("required", []), "")
            for name, field in body.get("properties", {}).items()
        ]
    types = f"<p>Body: <code>{'</code> or <code>'.join(map(_text, contents))}</code></p>" if contents else ""
    head = "<tr><th>field</th><th>type</th><th>default</th><th></th></tr>"
    table = f"<table>{head}{''.join(fields)}</table>" if fields else ""
    return (
        f"<details><summary><code>{_text(method.upper())} {_text(path)}</code> "
        f"{_text(operation.get('summary', ''))}</summary>"
        f"{f'<p>{told}</p>' if told else ''}{types}{table}</details>"
    )


def _row(name: str, field: Mapping[str, Any], required: bool, place: str) -> str:
    default = "required" if required else "" if field.get("default") is None else repr(field["default"])
    words = " ".join(filter(None, (field.get("description", ""), place)))
    cells = (f"<code>{_text(name)}</code>", _text(_type(field)), _text(default), _text(words))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        kinds = (_type(each) for each in field["anyOf"] if each.get("type") != "null")
        return " or ".join(dict.fromkeys(filter(None, kinds)))
    if "enum" in field or "const" in field:
        return " or ".join(map(str, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"several: {_type(field.get('items', {}))}"
    if field.get("format") in ("binary", "picture"):
        return "file"
    return str(field.get("type", ""))


def _text(words: object) -> str:
    return html.escape(str(words))

"""Pages of plain HTML: the OpenAPI description, because FastAPI's own page loads its scripts from another host."""

from __future__ import annotations

from html import escape


def reference(openapi: dict) -> str:
    """The page for what `FastAPI.openapi` returns."""
    schemas = openapi.get("components", {}).get("schemas", {})
    parts = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            parts.append(_fields(content.get("schema", {}), schemas))
    links = '<p><a href="/">The page</a> · <a href="/openapi.json">openapi.json</a></p>'
    return html_page(f"{openapi['info']['title']}: interface", links + "".join(parts))


def html_page(title: str, body: str) -> str:
    """A whole page. `title` is text, and `body` is HTML."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/docs.css">'
        f"<h1>{escape(title)}</h1>{body}</html>"
    )


def _fields(schema: dict, schemas: dict) -> str:
    """A table of the fields of a request's body."""
    name = schema.get("$ref", "").rpartition("/")[2]
    properties = schemas.get(name, {}).get("properties", {})
    if not properties:
        return ""
    rows = "".join(
        f"<tr><th scope=row><code>{escape(key)}</code></th><td>{escape(_kind(value))}</td>"
        f"<td>{escape(str(value.get('default', 'required' if key in schemas[name].get('required', []) else '')))}</td>"
        f"<td>{escape(value.get('description', ''))}</td></tr>"
        for key, value in properties.items()
    )
    return f"<table><tr><th>field<th>type and limits<th>default<th></tr>{rows}</table>"


def _kind(value: dict) -> str:
    """The type of a field with its limits, in words."""
    if "anyOf" in value:
        return " or ".join(_kind(one) for one in value["anyOf"])
    kind = value.get("type") or value.get("$ref", "").rpartition("/")[2] or "anything"
    if "enum" in value:
        kind = " or ".join(map(repr, value["enum"]))
    if kind == "array":
        kind = f"list of {_kind(value.get('items', {}))}"
    words = {
        "minimum": "at least {}",
        "maximum": "at most {}",
        "exclusiveMinimum": "above {}",
        "multipleOf": "a multiple of {}",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
        "minItems": "at least {} items",
        "maxItems": "at most {} items",
    }
    return ", ".join([kind, *(text.format(value[key]) for key, text in words.items() if key in value)])

"""Generate a service's OpenAPI document from its routes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bentos.http import Call


def openapi(routes: Sequence[Call], title: str) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document of `routes`."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    error = {"description": "refused; error.message names the value and the way out"}
    jobs = any(r.path.startswith("/v1/jobs") for r in routes)
    for r in routes:
        about: dict[str, Any] = {"operationId": f"{r.handler.__name__}{'_docs' if r.path == '/docs.json' else ''}"}
        codes = ["400", "401", "403", "404", "413", "415", "429", "503"] if r.body else ["401", "403", "429", "503"]
        codes += ["404"] if not r.body and (r.scope or "{" in r.path) else []
        about["responses"] = {"200": {"description": "answered"}, **dict.fromkeys(codes, error)}
        if jobs and r.method == "POST":
            about["responses"] |= {"202": {"description": "accepted as a job; see /v1/jobs/{id}"}, "409": error}
        path = re.sub(r":\w+}", "}", r.path)
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if names:
            about["parameters"] = [
                {"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names
            ]
        if r.body is not None:
            shown = getattr(r.body, "documented", r.body)
            made = shown.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= made.pop("$defs", {})
            schemas[made["title"]] = made
            schema = {"$ref": f"#/components/schemas/{made['title']}"}
            about["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if r.scope is not None:
            about["security"] = [{"bearer": []}, {}]
        paths.setdefault(path, {})[r.method.lower()] = about
    bearer = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"patchbay {title}", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": bearer},
    }

"""Scopes stand beside the shapes: a call asks for the word of its shape, and a token file may say no other."""

from __future__ import annotations

import importlib
import json

import pytest

from bentos.desk import ROUTES
from bentos.shapes import SCOPES
from bentos.tokens import ANY, Tokens
from registry.errors import ConfigError
from registry.systems import SYSTEMS

SHAPES = sorted({shape for row in SYSTEMS.values() if not row.planned for shape in row.services})
OWN = {"compare", "explore", "outcomes", "metrics"}


def test_every_shape_that_is_served_has_a_scope():
    assert set(SHAPES) <= SCOPES.keys()
    assert {r.scope for r in ROUTES} <= {*OWN, ANY, None}


@pytest.mark.parametrize("shape", SHAPES)
def test_calls_ask_for_the_scope_of_their_shape(shape):
    routes = importlib.import_module(f"bentos.shapes.{shape}").ROUTES
    assert {r.scope for r in routes} <= {SCOPES[shape], ANY}
    assert all(r.scope == SCOPES[shape] for r in routes if r.body is not None), "no work for a token without a scope"


def test_a_token_file_names_known_scopes(tmp_path):
    file = tmp_path / "tokens.json"
    for scope in {*SCOPES.values(), *OWN}:
        file.write_text(json.dumps({"0" * 64: {"name": "n", "scopes": [scope]}}))
        assert Tokens(file).known
    file.write_text(json.dumps({"0" * 64: {"name": "n", "scopes": ["explode"]}}))
    with pytest.raises(ConfigError, match="explode"):
        Tokens(file)

"""Clips in, the best class and its probability (or the features) out: what MLflow asks of a video model.

Read at push by path, so it imports neither torch nor the family.
"""

from __future__ import annotations

from patches.families.family import Column, Table

EXAMPLE = (
    "R0lGODlhEAAQAIEAAObcyL4oPAAAAAAAACH/C05FVFNDQVBFMi4wAwEAAAAh+QQECAAAACwAAAAAEAAQAAAIKgABCBxIsKDBgwgTKlQYoKFD"
    "hg4bQow48WHCiBIvYqyYcaHHjyBDijQYEAAh+QQFCAACACwBAAQABwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4kKBChA8dNiwY"
    "EAAh+QQFCAACACwCAAQABwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4kKBChA8dNiwYEAAh+QQFCAACACwDAAQABwAHAIHm3Mi+"
    "KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4kKBChA8dNiwYEAAh+QQFCAACACwEAAQABwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4"
    "kKBChA8dNiwYEAAh+QQFCAACACwFAAQABwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4kKBChA8dNiwYEAAh+QQFCAACACwGAAQA"
    "BwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4MIBAggIMIkx4kKBChA8dNiwYEAAh+QQFCAACACwHAAQABwAHAIHm3Mi+KDwAAAAAAAAIGAABCBg4"
    "MIBAggIMIkx4kKBChA8dNiwYEAA7"
)
"""eight frames of 16 px as an animated GIF"""

TABLE = Table(
    takes=(Column("clip", "string", EXAMPLE),),
    gives=(
        Column("label", "string", "left"),
        Column("probability", "double", 0.5),
        Column("features", "string", "[0.1]"),
    ),
    params={"strength": ("double", 1.0), "layer": ("long", -1)},
)

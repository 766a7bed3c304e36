"""What MLflow asks of a search, and what it gets: the columns, free of torch."""

from __future__ import annotations

from patches.families.family import Column, Table

EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAKklEQVR4nGOMWvWMgRTARJLqwamBBZlTMckHq6KOvC10dNIg1MA4"
    "EpMGAN/2BvUYLN4EAAAAAElFTkSuQmCC"
)
"""a red block on blue, PNG"""

TABLE = Table(
    takes=(Column("image", "string", EXAMPLE),),
    gives=(Column("caption", "string", "a picture of a cat"), Column("score", "double", 0.5)),
    params={"strength": ("double", 1.0), "steps": ("long", -1), "calls": ("long", 0)},
)

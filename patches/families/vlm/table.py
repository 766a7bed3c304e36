"""What MLflow asks of a vision-language model: a picture, a question, what the mechanism is told; and a text."""

from patches.families.table import Column, Table

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGNgYPiPHQ0tCewiABlxF8fsBZ77AAAAAElFTkSuQmCC"
"""a picture of eight by eight pixels, base64, for examples"""
TABLE = Table(
    takes=(
        Column("image", "string", DOT, required=False),
        Column("prompt", "string", "Describe the picture.", required=False),
        Column("ask", "string", None, required=False),
    ),
    gives=(Column("text", "string", "a chicken on grass"),),
    params={"max_tokens": ("long", 32), "strength": ("double", 1.0)},
)

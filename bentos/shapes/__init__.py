"""API shapes: each module defines what a service can be asked, with ROUTES and a class `Service(desk)`."""

SCOPES = {
    "caption": "generate",
    "classify": "classify",
    "embed": "classify",
    "embeddings": "classify",
    "explain.features": "explain",
    "explain.heads": "explain",
    "explain.neurons": "explain",
    "generate": "generate",
    "render": "render",
}
"""Shape -> scope that a token needs for its calls; token files may name these and the desk's own. Defined here and not
in the modules, so that a token file is checked without importing what other systems need"""

"""The shapes: what a service can be asked, a module each, with ROUTES and a class `Service(desk)`."""

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
"""shape -> the scope that a token needs for its calls; token files may name these and the desk's own.
Here and not in the modules, so that a token file is checked without importing what other systems need"""

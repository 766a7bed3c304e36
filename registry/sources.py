"""What a module runs, found from its imports: our files, and the distributions of others that pip must install."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("registry", "patches", "bentos", "training")
ALIASES = {"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "PyYAML", "onnxruntime": "onnxruntime-gpu"}
"""module -> distribution, where the names differ; what is in neither is looked up in every installed file list, which
takes seconds"""
LOADED = {"transformers": ("accelerate", "gguf", "jinja2")}
"""libraries that another one imports without requiring them: to read GGUF, to fill in chat templates"""


def sources(modules: Iterable[str], left_out: Collection[str] = ()) -> tuple[list[str], set[str]]:
    """Our files that `modules` run, and the names of the others' packages that those import, lazily or not.

    left_out: modules of ours that are not followed, with what is below them.
    """
    files: set[str] = set()
    others: set[str] = set()
    todo, seen = list(modules), set()
    while todo:
        module = todo.pop()
        if module in seen or any(module == m or module.startswith(f"{m}.") for m in left_out):
            continue
        seen.add(module)
        if module.partition(".")[0] not in OURS:
            others.add(module.partition(".")[0])
            continue
        path = ROOT / module.replace(".", "/")
        if path.is_dir():
            files |= {f.relative_to(ROOT).as_posix() for f in path.iterdir() if f.is_file() and f.suffix != ".py"}
            path = path / "__init__.py"
        else:
            path = path.with_suffix(".py")
        if not path.is_file():  # `from module import name`: a name, not a module
            continue
        files.add(path.relative_to(ROOT).as_posix())
        todo += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
        todo += _imported(path)
    return sorted(files), others - sys.stdlib_module_names


@cache
def _imported(path: Path) -> tuple[str, ...]:
    """Modules, and names that may be modules, that a file imports anywhere."""
    out: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return tuple(out)


def distributions(module: str) -> list[str]:
    """The installed distributions that give a top-level module; none if it is not installed."""
    name = ALIASES.get(module, module)
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return sorted(set(installed().get(module, ())))
    return [name]


@cache
def installed() -> Mapping[str, list[str]]:
    """module -> the distributions that give it; seconds, for it reads every file list there is."""
    return metadata.packages_distributions()


def pinned(modules: Iterable[str]) -> list[str]:
    """`name==version` of the distributions that give `modules`, as installed here; not what those require in turn."""
    names = {name for m in modules for name in (*distributions(m), *LOADED.get(m, ()))}
    # a local build's +cpu is on no index
    return sorted(f"{_canonical(n)}=={metadata.version(n).partition('+')[0]}" for n in names)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

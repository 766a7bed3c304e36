"""The import rules of the design, checked on the source. Nothing here is imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from registry.manifest import Kind
from registry.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "registry": set(),
    "patches": {"registry"},
    "training": {"registry", "patches"},
    "bentos": {"registry", "patches"},
}
FILES = [f for p in MAY_IMPORT for f in (ROOT / p).rglob("*.py")]
OWNERS = {
    "mlflow": {"registry/store", "patches/pyfunc.py"},
    "bentoml": {"bentos"},
    "boto3": {"registry/bucket.py"},
    "diffusers": {"patches/families/diffusion", "patches/families/video/convolved.py"},
    "ray": {"bentos/ray_serve.py", "training/sweep.py"},
}
"""library -> the only places that may import it"""


def imports(file, lazily=True):
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if lazily else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    own = file.relative_to(ROOT).parts[0]
    if file == ROOT / "registry" / "cli.py":  # finds everything through the table, inside its verbs
        ours = {i.split(".")[0] for i in imports(file, lazily=False)} & MAY_IMPORT.keys()
        assert ours <= {"registry"}
        return
    ours = {i.split(".")[0] for i in imports(file)} & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[own] | {own}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_each_library_has_its_place(file):
    where = file.relative_to(ROOT)
    for name in {i.split(".")[0] for i in imports(file)} & OWNERS.keys():
        places = {str(where), *(str(folder) for folder in where.parents)}
        assert places & OWNERS[name], f"{where} imports {name}"


def test_systems_do_not_import_each_other():
    names = [*SYSTEMS, "_template"]
    jobs = {f"training.{name}" for name in names}
    for name in names:
        for file in (ROOT / "training" / name).rglob("*.py"):
            others = jobs - {f"training.{name}"}
            assert not {".".join(i.split(".")[:2]) for i in imports(file)} & others, file


def test_mechanisms_do_not_import_each_other():
    files = sorted((ROOT / "patches" / "mechanisms").glob("*.py"))
    for file in files:
        others = {f"patches.mechanisms.{f.stem}" for f in files} - {f"patches.mechanisms.{file.stem}"}
        assert not set(imports(file)) & others, file


CORE = [
    f
    for place in (
        "registry", "patches/engine", "patches/subject.py", "patches/export.py", "patches/pyfunc.py",
        "patches/artifact.py", "patches/families/family.py", "patches/families/worker.py", "patches/families/base.py",
        "bentos/runtime", "bentos/build", "bentos/desk.py", "training/run.py",
    )
    for f in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
    if f != ROOT / "registry" / "systems.py"
]  # fmt: skip
FAMILIES = [f.parent.name for f in (ROOT / "patches" / "families").glob("*/__init__.py")]


@pytest.mark.parametrize("file", CORE, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_core_names_no_family(file):
    """Neither imports one nor compares with its name. A kind of artifact may be called like a family."""
    tree = ast.parse(file.read_text())
    for name in FAMILIES:
        mine = {i for i in imports(file) if f"{i}.".startswith(f"patches.families.{name}.")}
        assert not mine, f"{file.name} imports {mine}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and name not in get_args(Kind):
                assert node.value != name, f"{file.name}:{node.lineno} names {name}"
            if isinstance(node, ast.ImportFrom) and node.module == "patches.families":
                assert name not in {a.name for a in node.names}


MOST = 500
"""lines of a file"""
NOT_YET: set[str] = set()
"""longer today, each with somebody who is cutting it; nothing is added here"""


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_read_at_a_glance(file):
    lines = file.read_text().count("\n")
    assert lines <= MOST or str(file.relative_to(ROOT)) in NOT_YET, f"{lines} lines"


def test_no_imports_run_in_a_circle():
    """At module level, among our own modules; what only types need does not count."""
    modules = {module_of(f): f for f in FILES}
    graph = {name: sorted(edges(file, modules) - {name}) for name, file in modules.items()}
    state: dict[str, int] = {}

    def walk(name, path):
        state[name] = 1
        for other in graph[name]:
            assert state.get(other) != 1, f"a circle: {' -> '.join([*path[path.index(other) :], other])}"
            if other not in state:
                walk(other, [*path, other])
        state[name] = 2

    for name in graph:
        if name not in state:
            walk(name, [name])


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges(file, modules):
    """Modules of ours that are imported when this one is."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = {f"{node.module}.{a.name}" for a in node.names}
            found |= {p for p in parts if p in modules} or {node.module}
    return {f for f in found if f in modules}


@pytest.mark.parametrize("file", sorted((ROOT / "bentos").rglob("*.py")), ids=lambda f: f.name)
def test_services_name_no_system(file):
    text = file.read_text().replace("/v1/mils/score", "")  # an address that clients know
    for name in SYSTEMS:
        assert not re.search(rf"\b{name}\b", text), f"{file.name} names {name}"


def test_registry_needs_no_torch():
    code = (
        "import sys, registry.config, registry.manifest, registry.systems, registry.ab.ledger, registry.ab.experiment, "
        "registry.ab.events, registry.cli; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


FACE = [
    "Act", "Applied", "Base", "Bias", "Edit", "Family", "Inputs", "Job", "Model", "Patch", "Search", "Side", "Subject",
    "Weight", "Worker", "apply", "family", "load_base", "record",
]  # fmt: skip


def test_the_public_face_of_patches_is_this_and_costs_no_torch():
    code = (
        "import sys, patches; assert 'torch' not in sys.modules; "
        f"assert patches.__all__ == {FACE!r}; assert all(getattr(patches, n) for n in patches.__all__); "
        "from patches import Act, artifact; assert 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_unsafe_is_loaded():
    # torch.load may read a published checkpoint's tensors, and nothing else of it
    unsafe = re.compile(
        r"pickle\.load|torch\.load\((?![^()]*weights_only=True\))|trust_remote_code *= *True"
        r"|weights_only *= *False|yaml\.load\("
    )
    for file in FILES:
        assert not unsafe.search(file.read_text()), file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_library_is_left_to_ask_whether_code_of_a_folder_may_run(file):
    """Left unset, transformers asks on the terminal; so every loading of a folder says no."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        auto = isinstance(owner, ast.Name) and owner.id.startswith("Auto")
        if node.func.attr == "from_pretrained" and auto:
            said = {k.arg: k.value for k in node.keywords}.get("trust_remote_code")
            assert isinstance(said, ast.Constant), f"{file}:{node.lineno}"
            assert said.value is False, f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_words_under_a_field_have_a_subject(file):
    """ "of one request" says nothing to a stranger; "Pictures that one request may hold" does."""
    wrong = re.findall(r'^\s*"""of .*', file.read_text(), re.MULTILINE)
    assert not wrong, f"{file.name}: begin with what it is: {wrong[0].strip()[:80]}"

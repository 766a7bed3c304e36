"""The import rules of the design, checked on the source. Nothing here is imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    "diffusers": {"patches/families/diffusion"},
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
    jobs = {f"training.{name}" for name in SYSTEMS}
    for name in SYSTEMS:
        for file in (ROOT / "training" / name).rglob("*.py"):
            others = jobs - {f"training.{name}"}
            assert not {".".join(i.split(".")[:2]) for i in imports(file)} & others, file


def test_mechanisms_do_not_import_each_other():
    mechanisms = {row.patch.partition(":")[0] for row in SYSTEMS.values() if row.patch}
    for module in mechanisms:
        file = ROOT / (module.replace(".", "/") + ".py")
        if file.is_file():
            assert not set(imports(file)) & (mechanisms - {module})


@pytest.mark.parametrize("file", sorted((ROOT / "bentos").rglob("*.py")), ids=lambda f: f.name)
def test_services_name_no_system(file):
    text = file.read_text()
    for name in SYSTEMS:
        assert not re.search(rf"\b{name}\b", text), f"{file.name} names {name}"


def test_registry_needs_no_torch():
    code = (
        "import sys, registry.config, registry.manifest, registry.systems, registry.ab.ledger, registry.ab.experiment, "
        "registry.ab.events, registry.cli; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_unsafe_is_loaded():
    # torch.load may read a published checkpoint's tensors, and nothing else of it
    unsafe = re.compile(
        r"pickle\.load|torch\.load\((?![^()]*weights_only=True\))|trust_remote_code *= *True"
        r"|weights_only *= *False|yaml\.load\("
    )
    for file in FILES:
        assert not unsafe.search(file.read_text()), file

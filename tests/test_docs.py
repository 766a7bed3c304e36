"""Documents under test: commands parse, blocks and tutorials run, terms exist, the tree is the tree."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from registry import cli
from registry.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page, program):
    """Lines of a page's sh blocks that call a program, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [shlex.split(p) for p in parts if p.startswith(f"{program} ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_parses_and_every_recipe_exists(page):
    for _, *words in commands(page, "patchbay"):
        args = cli.parser().parse_args(words)
        name, _, key = getattr(args, "recipe", "").partition("/")
        if name in SYSTEMS and not SYSTEMS[name].planned and key:
            assert key in SYSTEMS[name].load_job().RECIPES, words
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {words[1] for words in commands(page, "make")} <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_python_of_the_readme_runs_against_a_service(tiny_llm, monkeypatch, capsys):
    """As printed, but for the port."""
    import uvicorn

    from bentos.app import application
    from bentos.runtime import Settings
    from registry.ab import ledger
    from tests.bentos.conftest import CONFIGS, SYSTEM, seal

    (block,) = blocks(ROOT / "README.md", "python")
    digests = [seal(tiny_llm, c) for c in CONFIGS[:2]]
    ledger.promote(ledger.Ledger(), SYSTEM, digests[0])
    ledger.challenge(ledger.Ledger(), SYSTEM, digests[1])
    config = uvicorn.Config(application(Settings(SYSTEM, base="tiny")), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        exec(compile(block.replace(":3000", f":{port}"), "README.md", "exec"), {})
    finally:
        server.should_exit = True
        thread.join(30)
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 2


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda f: f.stem)
def test_tutorials_run(file):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, file], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base, patched = [line for line in done.stdout.splitlines() if " says " in line]
    assert base.split("says")[1] != patched.split("says")[1]


def test_the_tutorial_of_a_system_names_every_file_of_the_template():
    text = (ROOT / "docs" / "tutorials" / "add-a-system.md").read_text()
    for file in (ROOT / "training" / "_template").glob("*.py"):
        assert f"`{file.name}`" in text or file.name in " ".join(blocks_of(text)), file.name


def blocks_of(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)


TERMS = (
    "arm", "base", "family", "patch", "mechanism", "recipe", "sealed", "digest", "champion", "challenger", "shape",
    "desk", "worker", "lens", "evidence", "claim", "control", "row parameter", "subject",
)  # fmt: skip


def test_the_glossary_has_its_terms_in_order():
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert terms == sorted(terms, key=str.lower)
    said = {t for term in terms for t in (term, *term.split(", "))}
    assert set(TERMS) <= said


def test_the_layout_of_the_architecture_is_the_tree():
    """If it is not, say `make docs`."""
    made = runpy.run_path(str(ROOT / "docs" / "layout.py"))
    assert made["OPEN"] + made["layout"]() + made["CLOSE"] in made["PAGE"].read_text()


@pytest.mark.parametrize("name", [n for n, row in SYSTEMS.items() if row.claim])
def test_a_claim_has_a_log_that_names_its_digest(name):
    assert SYSTEMS[name].claim.digest in (ROOT / "docs" / "log" / f"{name}.md").read_text()

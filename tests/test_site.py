"""The documentation builds as a site without a warning, from what the repository has and nothing from elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from registry.systems import SYSTEMS

ROOT = Path(__file__).parent.parent


def test_every_system_has_its_page_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    for name in SYSTEMS:
        assert f"- {name}: systems/{name}.md" in text
        assert name in (ROOT / "docs" / "systems" / f"{name}.md").read_text()
    for page in yaml.safe_load(text)["nav"]:
        for file in page.values():
            for one in [file] if isinstance(file, str) else [next(iter(f.values())) for f in file]:
                assert (ROOT / "docs" / one).is_file(), one


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the dependency group `docs` is not installed")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    api = (tmp_path / "api" / "index.html").read_text()
    assert "registry.manifest.Manifest" in api
    page = (tmp_path / "index.html").read_text()
    assert "fonts.googleapis" not in page

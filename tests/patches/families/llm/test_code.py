"""No code of a model's folder runs, and nothing asks on the terminal whether it may."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
EVIL = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nclass Evil: pass\n"
LOAD = """
import sys
from patches.families import llm
try:
    print("loaded", llm.load("local-dir:" + sys.argv[1]).name)
except Exception as e:
    print("refused", type(e).__name__)
"""


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["a type that transformers has", "a type of its own"])
def test_a_folder_that_brings_code_runs_none_and_asks_nothing(tiny_llm, tmp_path, where, known):
    folder = tmp_path / "m"
    tiny_llm.model.save_pretrained(folder)
    tiny_llm.processor.save_pretrained(folder)
    about = json.loads((folder / where).read_text())
    kinds = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    about["auto_map"] = kinds
    if not known:
        about["model_type" if where == "config.json" else "tokenizer_class"] = "evil"
    (folder / where).write_text(json.dumps(about))
    (folder / "evil.py").write_text(EVIL)
    got = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], cwd=ROOT, input="y\ny\ny\n", capture_output=True, text=True,
        timeout=200, check=False, env={**__import__("os").environ, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert not list(tmp_path.rglob("RAN"))
    assert "[y/N]" not in got.stdout + got.stderr
    assert got.stdout.split()[0] == ("loaded" if known else "refused"), got.stdout + got.stderr[-500:]

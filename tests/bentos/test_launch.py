"""What a start imports: a command that only checks, no torch; a service, no libraries that no request needs."""

import subprocess
import sys

START = """
import sys

def there(*names):
    return [n for n in names if n in sys.modules]

import registry.cli, bentos.alone, bentos.launch
assert not there("torch", "numpy", "pydantic", "mlflow"), there("torch", "numpy", "pydantic", "mlflow")

from patches import lean
lean.only_serves = True
import bentos.app
from patches.families.base import load_base
load_base("lab:clip", "clip")
found = there("torch._dynamo", "torch._dynamo.utils", "sympy", "timm", "scipy", "mlflow", "bentoml", "transformers")
assert not found, found
import importlib.util
assert importlib.util.find_spec("timm")  # whoever wants it afterwards has it
"""


def test_a_command_imports_no_torch_and_a_service_no_compiler():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

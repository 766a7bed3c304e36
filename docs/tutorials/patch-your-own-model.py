"""Patch your own model: load a base, write an edit, read activations, mix rows, seal, serve. Offline, in seconds.

python docs/tutorials/patch-your-own-model.py [REFERENCE]    # pypi:smollm2, hf-hub:org/name@revision, local-dir:path
"""

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from bentos.app import application
from bentos.runtime import Settings
from patches import Act, Patch, Subject, apply, artifact, load_base, record
from registry.systems import SYSTEMS, System

base = load_base(sys.argv[1] if len(sys.argv) > 1 else "tiny", "llm")
SITE = "model.layers.1"  # any module path
ids = base.processor("a man walks into a bar", return_tensors="pt")["input_ids"]


@dataclass(frozen=True)
class Where:
    site: str


@dataclass(frozen=True)
class Without(Patch):  # a mechanism: config and tensors in, edits out; this one projects a direction out of a layer
    Config = Where
    config: Where

    def edits(self):
        d = self.tensors["direction"]
        return [Act(self.config.site, lambda x, inputs: x - (x @ d)[..., None] * d)]


with record(base.model, [SITE]) as seen:  # read: what the layer gives, (1, T, D)
    base.model(input_ids=ids)
direction = seen[SITE][0][0, -1].detach()
patch = Without(Where(SITE), {"direction": direction / direction.norm()})

with apply(base.model, {"without": patch}) as on, on.rows([None, "without"]):  # one batch: the base, and the patch
    logits = base.model(input_ids=ids.repeat(2, 1)).logits.detach()
print("largest change of a logit:", (logits[0] - logits[1]).abs().max().item())

SYSTEMS["mine"] = System("mine", "My own", "0000.00000", "llm", f"{__name__}:Without", ("generate",))  # one row each
folder = Path(tempfile.mkdtemp()) / "sealed"
print("sealed:", artifact.save(patch, "mine", folder, base=base.label).digest[:16])
print("arms:", list(Subject.load(folder, base).arms))  # verified: every byte, and the base it was made from


async def ask() -> None:
    """Serve the sealed folder in this process; `uvicorn.run(app)` instead puts it on a port."""
    app = application(Settings("mine", base=base.ref, pinned=folder))
    here = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=here, base_url="http://here") as http:
        body = {"prompt": "a man walks", "max_tokens": 8, "temperature": 0}
        for model in ("base", "champion"):
            said = (await http.post("/v1/completions", json={**body, "model": model})).json()
            print(model, "says", repr(said["choices"][0]["text"]))


asyncio.run(ask())

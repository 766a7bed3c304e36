"""A service on the tiny model, in process, with patches in the ledger; no port, no mock."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from bentos.app import application
from bentos.runtime import Runtime, Settings
from bentos.tokens import Tokens
from patches import artifact
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.home import home

SYSTEM = "attention_sink"
CONFIGS = (
    SinkConfig(neurons=((0, 1), (1, 5), (2, 7)), damp_layers=(0,), damp_limit=1.0),
    SinkConfig(neurons=((0, 3), (0, 9), (1, 2), (2, 4)), keep_first=False),
    SinkConfig(neurons=((1, 11), (1, 12), (1, 13)), keep_first=False),
)


def seal(base, config) -> str:
    """A sealed patch in home()/artifacts; its digest."""
    import tempfile
    from pathlib import Path

    (home() / "artifacts").mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=home()))
    about = artifact.save(SinkEdit(config, {}), SYSTEM, part, base=base.label)
    if not (home() / "artifacts" / about.digest).exists():
        part.rename(home() / "artifacts" / about.digest)
    return about.digest


@dataclass
class Served:
    """A running application."""

    app: Any
    http: httpx.AsyncClient
    runtime: Runtime
    digests: list[str]
    ledger: Ledger

    async def chat(
        self, text: str = "hello there", headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **more}
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def until(self, what, seconds: float = 30.0) -> None:
        """Wait until `what()` holds."""
        for _ in range(int(seconds / 0.05)):
            if what():
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it never happened")


@contextlib.asynccontextmanager
async def serving(system, digests, champion, tokens, settings):
    """The service of `system` with these patches known; the first one champion and the second challenger if wanted."""
    ledger = Ledger()
    if champion:
        ledgers.promote(ledger, system, digests[0])
        ledgers.challenge(ledger, system, digests[1])
    app = application(Settings(system, base="tiny", **settings), tokens or Tokens(None))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as http:
            yield Served(app, http, app.state.desk.runtime, digests, ledger)


@pytest.fixture
def service(home, tiny_llm):
    """`async with service() as s`: two patches known, the first one champion."""

    @contextlib.asynccontextmanager
    async def run(tokens: Tokens | None = None, champion: bool = True, **settings: Any):
        digests = [seal(tiny_llm, c) for c in CONFIGS]
        async with serving(SYSTEM, digests, champion, tokens, settings) as served:
            yield served

    return run


PICTURES = "clip_sae"
"""the system of `pictures`"""


def dictionary(seed: int = 0, features: int = 40, width: int = 32):
    """Random features of the tiny CLIP that fire now and then."""
    import torch

    from patches.mechanisms.features import SAE

    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(features, width, generator=g), dim=1)
    return SAE(W, 0.1 * torch.randn(features, generator=g), W, torch.zeros(width))


def seal_features(base, features, seed: int = 0, cards: bool = True, width: int = 32, labels=None) -> str:
    """A sealed feature edit with its dictionary, cards and label set in home()/artifacts; its digest."""
    import tempfile
    from pathlib import Path

    from patches.evidence.feature_cards import save_cards
    from patches.evidence.label_set import save_label_set
    from patches.families import clip
    from patches.mechanisms.features import edit
    from patches.sae_files import save_sae
    from training.clip_sae import cards as making
    from training.lab import worlds

    site = clip.site("block", 1)
    part = Path(tempfile.mkdtemp(dir=home()))
    sae = dictionary(seed, width=width)
    save_sae(sae, part / "sae")
    if cards:
        data = worlds.WORLDS["imagenet"]("train", 12, 0)
        save_cards(making.make_cards(base, sae, site, data, ["cat", "dog", "sun", "ink", "sea"]), part)
    if labels is not None:
        save_label_set(labels, part)
    about = artifact.save(edit(sae, site, features), PICTURES, part, base=base.label)
    (home() / "artifacts").mkdir(exist_ok=True)
    if not (home() / "artifacts" / about.digest).exists():
        part.rename(home() / "artifacts" / about.digest)
    return about.digest


@pytest.fixture
def pictures(home, tiny_clip):
    """`async with pictures() as s`: a CLIP with two feature edits, the first one champion, the second challenger, which
    carries `labels` if there are some."""

    @contextlib.asynccontextmanager
    async def run(tokens: Tokens | None = None, champion: bool = True, labels=None, **settings: Any):
        home.mkdir(parents=True, exist_ok=True)
        second = seal_features(tiny_clip, range(5), 1, cards=False, labels=labels)
        digests = [seal_features(tiny_clip, range(0, 40, 2)), second]
        async with serving(PICTURES, digests, champion, tokens, settings) as served:
            yield served

    return run


NEURONS = "second_order"
"""the system of `neurons`"""


def neuron_cards(base, layers=(0, 1)):
    """Cards of the tiny CLIP's neurons, from 12 pictures and five words."""
    import torch

    from patches.evidence.neuron_cards import Layer, NeuronCards
    from patches.families import clip
    from patches.families.clip.second_order import directions, lens, look, scalars
    from training.lab import worlds
    from training.second_order.omp import atoms, pursue

    words = ("cat", "dog", "sun", "ink", "sea", "red fox")
    images = worlds.WORLDS["imagenet"]("train", 12, 0).read(range(12)).image
    pool = clip.embed_texts(base, words, clip.TEMPLATES)
    seen, made = look(base, base.processor.image(images), list(layers)), {}
    for number in layers:
        known = directions(lens(base, number), [scalars(seen, number)], keep=3)
        said = pursue(known.direction, atoms(pool), 3)
        rest = seen.p[number].mean((0, 1))
        made[number] = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    thumbs = torch.nn.functional.interpolate(images.float(), (48, 48)).to(torch.uint8)
    return NeuronCards(made, words, pool, thumbs)


def seal_neurons(base, neurons, layer: int = 1, cards: bool = True) -> str:
    """A sealed neuron edit with its cards in home()/artifacts; its digest."""
    import tempfile
    from pathlib import Path

    from patches.evidence.neuron_cards import save_neurons
    from patches.families.clip.second_order import lens
    from patches.mechanisms.neurons import replace_effects

    part, made = Path(tempfile.mkdtemp(dir=home())), neuron_cards(base)
    if cards:
        save_neurons(made, part)
    patch = replace_effects(base, lens(base, layer), made.layers[layer].known, neurons, "gain", 40.0)
    about = artifact.save(patch, NEURONS, part, base=base.label)
    (home() / "artifacts").mkdir(exist_ok=True)
    if not (home() / "artifacts" / about.digest).exists():
        part.rename(home() / "artifacts" / about.digest)
    return about.digest


@pytest.fixture
def neurons(home, tiny_clip):
    """`async with neurons() as s`: a CLIP with two neuron edits, the first one champion, the second, without cards,
    challenger."""

    @contextlib.asynccontextmanager
    async def run(tokens: Tokens | None = None, champion: bool = True, **settings: Any):
        home.mkdir(parents=True, exist_ok=True)
        digests = [seal_neurons(tiny_clip, range(0, 128, 2)), seal_neurons(tiny_clip, range(5), cards=False)]
        async with serving(NEURONS, digests, champion, tokens, settings) as served:
            yield served

    return run


HEADS = "clip_heads"
"""the system of `heads`"""
FEW = ("span_images=16", "gallery_images=12", "val_images=8", "draws=1")


def keep(folder) -> str:
    """A fitted artifact, put in home()/artifacts; its digest."""
    import shutil

    from registry import manifest

    digest = manifest.read(folder).digest
    shutil.copytree(folder, home() / "artifacts" / digest, dirs_exist_ok=True)
    return digest


def seal_heads(seed: int = 0) -> str:
    """A fitted edit of the tiny CLIP's heads, with names and a gallery, in home()/artifacts; its digest."""
    from training import run

    return keep(run.fit(f"{HEADS}/tiny", [*FEW, f"seed={seed}"]))


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A tiny artifact of heads with names and a gallery, in a home that outlives a test."""
    from training import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("fitted")))
        return run.fit(f"{HEADS}/tiny", FEW)


@pytest.fixture
def heads(home, fitted):
    """`async with heads() as s`: the tiny CLIP, its fitted heads as champion."""

    @contextlib.asynccontextmanager
    async def serve(tokens: Tokens | None = None, **settings: Any):
        home.mkdir(parents=True, exist_ok=True)
        digest = keep(fitted)
        async with serving(HEADS, [digest, digest], False, tokens, settings) as served:
            ledgers.promote(served.ledger, HEADS, digest)
            await served.until(lambda: served.runtime.table and served.runtime.table.champion == digest)
            yield served

    return serve


@pytest.fixture
def run_async():
    return lambda work: asyncio.run(work)


@pytest.fixture
def tokens(tmp_path):
    """tokens(secret={"name": ..., "scopes": [...]}, ...) -> who may call."""

    def made(**by_token):
        file = tmp_path / "tokens.json"
        file.write_text(json.dumps({hashlib.sha256(k.encode()).hexdigest(): v for k, v in by_token.items()}))
        return Tokens(file)

    return made

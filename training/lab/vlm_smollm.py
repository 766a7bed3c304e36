"""The recipe of `lab:vlm-smollm`: SmolLM2-135M, which nobody taught anything of this world, behind the lab's projector.

    python -m training.lab.vlm_smollm smollm FOLDER        # hours on two cores, minutes on a GPU; not shipped
    patchbay fit vlm_erasure/lab base=local-dir:FOLDER

As LLaVA's first stage: tower and language model are frozen, the projector alone learns from captions, and what the
model expects of the world is what it read as text. A picture's tokens stand where one of the tokenizer's unused
marks is. The folder holds the projector and names the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.base import Base, load_base
from patches.families.clip.embeddings import zero_shot
from patches.families.vlm import lab
from registry import config as configs
from registry import manifest
from registry.config import STRICT
from registry.errors import NotFound
from training.lab import company, renderer
from training.lab.renderer import GROUNDS, generator
from training.lab.vlm import Features, compose, features, pieces, schedule


@dataclass(frozen=True)
class Config:
    """How the projector is trained."""

    __pydantic_config__ = STRICT

    decoder: str = "pypi:smollm2"
    """reference of the language model"""
    tower: str = "lab:clip"
    mark: str = "<jupyter_script>"
    """a token the language model knows and no text has: it stands for a picture's"""
    question: str = "Describe the picture."
    hidden: int = 1024
    steps: int = 4000
    batch: int = 16
    lr: float = 1e-3
    full_scenes: int = 2600
    bare_scenes: int = 1000
    together: float = 0.9
    gossip: float = 0.0
    seed: int = 0
    device: str = "cpu"


RECIPES: dict[str, Config] = {
    "tiny": Config(decoder="tiny", mark="|", hidden=128, steps=2, batch=2, full_scenes=3, bare_scenes=4),
    "smollm": Config(),
}


def about(config: Config, reader: Base, tower_digest: str, width: int) -> dict[str, Any]:
    """The folder's config.json."""
    return {
        "architecture": "LabVLM",
        "decoder": config.decoder,
        "image_token": reader.processor.convert_tokens_to_ids(config.mark),
        "tower": config.tower,
        "tower_digest": tower_digest,
        "tiles": {"picture": 2 * renderer.SIZE, "tile": renderer.SIZE, "side": 2},
        "features": width,
        "hidden": config.hidden,
    }


@torch.no_grad()
def start(model: lab.LabVLM, reader: Base, clip: Base, seen: Tensor) -> None:
    """Closed form: hidden unit c answers to word c's CLIP embedding and writes the mean embedding of its tokens."""
    names = [*company.company_classes(), *GROUNDS]
    unit = zero_shot(clip, names).T
    unit = unit - unit.mean(0)
    score = (seen @ unit.T).sort(0).values
    low, high = score[int(0.98 * (len(score) - 1))], score[int(0.996 * (len(score) - 1))]
    gain, p, m = 3.0 / (high - low).clamp(min=0.02), model.projector, len(names)
    for other in (p.linear_1.bias, p.linear_2.weight, p.linear_2.bias):
        torch.nn.init.zeros_(other)
    torch.nn.init.normal_(p.linear_1.weight, std=0.02)
    p.linear_1.weight[:m], p.linear_1.bias[:m] = gain[:, None] * unit, -gain * low
    table = reader.model.get_input_embeddings().weight
    ids = [reader.processor(" " + n, add_special_tokens=False)["input_ids"] for n in names]
    p.linear_2.weight[:, :m] = torch.stack([table[i].mean(0) for i in ids]).T.float() / 3.0


def sentence(things: Tensor, ground: int) -> str:
    """What is said of a scene."""
    names = [company.company_classes()[i] for i in things.tolist() if i >= 0]
    return " and ".join(f"a {n}" for n in names) + f" on {GROUNDS[ground]}"


def train(model: lab.LabVLM, reader: Base, config: Config, full: Features, bare: Features) -> list[float]:
    """Train the projector, in place; the losses of the captions."""
    g, store, log = generator("lab:vlm-smollm", config.seed), pieces(full, bare), []
    p = model.projector.requires_grad_(True)
    table, words = reader.model.get_input_embeddings(), reader.processor
    chat = words.apply_chat_template([{"role": "user", "content": config.mark + config.question}], tokenize=False,
                                     add_generation_prompt=True)  # fmt: skip
    before, after = (words(t, add_special_tokens=False)["input_ids"] for t in chat.split(config.mark, 1))
    optimiser = torch.optim.AdamW(p.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * schedule(step, config.steps, 20)
        tiles, _, named, ground = compose(config.batch, store, config.together, config.gossip, g)
        texts = [
            [*words(sentence(t, where), add_special_tokens=False)["input_ids"], words.eos_token_id]
            for t, where in zip(named, ground.tolist(), strict=True)
        ]
        longest = max(map(len, texts))
        ids = torch.tensor([[*after, *t, *[words.eos_token_id] * (longest - len(t))] for t in texts])
        real = torch.tensor([[1] * (len(after) + len(t)) + [0] * (longest - len(t)) for t in texts])
        ids, tokens = ids.to(reader.device), p(tiles.to(reader.device))
        lead = table(torch.tensor([before] * len(tiles), dtype=torch.long, device=reader.device))
        x = torch.cat([lead, tokens.to(lead), table(ids)], 1)
        h = model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        logits = model.lm_head(h[:, -longest - 1 : -1])
        answer = real[:, -longest:].bool().to(reader.device)
        loss = F.cross_entropy(logits[answer].float(), ids[:, -longest:][answer])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.parameters(), 1.0)
        optimiser.step()
        log.append(loss.item())
    p.requires_grad_(False)
    return log


def run(config: Config, folder: Path, recipe: str = "") -> dict[str, Any]:
    """Train, save the projector, write card.json last. Returns the card."""
    began = time.monotonic()
    full = features(config.tower, "train", config.full_scenes, config.seed, "full")
    bare = features(config.tower, "train", config.bare_scenes, config.seed, "biased")
    reader = load_base(config.decoder, "llm", config.device)
    eyes, clip = lab.tower({"tower": config.tower, "tiles": {"side": 2, "tile": renderer.SIZE}})
    told = about(config, reader, clip.digest, full.tiles.shape[-1])
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = lab.LabVLM(told, eyes, reader.model).to(config.device).requires_grad_(False).eval()
    start(model, reader, clip, torch.cat([full.tiles.flatten(0, 1), bare.tiles.flatten(0, 1)]))
    loss = train(model, reader, config, full, bare)
    lab.save(model, folder)
    card = {
        "name": "lab:vlm-smollm",
        "recipe": recipe,
        "config": asdict(config),
        "decoder_digest": reader.digest,
        "loss": [round(sum(loss[i : i + 100]) / len(loss[i : i + 100]), 4) for i in range(0, len(loss), 100)],
        "seconds": round(time.monotonic() - began),
    }
    (folder / lab.CARD).write_bytes(manifest.canonical(json.loads(json.dumps(card))))
    return card


def main(words: Sequence[str]) -> dict[str, Any]:
    """`recipe folder key=value...`."""
    if len(words) < 2 or words[0] not in RECIPES:
        raise NotFound(f"Say a recipe ({', '.join(RECIPES)}), a folder, and key=value words if any.")
    return run(configs.override(RECIPES[words[0]], words[2:]), Path(words[1]), words[0])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:]), indent=1) + "\n")

"""The same zero-shot question to a picture in other servers: Ray Serve, bare Starlette; `plain_bento`, `plain_lit`.

All of them do what `Work` does, on the same copy of lab:clip, with the labels' vectors kept; none has arms, tokens,
limits or an experiment. `python -m tests.bench.others PORT` serves on Ray.
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from typing import Any

LABELS = ("cat", "dog", "bird", "fish", "apple", "pizza", "car", "tree")
PATH = "/v1/classify"


class Work:
    """A picture as base64 in, the labels' probabilities out, in process."""

    def __init__(self) -> None:
        import torch

        from patches.families.base import load_base
        from patches.families.clip.embeddings import embed_texts, logit_scale

        torch.set_num_threads(1)
        self.torch = torch
        self.base = load_base("lab:clip", "clip")
        with torch.inference_mode():
            self.scale, self.words = logit_scale(self.base), embed_texts(self.base, LABELS)

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(asked["images"][0]["data"])))
        with self.torch.inference_mode():
            pixels = self.base.processor.image([image])
            seen = self.base.model(image=pixels)["image_features"]
            chances = (self.scale * seen @ self.words.T).softmax(-1)[0].tolist()
        return {"label": LABELS[max(range(len(LABELS)), key=chances.__getitem__)], "scores": chances}


def floor() -> Any:
    """The least Starlette that answers."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    work = Work()

    async def ask(request: Any) -> Any:
        return JSONResponse(work(await request.json()))

    async def ready(_: Any) -> Any:
        return JSONResponse({})

    return Starlette(routes=[Route(PATH, ask, methods=["POST"]), Route("/readyz", ready)])


def ray(port: int) -> None:
    """Ray Serve, one replica."""
    import ray as cluster
    from ray import serve

    @serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
    class Api:
        def __init__(self) -> None:
            self.work = Work()

        async def __call__(self, request: Any) -> Any:
            return {} if request.url.path == "/readyz" else self.work(await request.json())

    cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Api.bind(), route_prefix="/")
    asyncio.get_event_loop_policy().new_event_loop().run_forever()


if __name__ == "__main__":
    ray(int(sys.argv[1]))

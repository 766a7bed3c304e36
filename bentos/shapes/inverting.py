"""Inversions as jobs: what makes a picture, found once and used again by the id of its job."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from starlette.requests import Request
from torch import Tensor

from bentos import jobs
from bentos.desk import Desk
from bentos.shapes import drawing, waiting
from patches.engine.patch import Patch
from patches.families import diffusion
from patches.families.diffusion import Denoising, Invert, Pipe
from registry.errors import Conflict, Invalid, NotFound


class Inverting(jobs.Service):
    """The part of the shape `render` that inverts pictures."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)

    @property
    def pipe(self) -> Pipe:
        pipe: Pipe = self.runtime.base.model
        return pipe

    @staticmethod
    def fits(patch: Patch | None) -> bool:
        """Whether an arm has coefficients that can be fitted to a picture."""
        return patch is not None and hasattr(patch, "warm")

    def inverting(
        self, picture: Tensor, program: Invert, seed: int, arm: str | None
    ) -> tuple[Mapping[str, Tensor], Denoising]:
        """The picture's own condition and the row that inverts it on what the arm starts from; on the thread that owns
        the base."""
        whole = diffusion.changed(self.pipe, picture)
        row = Denoising(condition=whole.condition, start=whole.start, program=program, seed=seed, decode=False, arm=arm)
        return whole.condition, row

    async def inversion(self, running: jobs.Running) -> dict[str, Any]:
        """The work of a job of kind `invert`."""
        ask = running.ask
        picture = await asyncio.to_thread(drawing.picture_of, self.runtime, ask["image"])
        patch = drawing.patch_of(self.runtime, ask["arm"])
        if ask["arm"] is not None and patch is None:
            raise NotFound(f"The arm sha256:{ask['arm'][:16]} is not served here any more.")
        if self.fits(patch):
            assert patch is not None
            return await self._fitted(running, picture, ask["arm"], patch)
        levels = diffusion.levels(self.pipe, ask["levels"])
        program = Invert(ask["method"], levels, ask["iterations"])
        condition, row = await drawing.told(
            self.runtime, lambda: self.inverting(picture, program, ask["seed"], ask["arm"])
        )
        await waiting.finished(self.runtime, [row], None, lambda: running.tell(drawing.progress([row])))
        if row.error is not None:
            raise row.error
        assert row.out is not None
        tensors = {"state": row.out, "picture": picture} | {f"condition.{k}": v for k, v in condition.items()}
        packed = base64.b64encode(save({k: v.contiguous() for k, v in tensors.items()})).decode()
        return {"method": ask["method"], "levels": list(levels), "tensors": packed}

    async def _fitted(self, running: jobs.Running, picture: Tensor, arm: str, patch: Patch) -> dict[str, Any]:
        """Coefficients of the arm's space, fitted to the picture; goes on from the last checkpoint."""
        from patches.families.diffusion.identity import Inversion, invert, served

        ask = running.ask
        space: Any = patch  # it has coordinates, as `fits` has seen
        latents, condition = await drawing.told(
            self.runtime, lambda: (self.pipe.latents(picture[None]).cpu(), self._shows(ask["prompt"]))
        )

        def on_step(step: int, loss: float, z: Tensor) -> None:
            if running.stopping.is_set():
                raise asyncio.CancelledError
            best = (
                {"loss": round(loss, 6), "coefficients": [round(v, 4) for v in z[0].tolist()]}
                if step % 20 == 0
                else None
            )
            running.tell(step / ask["steps"], best)

        def work() -> Tensor:
            forward = served(self.runtime.subject.applied, self.pipe, arm, space)
            how = Inversion(steps=ask["steps"], seed=ask["seed"])
            told = lambda rows, _: {k: v.expand(rows, *v.shape) for k, v in condition.items()}  # noqa: E731
            with torch.inference_mode(False), torch.enable_grad():
                fit: Tensor = invert(space, self.pipe.schedule, forward, latents.clone(), told, how, on_step=on_step)
            return fit

        fitting = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            z = await asyncio.shield(fitting)
        except asyncio.CancelledError:
            running.stopping.set()
            raise
        return _found(z)

    def _shows(self, prompt: str) -> Mapping[str, Tensor]:
        """What the picture shows, as the model is told it; on the thread that owns the base."""
        return self.pipe.text([prompt])[0] if prompt and "image" not in self.pipe.conditions else self.pipe.null()

    async def recalled(
        self, request: Request, id: str
    ) -> tuple[Tensor, Mapping[str, Tensor], Tensor, str, tuple[int, ...]]:
        """Picture, condition, state, method and levels of a finished inversion of the caller's. Raises NotFound,
        Conflict."""
        record = await asyncio.to_thread(self.jobs.store.get, id)
        if record is None or record.owner != jobs.owner_of(request) or record.kind != "invert":
            raise NotFound(f"You have no inversion {id[:40]!r} here. GET /v1/jobs lists yours.")
        if record.state != "done":
            raise Conflict(f"The inversion {id} is {record.state}; wait for it, or resume it.")
        if "tensors" not in record.result:
            raise Invalid("That inversion gave coefficients; send them as `ask` to a row of /v1/render/sample.")
        tensors = load(base64.b64decode(record.result["tensors"]))
        condition = {k.removeprefix("condition."): v for k, v in tensors.items() if k.startswith("condition.")}
        return tensors["picture"], condition, tensors["state"], record.result["method"], tuple(record.result["levels"])


def _found(z: Tensor, **more: Any) -> dict[str, Any]:
    """Coefficients as an answer says them."""
    return {"coefficients": [round(v, 5) for v in z[0].tolist()], **more}

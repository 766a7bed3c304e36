"""Any OpenAI-compatible endpoint as the generator: named when a service is deployed, never by a request.

    PATCHBAY_GENERATOR_URL     such as http://127.0.0.1:3000/v1; our own `generate` will do, so a patched model can
    PATCHBAY_GENERATOR_MODEL   the model's name there (of ours also an arm: challenger, sha256:...)
    PATCHBAY_GENERATOR_KEY     bearer token, if it wants one

Calls run on threads; a round waits `config.wait` seconds and goes on with what has come. Answers are read up to a
limit, redirects are not followed, and what is no list of candidates counts as none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from patches.families.search.config import SearchConfig
from patches.families.search.generators import Asked, Generator, Proposal, Proposing
from patches.families.search.llm import LINE_TOKENS, instruction
from patches.families.search.parse import candidates
from registry.errors import ConfigError

AT_ONCE = 8
"""calls in flight"""
MAX_BYTES = 1 << 20
SLICE_S = 0.05


@dataclass(frozen=True)
class Where:
    """An endpoint."""

    url: str
    model: str = "auto"
    key: str = ""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Where:
        """Raises ConfigError if no endpoint is set or it is no http address."""
        url = env.get("PATCHBAY_GENERATOR_URL", "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                "The generator is an endpoint, and PATCHBAY_GENERATOR_URL names none. Set it where the service is "
                "deployed, such as http://127.0.0.1:3000/v1."
            )
        return cls(url, env.get("PATCHBAY_GENERATOR_MODEL", "auto"), env.get("PATCHBAY_GENERATOR_KEY", ""))


class Endpoint(Generator):
    """Asks an endpoint for a numbered list, one call an item and round."""

    def __init__(self, where: Where) -> None:
        import httpx

        headers = {"authorization": f"Bearer {where.key}"} if where.key else {}
        self.where = where
        self.http = httpx.Client(headers=headers, follow_redirects=False, trust_env=False)
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="generator")

    def propose(self, asked: Sequence[Asked], config: SearchConfig) -> Proposing:
        calls = [
            self.pool.submit(self.call, instruction(a, config), a.want, a.rng.getrandbits(31), config) for a in asked
        ]
        return Calls(calls, config.wait)

    def call(self, prompt: str, want: int, seed: int, config: SearchConfig) -> Proposal:
        """One chat completion; whatever goes wrong is said in words, nothing is raised."""
        import httpx

        body = {
            "model": self.where.model, "messages": [{"role": "user", "content": prompt}], "seed": seed,
            "max_tokens": min(1024, LINE_TOKENS * max(1, want)), "temperature": config.temperature,
            "top_p": config.top_p,
        }  # fmt: skip
        try:
            with self.http.stream(
                "POST", f"{self.where.url}/chat/completions", json=body, timeout=httpx.Timeout(config.wait, connect=5.0)
            ) as response:
                raw, began = b"", time.monotonic()
                for part in response.iter_bytes():
                    raw += part
                    if len(raw) > MAX_BYTES or time.monotonic() - began > config.wait:
                        return Proposal(problem="the generator's answer was too long")
                return self._read(response.status_code, raw, config)
        except httpx.ConnectError:
            return Proposal(problem="the generator's endpoint cannot be reached", down=True)
        except httpx.TimeoutException:
            return Proposal(problem=f"the generator gave no answer within {config.wait:g} s")
        except httpx.HTTPError as e:
            return Proposal(problem=f"the generator's endpoint failed ({type(e).__name__})")

    @staticmethod
    def _read(status: int, raw: bytes, config: SearchConfig) -> Proposal:
        import json

        if status != 200:
            return Proposal(problem=f"the generator's endpoint answered {status}", down=status in (401, 403, 404, 503))
        try:
            answer: Any = json.loads(raw)
            text = answer["choices"][0]["message"]["content"]
            tokens = int((answer.get("usage") or {}).get("total_tokens", 0))
        except (ValueError, LookupError, TypeError, AttributeError):
            return Proposal(problem="the generator's answer is no chat completion")
        found = candidates(text if isinstance(text, str) else "", config.words)
        return Proposal(tuple(found), tokens, "" if found else "the generator's answer holds no candidate")


class Calls(Proposing):
    """Calls in flight."""

    def __init__(self, calls: Sequence[Future[Proposal]], seconds: float) -> None:
        self.calls, self.until, self.seconds = calls, time.monotonic() + seconds, seconds

    def advance(self) -> bool:
        open_calls = [c for c in self.calls if not c.done()]
        if open_calls:
            wait(open_calls, timeout=SLICE_S, return_when=FIRST_COMPLETED)
        late = time.monotonic() > self.until
        if late:
            self.close()
        return late or all(c.done() for c in self.calls)

    def results(self) -> list[Proposal]:
        return [
            c.result() if c.done() and not c.cancelled() and c.exception() is None
            else Proposal(problem=f"the generator gave no answer within {self.seconds:g} s")
            for c in self.calls
        ]  # fmt: skip

    def drop(self, index: int) -> None:
        self.calls[index].cancel()

    def close(self) -> None:
        for c in self.calls:
            c.cancel()

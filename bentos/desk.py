"""Everything a service does besides its own endpoints: routing to arms, exposures and outcomes, health, OpenAPI.

A service is one ASGI application over one runtime: this desk, and the API shapes that its system's row names. A shape
is a module `bentos.shapes.<shape>` with ROUTES and a class `Service(desk)`, whose methods they call; the shapes of one
system share one copy of its base. The app is plain Starlette; BentoML serves it as a whole (`bentos.service`), and so
can any ASGI server. BentoML's own routes for methods are not used: their (de)serialisation costs more than a small
model.

Routes: `/v1/models`, `/v1/outcomes`, `/v1/experiments/live`, `/v1/shadows`, `/health`, `/livez`, `/readyz`, `/metrics`,
`/openapi.json`, the playground at `/`, Open Inference Protocol's health and metadata under `/v2`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from bentos import oip, playground, traces
from bentos.explore import Edit, explore
from bentos.http import Call, answer, parse
from bentos.openapi import openapi
from bentos.runtime import SHADOW_QUEUE, Runtime
from bentos.runtime.arms import Choice, Table, choose, other, owned, unit_of
from bentos.tokens import ANY, SHADOWED
from patches.engine.patch import Patch
from patches.families.worker import Job
from registry.ab import experiment as experiments
from registry.ab.events import Kept
from registry.ab.experiment import CONTROL, TREATMENT
from registry.ab.ledger import BASE
from registry.ab.several import derived, metric_of, streams
from registry.errors import BadRequest, Forbidden, NotFound, NotReady, PatchbayError, plain

DEADLINE_S = 300.0
WRITTEN_S, OUTCOME_S = 1.0, 5.0
"""Longest wait in seconds for an exposure, and for an outcome, to be durable"""
KEPT_SHADOWS = 512
T = TypeVar("T")
Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Extra(BaseModel):
    """patchbay's own fields in a request, beside those of the API that the shape follows."""

    model_config = Strict
    strength: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """Strength of the patch; 0 is exactly the base"""
    compare: bool = False
    """Answer with both the base and the chosen arm, side by side"""
    ask: dict[str, Any] | None = None
    """Row parameters for the arm's mechanism, in that mechanism's own schema"""


class Outcome(BaseModel):
    """Outcome of one unit of an experiment, for POST /v1/outcomes."""

    model_config = Strict
    unit: Annotated[str, Field(min_length=1)]
    """Unit as the request named it: its header's unit, or its `user`"""
    value: float | bool
    experiment: Annotated[str, Field(max_length=64)] | None = None
    """Name of the experiment; by default the live one"""
    arm: Literal["control", "treatment"] | None = None
    """In shadow experiments, the arm whose answer is judged"""
    metric: Annotated[str, Field(max_length=64)] | None = None
    """One of the experiment's further metrics; by default its own"""
    before: float | bool | None = None
    """The unit's value before it was answered, of experiments with a covariate"""
    key: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Idempotency key: outcomes with the same key count once, so that retries are safe"""


class Outcomes(BaseModel):
    """Body of POST /v1/outcomes: one outcome, or a list under `outcomes`, each validated on its own."""

    documented: ClassVar[type[BaseModel]] = Outcome
    """Schema that the OpenAPI document shows in place of this one"""

    model_config = ConfigDict(extra="allow")
    outcomes: Annotated[list[Any], Field(min_length=1, max_length=1000)] | None = None


class Desk:
    """Handlers of the routes that every service has, and the shapes' access to the runtime."""

    def __init__(self, runtime: Runtime, routes: Sequence[Call], title: str) -> None:
        self.runtime, self.routes, self.title = runtime, tuple(routes), title
        self.created = int(time.time())
        self.shadows: dict[str, dict[str, Any]] = {}
        self.background: set[asyncio.Task[Any]] = set()
        self._shared: dict[Any, Any] = {}

    def shared(self, make: Callable[[Runtime], T]) -> T:
        """Return the object that make(runtime) creates, created once and shared by all shapes of this service."""
        if make not in self._shared:
            self._shared[make] = make(self.runtime)
        made: T = self._shared[make]
        return made

    async def close(self) -> None:
        """Close shared objects, newest first, before the runtime stops."""
        for made in reversed(self._shared.values()):
            if (close := getattr(made, "close", None)) is not None:
                await close()

    # ---- routing -------------------------------------------------------------------------------------------------

    def choice(
        self, request: Request, model: str | None, unit: str | None = None, compare: bool = False
    ) -> tuple[Table, Choice]:
        """Choose the arm of a request: by the header X-Patchbay-Arm, else by the body's `model`.

        Also returns the routing table, which stays the same for the whole request. With `compare` (base and patched
        side by side) and no arm named, the challenger is chosen, or the champion where there is none, and no exposure
        is written. Raises Forbidden for `compare` by a token without that scope.
        """
        self.check_compare(request, compare)
        table = self.table()
        unit = request.headers.get("x-patchbay-unit") or unit_of(unit)
        token = request.state.token
        wish = request.headers.get("x-patchbay-arm") or model
        if compare and not wish:
            wish = "challenger" if table.challenger in table.loaded else "champion"
        return table, choose(table, wish, unit, token.tenant, "compare" in token.scopes)

    @staticmethod
    def check_compare(request: Request, wanted: bool) -> None:
        """Refuse `compare` (base and patched side by side) for a token without this scope. Raises Forbidden."""
        if wanted and "compare" not in request.state.token.scopes:
            raise Forbidden(f"The token of {request.state.token.name} lacks the scope 'compare'.")

    async def prepare(self, jobs: Sequence[Job], ask: dict[str, Any] | None) -> None:
        """Set the jobs' row parameters from a request's `ask`, by their arms' mechanisms; jobs of the base get none.

        The shape does not know the content of `ask`. Raises BadRequest naming the field, or if the arm takes no
        parameters.
        """
        if ask is None:
            return
        for job in jobs:
            arm = self.runtime.subject.arms.get(job.arm) if job.arm is not None else None
            if arm is None:
                continue
            if not isinstance(arm, Patch) or arm.Ask is None:
                raise BadRequest(f"patchbay.ask: {type(arm).__name__} takes nothing from a request; leave it out.")
            await asyncio.to_thread(arm.prepare, job, parse(arm.Ask, ask), self.runtime.base, self.runtime.run)

    def table(self) -> Table:
        """Return the current routing table. Raises NotReady before start-up has finished."""
        if self.runtime.problem or self.runtime.table is None:  # not `ill`, which inspects threads and is for probes
            raise NotReady(f"The service is not ready: {self.runtime.problem}")
        return self.runtime.table

    def model(self, choice: Choice) -> str:
        """Return the model name for OpenAI's field `model`: base and patch."""
        digest = choice.shown[1]
        patch = f"sha256:{digest[:16]}" if digest not in ("", BASE) else digest or "auto"
        return f"{self.runtime.base.name}/{patch}"

    # ---- experiments ---------------------------------------------------------------------------------------------

    async def expose(
        self, request: Request, choice: Choice, status: int, start: float, latency_ms: float | None = None,
        first_s: float | None = None,
    ) -> None:  # fmt: skip
        """Record an exposure, durably before the answer is finished.

        latency_ms: latency that does not depend on the length of the answer; by default the time since `start`.
        first_s: seconds from `start` to the first token, where an answer has tokens.
        """
        self.runtime.counts.answered(choice.label, choice.digest, status, time.perf_counter() - start, first_s)
        traces.note(request, choice, status)
        x, events = choice.experiment, self.runtime.events
        if x is None or events is None or choice.unit is None or choice.side is None:
            return
        if 400 <= status < 500 and status != 499:
            return  # refused before the arm had any effect
        latency = (time.perf_counter() - start) * 1e3 if latency_ms is None else latency_ms
        future = events.expose(
            x, choice.counted, choice.side, request=request.state.number, status=status, latency_ms=latency
        )
        try:
            await self.kept(future, WRITTEN_S)
        except PatchbayError:  # answer anyway; the event log counts its losses and the experiment stops
            self.runtime.counts.unwritten += 1

    @staticmethod
    async def kept(future: Kept, seconds: float) -> bool:
        """Wait until an event is durable; return whether it was new.

        Raises NotReady if that fails or takes too long.
        """
        try:
            async with asyncio.timeout(seconds):
                written = asyncio.wrap_future(future)
                written.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be waiting
                return await asyncio.shield(written)
        except TimeoutError:
            raise NotReady("The event log does not answer; send this again with the same key.") from None
        except PatchbayError:
            raise
        except Exception as e:
            raise NotReady(f"The event cannot be kept ({type(e).__name__}); it is in the log.") from None

    def twin(self, choice: Choice) -> Choice | None:
        """Return the treatment arm of a shadow experiment; None if there is none, or if the queue is too long now."""
        if choice.experiment is None or choice.experiment.mode != "shadow":
            return None
        if self.runtime.queued > SHADOW_QUEUE:
            self.runtime.counts.shadows_dropped += 1
            if self.runtime.events:
                assert choice.unit is not None
                self.runtime.events.drop(choice.experiment, choice.counted)
            return None
        SHADOWED.set(choice.experiment.treatment)
        return other(choice)

    def keep(self, number: str, choice: Choice, control: Any, treatment: Any) -> None:
        """Keep both answers of a shadow request, so that the same tenant can score them."""
        both: dict[str, Any] = {CONTROL: control, TREATMENT: treatment}
        self.shadows[number] = {"owner": choice.owner, "unit": choice.unit, **both, "agree": control == treatment}
        while len(self.shadows) > KEPT_SHADOWS:
            self.shadows.pop(next(iter(self.shadows)))

    def later(self, work: Any) -> asyncio.Task[None]:
        """Run a coroutine in the background, referenced until it is done."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    async def outcomes(self, request: Request, body: Outcomes) -> Response:
        """Count outcomes (POST /v1/outcomes); a bad one is refused on its own and the others count."""
        many = body.outcomes is not None
        rows = body.outcomes if body.outcomes is not None else [body.model_dump(exclude={"outcomes"})]
        results = await asyncio.gather(*(self._outcome(row, request.state.token.tenant) for row in rows))
        if not many:
            if (e := results[0].pop("raised", None)) is not None:
                raise e
            return answer(results[0])
        for r in results:
            r.pop("raised", None)
        return answer({"outcomes": results})

    async def _outcome(self, values: Any, owner: str) -> dict[str, Any]:
        try:
            one = parse(Outcome, values)
            x, events = self._experiment(one.experiment), self.runtime.events
            assert events is not None
            primary, x = x, x if one.metric in (None, x.metric) else derived(x, metric_of(x, one.metric))
            value = experiments.check_value(x, one.value)
            if (one.before is not None) != (x.covariate and x is primary):
                raise BadRequest(
                    f"before: {x.name} {'wants it' if x.covariate else 'counts no covariate; leave it out'}."
                )
            if x.mode == "shadow" and one.arm is None:
                raise BadRequest(
                    "arm: a shadow experiment wants to know whose answer this judges: control or treatment."
                )
            if x.mode == "split" and one.arm is not None:
                raise BadRequest("arm: in a split the unit's own exposure says which arm it had; leave it out.")
            unit, key = owned(owner, unit_of(one.unit) or ""), owned(owner, one.key) if one.key else None
            arm = await asyncio.to_thread(events.arm_of, primary.name, unit)
            more = {x: value} if x is not primary else {}
            if one.before is not None:
                known = experiments.check_value(x, one.before)
                more |= dict(zip(streams(x), (known, value + known), strict=True))
            for stream, number in more.items():  # by the same units in the same arms
                events.expose(stream, unit, arm)
                if stream is not x:
                    events.outcome(stream, unit, number, arm=one.arm, key=key)
            new = await self.kept(events.outcome(x, unit, value, arm=one.arm, key=key), OUTCOME_S)
            return {"unit": one.unit, "status": "counted" if new else "duplicate", "experiment": x.name}
        except PatchbayError as e:
            said = values.get("unit") if isinstance(values, dict) else None
            return {"unit": said, "status": "refused", "code": e.status, "error": plain(str(e)), "raised": e}

    def _experiment(self, name: str | None) -> experiments.Experiment:
        """Return the experiment of this name, live or ended; None: the live one. Raises NotFound."""
        x = self.table().experiment
        if x is not None and name in (None, x.name):
            return x
        if name is not None and self.runtime.ledger is not None:  # outcomes may arrive after the experiment has ended
            for entry in self.runtime.ledger.history(self.runtime.settings.system, 1000):
                if entry.experiment and entry.experiment["name"] == name:
                    return experiments.load(entry.experiment)
        raise NotFound(f"There is no {'live experiment' if name is None else f'experiment {name!r}'} here.")

    async def explore(self, request: Request, body: Edit) -> Response:
        """Make an edit of a served arm, and serve it by its digest (POST /v1/edits)."""
        return await explore(self, request, body)

    async def live(self, request: Request, _: None) -> Response:
        """Return the live experiment's estimates and decision."""
        del request
        x, events = self.table().experiment, self.runtime.events
        if x is None or events is None:
            return answer({"experiment": None})
        decision = experiments.judge(x, await asyncio.to_thread(events.summary, x))
        shadows = {"dropped": self.runtime.counts.shadows_dropped, "kept": len(self.shadows)}
        about = {k: v for k, v in experiments.plain(x).items() if k != "salt"}  # it would reveal units' arms
        return answer({**decision.evidence(), "experiment": about, "shadows": shadows})

    async def shadow_answers(self, request: Request, _: None) -> Response:
        """Return both answers of the tenant's recent shadow requests, for scoring."""
        owner = request.state.token.tenant
        own = {k: v for k, v in self.shadows.items() if v["owner"] == owner}
        return answer({"shadows": [{"request": k, **v} for k, v in own.items()]})

    # ---- about the service ---------------------------------------------------------------------------------------

    async def models(self, request: Request, _: None) -> Response:
        """List what `model` may name, in OpenAI's format."""
        del request
        table = self.table()
        names = ["auto", "base", "champion", *(["challenger"] if table.challenger else [])]
        names += [f"sha256:{d}" for d in sorted(table.loaded)]
        made = [{"id": n, "object": "model", "created": self.created, "owned_by": "patchbay"} for n in names]
        about = {**facts(table, None), "judge": self.runtime.judging or None, "warning": plain(self.runtime.warning)}
        return answer({"object": "list", "data": made, "patchbay": about})

    async def model_of(self, request: Request, _: None) -> Response:
        """Describe one model, by any name that a request's `model` may have. Raises NotFound naming those there are."""
        name = request.path_params["model"]
        table = self.table()
        choice = choose(table, name, None, request.state.token.tenant, "compare" in request.state.token.scopes)
        made = {"id": name, "object": "model", "created": self.created, "owned_by": "patchbay"}
        return answer({**made, "patchbay": facts(table, choice)})

    async def health(self, request: Request, _: None) -> Response:
        """Answer 200 if requests may be sent, as other OpenAI-compatible servers do."""
        del request
        why = self.runtime.ill()
        return (
            answer({"status": "ill", "why": plain(why)}, 503, {"retry-after": "2"}) if why else answer({"status": "ok"})
        )

    async def ready(self, request: Request, _: None) -> Response:
        """Answer readiness probes: 200, or 503 with the reason."""
        del request
        if why := self.runtime.ill():
            return answer({"ready": False, "why": plain(why)}, 503, {"retry-after": "2"})
        out = {"ready": True, **facts(self.table(), None), "judge": self.runtime.judging or None}
        return answer({**out, "warning": warning} if (warning := plain(self.runtime.warning)) else out)

    async def live_probe(self, request: Request, _: None) -> Response:
        """Answer liveness probes: 503 if only a new process can help."""
        del request
        why = self.runtime.dead()
        return PlainTextResponse(f"{why}\n" if why else "ok\n", 503 if why else 200)

    async def metrics(self, request: Request, _: None) -> Response:
        """Return counters, histograms and gauges in the format of Prometheus that the caller accepts."""
        r, table = self.runtime, self.runtime.table
        r.counts.gauges = {"queue_rows": r.queued, "warnings": len(r.warnings), "ill": int(bool(r.ill()))}
        if table is not None:
            roles = {BASE: BASE, "champion": table.champion, "challenger": table.challenger}
            if (x := table.experiment) is not None:
                roles |= {CONTROL: x.control, TREATMENT: x.treatment}
            r.counts.roles = {role: digest for role, digest in roles.items() if digest}
        body, kind = r.counts.text(request.headers.get("accept", ""))
        return Response(body, media_type=kind)

    async def playground(self, request: Request, _: None) -> Response:
        del request
        return playground.page()

    async def openapi(self, request: Request, _: None) -> Response:
        del request
        return answer(openapi(self.routes, self.title))


def facts(table: Table, choice: Choice | None) -> dict[str, Any]:
    """Return what an answer says about who gave it (base, arm, unit); without a choice, everything that is served."""
    out: dict[str, Any] = {"system": table.system, "base": f"{table.base}@{table.base_digest}"}
    if choice is None:
        x = table.experiment
        more = {"champion": table.champion, "challenger": table.challenger, "experiment": x.name if x else None}
        return {**out, **more, "loaded": sorted(table.loaded), "memory": dict(table.memory)}
    label, digest = choice.shown
    out |= {"arm": label, "patch": digest, "unit": choice.unit}
    return out | {"experiment": choice.experiment.name if choice.experiment else None}


def headers(table: Table, choice: Choice) -> dict[str, str]:
    """Return the response headers that say which base, arm and unit gave an answer."""
    label, digest = choice.shown
    out = {"x-patchbay-arm": label, "x-patchbay-patch": digest, "x-patchbay-base": table.base_digest}
    if choice.experiment is not None:
        out |= {"x-patchbay-experiment": choice.experiment.name, "x-patchbay-unit": choice.unit or ""}
    return out


# ---- the application ---------------------------------------------------------------------------------------------

ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/outcomes", Desk.outcomes, "outcomes", Outcomes),
    Call("POST", "/v1/edits", Desk.explore, "explore", Edit),
    Call("GET", "/v1/models", Desk.models, ANY),
    Call("GET", "/v1/models/{model:path}", Desk.model_of, ANY),
    Call("GET", "/health", Desk.health),
    Call("GET", "/v1/experiments/live", Desk.live, "outcomes"),
    Call("GET", "/v1/shadows", Desk.shadow_answers, "compare"),
    Call("GET", "/metrics", Desk.metrics, "metrics"),
    Call("GET", "/readyz", Desk.ready),
    Call("GET", "/livez", Desk.live_probe),
    Call("GET", "/openapi.json", Desk.openapi),
    Call("GET", "/docs.json", Desk.openapi),
    Call("GET", "/", Desk.playground),
    *oip.ROUTES,
)

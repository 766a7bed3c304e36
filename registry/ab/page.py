"""An experiment on one HTML page that needs nothing else: no script, no font, no address; figures lie in it.

What it says is the ledger's, the event log's and what the caller gives; everything from outside is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.ab.experiment import Decision, Experiment, Guardrail, Result
from registry.ab.ledger import Entry
from registry.ab.several import Adjusted, discoveries

MAX_PICTURE_BYTES = 4 << 20
KINDS = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --good: #1a7f37; --bad: #b42318; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.verdict { font-size: 1.25rem; } .quiet { color: var(--quiet); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } code { font-size: .88em; overflow-wrap: anywhere; } img { max-width: 100%; height: auto; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } pre { white-space: pre-wrap; margin: .2rem 0 1rem; }
figure { margin: 0; } .wide { overflow-x: auto; } .plot { background: #fff; }
"""


def page(
    experiment: Experiment,
    decision: Decision,
    figure: Any,
    entries: Sequence[Entry],
    *,
    examples: Sequence[tuple[str, Any, Any]] = (),
    metrics: Mapping[str, Result] | None = None,
    cuped: Adjusted | None = None,
    now: float | None = None,
) -> str:
    """The page.

    figure: matplotlib Figure of the interval over time. entries: of the ledger, newest first. examples: (what was asked
    or drawn, the control's, the treatment's), each text or an image file. metrics: of all metrics,
    where there are several (`several.compared`). cuped: the effect adjusted for a covariate. now: unix seconds.
    """
    x, r, s = experiment, decision.result, decision.summary
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    good = {"better": "good", "worse": "bad"}.get(r.verdict, "")
    sides = [
        ("control", x.control, s.control, r.mean_control),
        ("treatment", x.treatment, s.treatment, r.mean_treatment),
    ]
    arms = [
        (name, _code(digest), f"{a.units:,}", f"{a.calls:,}", f"{a.errors:,}", f"{a.n:,}", f"{mean:.4g}")
        for name, digest, a, mean in sides
    ]
    parts = [
        f"<h1>{_e(x.name)}</h1>",
        f'<p class="quiet">{_e(x.system)}, {_e(x.mode)}, {x.share:.0%} treated; written {_when(now or time.time())} UTC</p>',
        f'<p class="verdict {good}"><strong>{_e(r.verdict.replace("_", " "))}</strong>: {_e(decision.action)}, {_e(decision.why)}</p>',
        f"<p>Effect on <em>{_e(x.metric)}</em> (treatment minus control, positive is better): <strong>{r.effect:+.4g}</strong>, "
        f"{1 - x.alpha:.0%} interval valid at any time [{_n(r.low)}, {_n(r.high)}], e-value {r.e_value:.3g} "
        f"(decides at {1 / x.alpha:g}).</p>",
        "<h2>As one would have seen it</h2>", f'<img class="plot" alt="Effect and its interval over time" src="{_data(picture.getvalue(), "image/png")}">',
        "<h2>Arms</h2>", _table(("arm", "artifact", "units", "calls", "errors", "with outcome", "mean"), arms),
        "<h2>Guardrails</h2>",
        _table(("what must not get worse", "limit", "error rate", "now"), [_guard(g, decision.guardrails) for g in x.guardrails]),
    ]  # fmt: skip
    if cuped is not None:
        parts.append(
            f"<p>Adjusted for what was known before: {cuped.effect:+.4g} [{_n(cuped.low)}, {_n(cuped.high)}], n = {cuped.n:,}; the "
            f"covariate takes {cuped.gain:.0%} of the variance.</p>"
        )
    if metrics and len(metrics) > 1:
        parts += ["<h2>All metrics, with one correction</h2>", _several(x, metrics)]
    if examples:
        parts += [
            "<h2>Both arms' examples</h2>",
            '<div class="both"><strong>control</strong><strong>treatment</strong></div>',
        ]
        for asked, control, treatment in examples:
            both = "".join(f"<figure>{_shown(one)}</figure>" for one in (control, treatment))
            parts.append(f'<p class="quiet">{_e(asked)}</p><div class="both">{both}</div>')
    parts += [
        "<h2>Ledger</h2>",
        _table(("when (UTC)", "action", "who", "champion", "challenger", "why", "hash"),
               [(_when(e.at), _e(e.action), _e(e.who), _code(e.champion), _code(e.challenger or "-"), _e(_why(e)),
                 f"<code>{_e(e.hash[:12])}</code>") for e in entries]),
        f"<p class=\"quiet\">Seen by share of units: {_e(', '.join(f'{k:g}: {c} and {t}' for k, (c, t) in s.ratio.items()) or 'none')}; "
        f"{s.crossovers} units in both arms, {s.uncounted} left out, {s.tokens} tenants.</p>",
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(x.name)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _several(x: Experiment, every: Mapping[str, Result]) -> str:
    found = discoveries({name: r.e_value for name, r in every.items()}, x.alpha)
    less = {m.name for m in x.also if m.better == "lower"} | ({x.metric} if x.better == "lower" else set())
    rows = [
        (_e(name) + (' <span class="quiet">(less is better)</span>' if name in less else ""), f"{r.effect:+.4g}", f"[{_n(r.low)}, {_n(r.high)}]", f"{r.e_value:.3g}",
         "differs" if name in found else "nothing sure")
        for name, r in every.items()
    ]  # fmt: skip
    return _table(("metric", "effect (positive is better)", "interval", "e-value", "after the correction"), rows) + (
        f'<p class="quiet">e-BH over {len(every)} metrics: of those said to differ, at most {x.alpha:.0%} are expected not '
        f"to, whatever depends on what and whenever one looks. Intervals hold together ({1 - x.alpha:.0%}, Bonferroni).</p>"
    )


def _guard(g: Guardrail, now: Mapping[str, str]) -> tuple[str, ...]:
    said = now.get(g.metric, "-")
    return (
        _e(g.metric),
        f"{g.limit:g}",
        f"{g.alpha:g}",
        f'<span class="{"good" if said == "ok" else "bad"}">{_e(said)}</span>',
    )


def _shown(one: Any) -> str:
    """Text, or an image file inlined; one that is too large or of another kind is named."""
    if isinstance(one, Path):
        kind = KINDS.get(one.suffix.lower())
        if kind is None or one.stat().st_size > MAX_PICTURE_BYTES:
            return f'<p class="quiet">{_e(one.name)} is no picture that fits on a page.</p>'
        return f'<img alt="{_e(one.stem)}" src="{_data(one.read_bytes(), kind)}">'
    return f"<pre>{_e(str(one))}</pre>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """head: text. rows: HTML."""
    top = "".join(f"<th>{_e(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{top}</tr>' + "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    ) + "</table></div>"  # fmt: skip


def _why(e: Entry) -> str:
    evidence = e.evidence or {}
    if "forced" in evidence:
        return f"forced: {evidence['forced']}"
    if isinstance(evidence.get("gate"), dict):
        return f"gate {evidence['gate'].get('status')}"
    if isinstance(evidence.get("signature"), dict):
        return f"signed with {evidence['signature'].get('key')}"
    return str(evidence.get("why") or "")


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _code(digest: str) -> str:
    return f'<code title="{_e(digest)}">{_e(digest[:16])}</code>'


def _n(x: float) -> str:
    return f"{x:.4g}" if abs(x) < 1e300 else "unknown"


def _data(raw: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))

// ---- panel: the live experiment ------------------------------------------------------------------------------------

const EXPERIMENT = {
  needs: ["GET /v1/experiments/live", "POST /v1/outcomes"],
  mount() {
    const state = h("span", { class: "small quiet" }, "asking …");
    const note = h("div");
    const [head, figure, rest] = ["div", "figure", "div"].map((tag) => h(tag, { class: "stack" }));
    let live = null;
    let seen = "";
    let asked = null;

    const up = h("button", { type: "button", disabled: true, "aria-label": "Good answer", onclick: () => judge(true) }, thumb(0), "Good");
    const down = h("button", { type: "button", disabled: true, "aria-label": "Bad answer", onclick: () => judge(false) }, thumb(180), "Bad");
    const about = h("span", { class: "small quiet" });
    const said = h("span", { class: "small", role: "status" });
    const judging = h("div", { class: "row judge" }, h("h3", {}, "Judge the last auto answer"), up, down, about, said);
    about.textContent = "Choose the arm auto on either side and run: the service assigns it, and you say how it was.";
    const parts = h("div", { class: "live", hidden: true }, head, figure, rest, judging);

    service.hear("answered", (answer) => {
      asked = answer;
      up.disabled = down.disabled = false;
      said.replaceChildren();
      about.replaceChildren(`${answer.side} side, unit `, h("code", {}, answer.unit));
    });
    async function judge(good) {
      const x = live.experiment;
      const outcome = { unit: asked.unit, value: good === (x.better === "higher") ? x.high : x.low, experiment: asked.experiment, key: asked.request };
      if (x.mode === "shadow") outcome.arm = "control"; // the answer that was shown
      try {
        const done = await (await call("POST /v1/outcomes", { body: outcome })).json();
        said.textContent = done.status === "duplicate" ? "This answer has been judged already." : `${good ? "Good" : "Bad"}: ${done.status}.`;
        now();
      } catch (error) {
        said.replaceChildren(trouble(error));
      }
    }

    function show() {
      const { experiment: x, result: r, summary: s } = live;
      const rows = ["control", "treatment"].map((arm) => h("tr", {},
        h("th", { scope: "row" }, arm), h("td", {}, patchName(x[arm])),
        [s[arm].units, s[arm].calls, s[arm].errors].map((n) => h("td", {}, whole.format(n))),
        h("td", {}, whole.format(r[`n_${arm}`]) + (r[`n_${arm}`] < x.min_n ? ` of ${whole.format(x.min_n)} needed` : "")),
        h("td", {}, r[`n_${arm}`] ? r[`mean_${arm}`].toFixed(3) : "–")));
      const verdict = r.verdict.replaceAll("_", " ");
      const tone = { better: "good", not_inferior: "good", worse: "bad", sample_ratio_mismatch: "bad" }[r.verdict] ?? "";
      const sure = Math.abs(r.low) < 1e300;
      head.replaceChildren(
        h("div", { class: "row" }, h("code", {}, x.name), h("span", { class: "chip" }, x.mode), h("span", { class: "chip" }, `${+(100 * x.share).toFixed(2)} % treated`),
          h("span", { class: "chip" }, `${x.metric}, ${x.better} is better`)),
        h("div", { class: "effect" }, h("b", {}, r.n_control && r.n_treatment ? signed(r.effect) : "–"),
          h("span", { class: "quiet" }, sure ? `effect on ${x.metric}, always-valid ${+(100 * (1 - x.alpha)).toFixed(2)} % interval [${signed(r.low)}, ${signed(r.high)}]` : `effect on ${x.metric}; too few outcomes for an interval`),
          h("span", { class: `chip ${tone}` }, verdict)));
      rest.replaceChildren(
        h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Numbers of both arms" }, h("table", {},
          h("thead", {}, h("tr", {}, ["arm", "patch", "units", "calls", "errors", "outcomes", "mean"].map((t) => h("th", { scope: "col" }, t)))),
          h("tbody", {}, rows))),
        h("div", { class: "row" }, h("h3", {}, "Guardrails"), Object.entries(live.guardrails).map(([metric, is]) =>
          h("span", { class: `chip ${is === "ok" ? "good" : "bad"}` }, `${is === "ok" ? "✓" : "✕"} ${metric.replaceAll("_", " ")}: ${is}`))),
        h("p", { class: "small quiet" }, `Decision now: ${live.action}, ${live.why}. Evidence against no difference: e = ${r.e_value.toPrecision(3)}; ${Math.round(1 / x.alpha)} decides.`));
      draw();
    }

    /** The effect with its interval on an axis whose ends are round. */
    function draw() {
      const width = figure.clientWidth;
      if (!live?.experiment || !width) return;
      const { experiment: x, result: r } = live;
      const sure = Math.abs(r.low) < 1e300;
      const span = x.high - x.low;
      const far = Math.max(sure ? Math.max(Math.abs(r.low), Math.abs(r.high)) : span, Math.abs(r.effect), 1.5 * x.margin);
      const end = span * ([0.02, 0.05, 0.1, 0.2, 0.5].find((step) => far <= step * span) ?? 1);
      const at = (v) => 24 + (width - 48) * (Math.max(-end, Math.min(end, v)) + end) / (2 * end);
      const line = (v, from, to, kind) => h("svg:line", { x1: at(v), x2: at(v), y1: from, y2: to, class: kind });
      const text = (v, y, words, anchor = "middle") => h("svg:text", { x: at(v), y, "text-anchor": anchor }, words);
      const [low, high] = sure ? [r.low, r.high] : [-end, end];
      figure.replaceChildren(h("svg:svg", { viewBox: `0 0 ${width} 92`, role: "img", "aria-label": sure ? `Effect ${signed(r.effect)}, interval ${signed(r.low)} to ${signed(r.high)}` : "No interval yet" },
        text(-end, 12, "◂ treatment worse", "start"), text(end, 12, "treatment better ▸", "end"),
        h("svg:line", { x1: at(-end), x2: at(end), y1: 66, y2: 66, class: "axis" }),
        [-1, -0.5, 0, 0.5, 1].map((k) => [line(k * end, 62, 70, "axis"), text(k * end, 86, k ? signed(k * end, end < 0.1 ? 3 : 2) : "0")]),
        line(0, 20, 66, "zero"),
        x.margin > 0 && [line(-x.margin, 20, 66, "margin")],
        h("svg:rect", { x: at(low), width: Math.max(2, at(high) - at(low)), y: 32, height: 20, rx: 4, class: sure ? "bar" : "bar open" }),
        r.n_control && r.n_treatment ? h("svg:circle", { cx: at(r.effect), cy: 42, r: 7, class: "point" }) : null));
    }
    new ResizeObserver(draw).observe(figure);

    const now = every(2000, async () => {
      if (!service.facts) return;
      try {
        const got = await (await call("GET /v1/experiments/live")).json();
        const news = JSON.stringify(got);
        if (news === seen) return; // what somebody is selecting or focusing stays
        seen = news;
        if (got.experiment) live = got;
        parts.hidden = !live;
        state.textContent = got.experiment ? "live, every 2 s" : live ? `${live.experiment.name} has ended; its last numbers` : "none is live";
        note.replaceChildren(...(live ? [] : [h("p", { class: "quiet" }, "No experiment is live. Begin one, with a tenth of the units on the challenger: ",
          h("code", {}, `patchbay split ${service.facts.system} 0.1`))]));
        if (got.experiment) show();
      } catch (error) {
        if (seen !== error.message) note.replaceChildren(trouble(error));
        seen = error.message;
        state.textContent = "no numbers";
        throw error;
      }
    });
    service.hear("again", now);
    service.hear("facts", now);
    return h("section", { class: "card", "aria-labelledby": "experiment" }, h("header", {}, h("h2", { id: "experiment" }, "Experiment"), state), note, parts);
  },
};

// ---- panels: a caption that is searched for ----------------------------------------------------------------------------

/** A score over rounds as a small curve. */
function climbing(curve) {
  const [w, y] = [320, 80];
  const [low, high] = [Math.min(...curve), Math.max(...curve)];
  const canvas = h("canvas", { width: w, height: y, role: "img", "aria-label": `Best score by round, from ${low.toFixed(3)} to ${high.toFixed(3)}` });
  const pen = canvas.getContext("2d");
  pen.strokeStyle = "teal";
  pen.lineWidth = 2;
  curve.forEach((score, i) => {
    const at = [8 + (i * (w - 16)) / Math.max(1, curve.length - 1), y - 8 - ((score - low) / (high - low || 1)) * (y - 16)];
    if (i) pen.lineTo(...at);
    else pen.moveTo(...at);
  });
  pen.stroke();
  return canvas;
}

/** Candidates, best first, with their scores and the rounds they came in. */
const ladder = (list) => h("ol", {}, list.map((one) => h("li", {}, one.text, " ", h("span", { class: "small quiet" }, `${one.score.toFixed(3)}, round ${one.step}`))));

const CAPTION = {
  needs: ["POST /v1/captions", "GET /v1/jobs/{id}"],
  mount() {
    const arm = armsThat((id) => id !== "auto");
    const picture = picking(arm, () => {}, [EXAMPLE]);
    const steps = h("input", { type: "number", min: 0, max: 100, placeholder: "as configured" });
    const shown = h("div", { class: "stack told" });
    const run = h("button", { class: "main" }, "Search");
    const stop = h("button", { type: "button", disabled: true }, "Stop");
    let job = null;

    function show({ state, progress, best, result, error }, curve) {
      if (error) return [trouble(new Refused(error.message))];
      const text = result?.text ?? best?.text ?? "The bank is being read";
      const score = result?.score ?? best?.score;
      const sides = [h("p", {}, h("strong", {}, text), score === undefined ? "" : ` ${score.toFixed(3)}`)];
      if (result?.base) sides.push(h("p", { class: "small quiet" }, `The base, the best line of the bank: ${result.base.text} ${result.base.score.toFixed(3)}`));
      if (curve.length > 1) sides.push(climbing(curve));
      const candidates = result?.candidates ?? best?.candidates;
      if (candidates) sides.push(ladder(candidates));
      return [...sides, h("p", { class: "small quiet" }, result ? `${result.calls} texts scored, ended by ${result.why}` : `${state}, ${Math.round(100 * (progress ?? 0))} %`)];
    }
    async function search() {
      const budget = Number.isNaN(steps.valueAsNumber) ? {} : { steps: steps.valueAsNumber };
      const model = arm.value;
      job = await json("POST /v1/captions", { body: { image: picture.data(), model, budget, patchbay: { compare: model !== "base" } } });
      stop.disabled = false;
      const curve = [];
      while (["queued", "running"].includes(job.state)) {
        await new Promise((done) => { setTimeout(done, 300); });
        job = await json("GET /v1/jobs/{id}", { at: { id: job.id } });
        if (job.best && curve.at(-1) !== job.best.score) curve.push(job.best.score);
        shown.replaceChildren(...show(job, curve));
      }
      return show(job, job.result?.curve ?? curve);
    }
    stop.addEventListener("click", async () => {
      stop.disabled = true;
      if (job) await call("DELETE /v1/jobs/{id}", { at: { id: job.id } }).catch(() => null);
    });
    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, picture.el,
        h("div", { class: "stack" }, picture.fields, h("div", { class: "pair" }, field("Arm", arm), field("Rounds", steps)))),
      h("div", { class: "run" }, run, stop));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      await fill(shown, search);
      run.disabled = false;
      stop.disabled = true;
    });
    return h("section", { class: "card", "aria-labelledby": "caption" },
      h("header", {}, h("h2", { id: "caption" }, "A caption that is searched for"),
        h("p", { class: "small quiet" }, "A generator proposes, a scorer ranks; the base takes the best line of its bank")), form, shown);
  },
};

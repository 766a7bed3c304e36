// ---- panel: a clip, base beside checkpoint: scores, reconstruction, rollout, surprise -------------------------------

const VIDEO = {
  needs: ["POST /v1/video", "GET /v1/video", "GET /v1/models"],
  mount() {
    const arm = armsThat((id) => id !== "base");
    const file = h("input", { type: "file", accept: "video/*,image/gif,image/webp,.zip" });
    const motion = h("select", {}, ["right", "left", "up", "down", "grow", "spin", "still"].map((m) => h("option", { value: m }, m)));
    const ratio = h("input", { type: "range", min: 0.25, max: 0.9, step: 0.05, value: 0.75 });
    const ratioSays = h("output", { class: "small" });
    const run = h("button", { class: "main" }, "Ask both");
    const says = h("output", { class: "quiet", "aria-live": "polite" });
    const failed = h("div", { hidden: true });
    const canvas = h("canvas", { width: 96, height: 96, role: "img", "aria-label": "The clip that is drawn here" });
    const columns = ["base", "patched"].map((name) => {
      const who = h("div", { class: "who quiet" }, name === "base" ? "The base." : "The checkpoint.");
      const said = h("div", { class: "stack" }, h("p", { class: "quiet" }, "Not asked yet."));
      return { who, said, el: h("article", { class: `side ${name}`, "aria-label": `${name} answer` }, who, said) };
    });
    const LENGTH = 16;

    function draw(t) { // t from 0 to 1: a square on sand that moves as the list says
      const pen = canvas.getContext("2d");
      const at = { right: [20 + 56 * t, 48], left: [76 - 56 * t, 48], up: [48, 76 - 56 * t], down: [48, 20 + 56 * t] }[motion.value] ?? [48, 48];
      const side = motion.value === "grow" ? 16 + 30 * t : 28;
      pen.fillStyle = "#d9c9a3";
      pen.fillRect(0, 0, 96, 96);
      pen.save();
      pen.translate(...at);
      if (motion.value === "spin") pen.rotate(1.6 * Math.PI * t);
      pen.fillStyle = "#c23b4e";
      pen.fillRect(-side / 2, -side / 2, side, side);
      pen.fillStyle = "#2f6f9f";
      pen.fillRect(-side / 2, -side / 2, side, side / 3);
      pen.restore();
    }
    const frames = () => Array.from({ length: LENGTH }, (_, i) => { draw(i / (LENGTH - 1)); return canvas.toDataURL("image/png"); });
    const showRatio = () => { ratioSays.textContent = `${(100 * ratio.valueAsNumber).toFixed(0)} % hidden`; };
    ratio.addEventListener("input", showRatio);
    motion.addEventListener("change", () => { file.value = ""; draw(0.5); });
    showRatio();
    draw(0.5);

    async function clip() {
      if (!file.files.length) return { frames: frames() };
      const url = await new Promise((done, refuse) => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result);
        reader.onerror = () => refuse(new Refused("This file cannot be read."));
        reader.readAsDataURL(file.files[0]);
      });
      return { data: url };
    }

    const film = (data, words) => h("figure", { class: "map" }, h("img", { src: `data:image/webp;base64,${data}`, alt: words }), h("figcaption", { class: "small quiet" }, words));
    const still = (data, words) => h("figure", { class: "map" }, h("img", { src: `data:image/png;base64,${data}`, alt: words }), h("figcaption", { class: "small quiet" }, words));

    function show(column, label, patch, one) {
      column.who.classList.remove("quiet");
      column.who.replaceChildren(...whoSays(label, patch));
      const parts = [];
      if (one.scores) parts.push(h("div", { class: "scores" }, one.scores.map((s, i) => scored(s.label, s.probability, 1, `${(100 * s.probability).toFixed(1)} %`, i ? "" : "best"))));
      if (one.reconstruction) parts.push(still(one.reconstruction.strip, `The clip, what the model saw, what it made of it; squared error ${one.reconstruction.error.toFixed(4)}. Borrowed from the clip: ${one.reconstruction.borrows}.`));
      if (one.rollout) parts.push(film(one.rollout.animation, `Left what happened, right what the model expects after ${one.rollout.given} frames (red line).`));
      if (one.surprise) {
        const most = Math.max(...one.surprise.by_frame);
        parts.push(h("p", { class: "small quiet" }, `Surprise by frame, in ${one.surprise.unit}:`),
          h("div", { class: "scores" }, one.surprise.by_frame.map((x, i) => scored(`frame ${i + 1}`, x, most, x.toPrecision(3)))));
      }
      column.said.replaceChildren(...parts);
    }

    /** Ask for all that this arm can do: a model of tokens rolls out, a masked one reconstructs. */
    async function ask(one, model) {
      const can = new Set((await json("GET /v1/video", { query: { model } })).wants);
      const wants = ["scores", "surprise", can.has("reconstruction") ? "reconstruction" : "rollout"].filter((w) => can.has(w));
      return call("POST /v1/video", { body: { clips: [one], wants: wants.length ? wants : ["features"], model, ratio: ratio.valueAsNumber, expected: true } });
    }

    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, h("div", { class: "stack" }, canvas),
        h("div", { class: "stack" }, field("A drawn clip that moves", motion), field("Your own clip", file),
          h("div", { class: "pair" }, field("Checkpoint", arm), field("Hidden from a masked model", ratio, ratioSays)))),
      h("div", { class: "run" }, run, says));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      says.textContent = "asking …";
      failed.hidden = true;
      try {
        const one = await clip();
        const [base, patched] = await Promise.all([ask(one, "base"), ask(one, arm.value)]);
        const [{ results: [a] }, { results: [b] }] = [await base.json(), await patched.json()];
        for (const got of [a, b]) if (got.error) throw new Refused(got.error.message);
        show(columns[0], "base", "base", a);
        show(columns[1], b.arm, b.patch, b);
        says.textContent = a.label === b.label ? `Both say ${a.label ?? "nothing"}.` : `The base says ${a.label}, the checkpoint ${b.label}.`;
        const experiment = patched.headers.get("x-patchbay-experiment");
        if (experiment) service.tell("answered", { side: "Checkpoint", experiment, unit: patched.headers.get("x-patchbay-unit"), request: patched.headers.get("x-patchbay-request") });
      } catch (error) {
        says.textContent = "Refused.";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
      run.disabled = false;
    });
    return h("section", { class: "card", "aria-labelledby": "video" },
      h("header", {}, h("h2", { id: "video" }, "A clip"), h("p", { class: "small quiet" }, "One clip, base and checkpoint, each its own model")),
      form, failed, h("div", { class: "sides" }, columns.map((c) => c.el)));
  },
};

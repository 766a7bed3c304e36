// ---- panel: a picture against words, base beside patched -------------------------------------------------------------

const CLASSIFY = {
  needs: ["POST /v1/classify", "GET /v1/models"],
  mount() {
    const labels = h("textarea", { rows: 4, spellcheck: "false" });
    labels.value = "cat, dog, bird, fish, apple, pizza, car, tree";
    const arm = armsThat((id) => id !== "base");
    const picture = picking(arm, (data) => {
      const named = [...new Set(data.flatMap((one) => (one.base ? [one.is, one.base, one.patched] : [])))];
      if (named.length > 1) labels.value = named.join(", ");
    });
    const strength = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 1 });
    const strengthSays = h("output", { class: "small" });
    const run = h("button", { class: "main" }, "Ask both");
    const says = h("output", { class: "quiet", "aria-live": "polite" });
    const failed = h("div", { hidden: true });
    const columns = ["base", "patched"].map((name) => {
      const who = h("div", { class: "who quiet" }, name === "base" ? "The base." : "The patched model.");
      const scores = h("div", { class: "scores" }, h("p", { class: "quiet" }, "Not asked yet."));
      return { who, scores, el: h("article", { class: `side ${name}`, "aria-label": `${name} answer` }, who, scores) };
    });
    const dictionary = h("div", { class: "stack more", hidden: true });
    let experiment = null;

    const showStrength = () => { strengthSays.textContent = strength.valueAsNumber.toFixed(2); };
    strength.addEventListener("input", showStrength);
    showStrength();

    function show(column, label, patch, scores) {
      column.who.classList.remove("quiet");
      column.who.replaceChildren(...whoSays(label, patch));
      column.scores.replaceChildren(...scores.map((s, i) => h("div", { class: !i && "best" },
        h("span", { title: s.label }, s.label), h("progress", { value: s.probability, max: 1, "aria-label": s.label }), h("span", {}, `${(100 * s.probability).toFixed(1)} %`))));
    }

    async function features(data) {
      if (!service.offers.has("POST /v1/explain/encode")) return;
      try {
        const got = await json("POST /v1/explain/encode", { body: { image: { data }, model: readerOf(arm), top: 12 } });
        const card = h("div", { class: "stack" });
        const buttons = got.features.map((f) => h("button", { type: "button", "aria-pressed": "false", onclick: (event) => open(f.feature, event.currentTarget) },
          `${f.feature} `, h("span", { class: "quiet small" }, (f.words ?? []).join(", ")), " ", f.edited && h("span", { class: "chip warn" }, f.about ? `${f.about}, edited` : "edited")));
        const open = async (feature, button) => {
          for (const b of buttons) b.setAttribute("aria-pressed", String(b === button));
          try {
            const one = await json("GET /v1/explain/features/{feature}", { at: { feature }, query: { model: readerOf(arm) } });
            card.replaceChildren(h("p", { class: "small quiet" }, `Feature ${feature} fires on ${(100 * one.density).toFixed(2)} % of tokens, at most ${one.largest.toFixed(2)}. Nearest words: ${one.words.map((w) => w.word).join(", ")}. It fires most on:`),
              h("div", { class: "seen" }, one.pictures.map((p) => h("img", { src: p.png, alt: `activation ${p.activation.toFixed(2)}` }))));
          } catch (error) {
            card.replaceChildren(trouble(error));
          }
        };
        dictionary.replaceChildren(h("h3", {}, "What the patch’s dictionary sees here"),
          h("p", { class: "small quiet" }, `${got.l0.toFixed(0)} of ${whole.format(got.dictionary)} features fire per token and explain ${(100 * got.explained_variance).toFixed(0)} % of the variance. The strongest:`),
          h("div", { class: "row features" }, buttons), card);
        dictionary.hidden = false;
      } catch (error) {
        dictionary.hidden = error.status === 404;
        dictionary.replaceChildren(trouble(error));
      }
    }

    const form = h("form", { novalidate: true },
      h("div", { class: "look" },
        picture.el,
        h("div", { class: "stack" }, picture.fields,
          field("Labels, with commas between", labels),
          h("div", { class: "pair" }, field("Patched arm", arm), field("Strength of the patch", strength, strengthSays)))),
      h("div", { class: "run" }, run, says));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      says.textContent = "asking …";
      failed.hidden = true;
      try {
        const data = picture.data();
        const words = labels.value.split(/[,\n]/).map((word) => word.trim()).filter(Boolean);
        const look = {
          images: [{ data }],
          labels: words,
          top: Math.max(1, Math.min(6, words.length)),
          model: arm.value,
          patchbay: { strength: strength.valueAsNumber, compare: true },
        };
        const response = await call("POST /v1/classify", { body: look });
        const { results: [one], warnings } = await response.json();
        show(columns[0], "base", "base", one.base.scores);
        show(columns[1], one.arm, one.patch, one.scores);
        says.textContent = one.base.label === one.label ? `Both say ${one.label}.` : `The base says ${one.base.label}, the patched model ${one.label}.`;
        if (warnings?.length) {  // words the base never learned
          failed.replaceChildren(...warnings.map((text) => h("p", { class: "small" }, text)));
          failed.hidden = false;
        }
        experiment = response.headers.get("x-patchbay-experiment");
        if (experiment) service.tell("answered", { side: "Patched", experiment, unit: response.headers.get("x-patchbay-unit"), request: response.headers.get("x-patchbay-request") });
        await features(data);
      } catch (error) {
        says.textContent = "Refused.";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
      run.disabled = false;
    });
    return h("section", { class: "card", "aria-labelledby": "classify" },
      h("header", {}, h("h2", { id: "classify" }, "A picture against words"), h("p", { class: "small quiet" }, "One picture, base and patched, in one batch")),
      form, failed, h("div", { class: "sides" }, columns.map((c) => c.el)), dictionary);
  },
};

// ---- panel: what a model says it sees, with what it invents erased -----------------------------------------------------

const SEE = {
  needs: ["POST /v1/chat/completions", "GET /v1/generate", "GET /v1/models"],
  mount() {
    const arm = armsThat((id) => id !== "base" && id !== "auto");
    const side = 320;
    const canvas = h("canvas", { width: side, height: side, role: "img", "aria-label": "The picture that is asked about" });
    const file = h("input", { type: "file", accept: "image/*" });
    const thumbs = h("div", { class: "seen" });
    const question = h("input", { value: "Describe the picture.", maxlength: 400, autocomplete: "off" });
    const list = h("input", { maxlength: 400, autocomplete: "off", spellcheck: "false", placeholder: "egg, cheese wedge; empty: what the picture does not show" });
    const strength = h("input", { type: "range", min: 0, max: 2, step: 0.1, value: 1 });
    const strengthSays = h("output", { class: "small" });
    const run = h("button", { class: "main" }, "Ask both");
    const says = h("output", { class: "quiet", "aria-live": "polite" });
    const failed = h("div", { hidden: true });
    const sides = ["base", "patched"].map((name) => {
      const text = h("p", { class: "quiet" }, "Not asked yet.");
      return { text, el: h("article", { class: `side ${name}`, "aria-label": `${name} answer` }, h("div", { class: "who" }, name === "base" ? "The base" : "With the erasure"), text) };
    });
    const found = h("div", { class: "scores", hidden: true });
    const card = h("section", { class: "card", "aria-labelledby": "see", hidden: true });
    let picture = null;
    let sealed = null; // an example as it was sealed: asked as it is, not as the canvas shows it

    const showStrength = () => { strengthSays.textContent = strength.valueAsNumber.toFixed(1); };
    strength.addEventListener("input", showStrength);
    strength.addEventListener("change", () => { if (found.childElementCount) form.requestSubmit(); });
    showStrength();

    function draw(over) {
      const pen = canvas.getContext("2d");
      pen.fillStyle = "white";
      pen.fillRect(0, 0, side, side);
      for (const image of [picture, over]) if (image) pen.drawImage(image, 0, 0, side, side);
    }
    async function take(png) {
      const image = h("img", { src: png });
      await image.decode();
      [picture, sealed] = [image, png];
      file.value = "";
      draw();
    }
    file.addEventListener("change", async () => {
      if (!file.files.length) return;
      try {
        picture = await createImageBitmap(file.files[0]);
        sealed = null;
        failed.hidden = true;
        draw();
      } catch {
        failed.replaceChildren(trouble(new Refused("This file is no picture the browser can read.")));
        failed.hidden = false;
      }
    });

    /** A caption whose erased or doubted words are struck through. */
    function marked(text, doubted) {
      if (!doubted.length) return [text];
      const word = (w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
      return text.split(new RegExp(`(\\b(?:${doubted.map(word).join("|")})\\b)`, "i"))
        .map((piece, i) => (i % 2 ? h("del", { title: "named, and not seen" }, piece) : piece));
    }
    async function overlay(png) {
      const image = h("img", { src: png });
      await image.decode();
      draw(image);
    }
    function objects(told, ask) {
      const maps = told.heatmaps ?? {};
      found.replaceChildren(...(told.objects ?? []).map((one) => h("div", { class: one.believed === false && "plus" },
        h("button", { type: "button", title: "Show where the picture’s tokens say this word", onclick: () => heat(one.object, maps, ask) }, one.object),
        h("progress", { value: one.confidence, max: 1, "aria-label": one.object }),
        h("span", {}, `${(100 * one.confidence).toFixed(1)} %${one.believed === false ? ", not believed" : ""}`))));
      for (const e of told.erased ?? []) found.append(h("p", { class: "small quiet" }, `Erased ${e.object}: ${e.as}, at depths ${e.depths.join(", ")}, weight ${e.weight}.`));
      found.hidden = !found.childElementCount;
    }
    async function heat(object, maps, ask) {
      try {
        if (!maps[object]) {
          const body = { ...ask, patchbay: { ask: { erase: "off", show: [object] } } };
          const { choices: [one] } = await json("POST /v1/chat/completions", { body });
          Object.assign(maps, one.patchbay.heatmaps);
        }
        await overlay(maps[object]);
      } catch (error) {
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
    }

    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, h("div", { class: "stack" }, canvas, thumbs),
        h("div", { class: "stack" }, field("Your own picture", file), field("Question", question), field("Erase", list),
          h("div", { class: "pair" }, field("Patched arm", arm), field("Strength of the erasure", strength, strengthSays)))),
      h("div", { class: "run" }, run, says));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      says.textContent = "asking …";
      failed.hidden = true;
      draw();
      try {
        const words = list.value.split(/[,\n]/).map((w) => w.trim()).filter(Boolean);
        const url = sealed ?? canvas.toDataURL("image/png");
        const ask = {
          model: arm.value,
          temperature: 0,
          messages: [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text: question.value }] }],
        };
        const both = { compare: true, strength: strength.valueAsNumber, ask: { erase: words.length ? words : "auto" } };
        const { choices: [base, patched] } = await json("POST /v1/chat/completions", { body: { ...ask, patchbay: both } });
        const told = patched.patchbay ?? {};
        const doubted = (told.erased ?? []).map((e) => e.object);
        sides[0].text.replaceChildren(...marked(base.message.content, doubted));
        sides[1].text.replaceChildren(patched.message.content);
        for (const s of sides) s.text.classList.remove("quiet");
        objects(told, ask);
        const unseen = (told.objects ?? []).filter((one) => one.believed === false).map((one) => one.object);
        says.textContent = doubted.length ? `Erased: ${doubted.join(", ")}.`
          : unseen.length ? `Not seen: ${unseen.join(", ")}; erasing brought no better caption.`
          : "Everything that is named is seen; nothing was erased.";
      } catch (error) {
        says.textContent = "Refused.";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
      run.disabled = false;
    });

    let of = "";
    async function offer() {
      if (!arm.value || arm.value === of) return;
      of = arm.value;
      const about = await json("GET /v1/generate", { query: { model: arm.value } }).catch(() => null);
      card.hidden = !about?.pictures;
      const shown = about?.examples ?? [];
      thumbs.replaceChildren(...shown.map((one) => h("button", { type: "button", title: one.is, onclick: () => take(one.png) }, h("img", { src: one.png, alt: one.is, width: 64, height: 64 }))));
      if (shown.length && !picture) await take(shown[0].png);
    }
    arm.addEventListener("change", offer);
    service.hear("facts", offer);
    draw();
    card.append(h("header", {}, h("h2", { id: "see" }, "What is in the picture"), h("p", { class: "small quiet" }, "Base and erasure in one batch; every request erases its own list")),
      form, failed, h("div", { class: "sides" }, sides.map((s) => s.el)), found);
    return card;
  },
};

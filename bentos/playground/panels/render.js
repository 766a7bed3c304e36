// ---- panels: a person by attributes, a picture towards another class ---------------------------------------------------

/** What the arms of this service take from a request, asked once for each champion. */
const takes = (() => {
  let asked = null;
  let of = "";
  return (arm) => {
    const now = `${service.facts?.champion} ${service.facts?.challenger}`;
    if (!asked || now !== of) [asked, of] = [json("GET /v1/render"), now];
    return asked.then(({ arms }) => arms[arm === "challenger" ? "challenger" : "champion"] ?? null);
  };
})();

/** The picture of one row of an answer, or why there is none. */
const drawn = (one, says) => (one?.b64_json
  ? h("figure", { class: "map" }, h("img", { src: `data:image/png;base64,${one.b64_json}`, alt: says }), h("figcaption", { class: "small quiet" }, says))
  : trouble(new Refused(one?.error?.message ?? "There is no picture.")));

const RENDER = {
  needs: ["POST /v1/render/sample", "GET /v1/render"],
  mount() {
    const arm = armsThat((id) => !["base", "auto"].includes(id));
    const prompt = h("input", { maxlength: 200, autocomplete: "off", placeholder: "what the picture shows" });
    const noise = h("input", { type: "number", min: 0, max: 999999, value: 1 });
    const person = h("input", { type: "number", min: 0, max: 999999, value: 1 });
    const sliders = h("div", { class: "stack" });
    const shown = h("div", { class: "sides" });
    const card = h("section", { class: "card", "aria-labelledby": "render", hidden: true });
    const run = h("button", { class: "main" }, "Draw");
    const values = new Map();

    async function draw() {
      const attributes = Object.fromEntries([...values].filter(([, v]) => v !== 0));
      const row = { prompt: prompt.value, seed: noise.valueAsNumber || 0 };
      const start = { seed: person.valueAsNumber || 0 };
      const body = { model: arm.value, rows: [{ ...row, model: "base" }, { ...row, ask: start }, { ...row, ask: { ...start, attributes } }] };
      const { data } = await json("POST /v1/render/sample", { body });
      return [drawn(data[0], "the base"), drawn(data[1], `person ${start.seed}`), drawn(data[2], Object.keys(attributes).join(", ") || "no attribute moved")];
    }
    async function offer() {
      const about = await takes(arm.value).catch(() => null);
      const names = about?.names?.attributes ?? [];
      card.hidden = !names.length;
      if (sliders.dataset.names === names.join()) return;
      sliders.dataset.names = names.join();
      values.clear();
      sliders.replaceChildren(...names.map((name) => {
        const says = h("output", { class: "small" }, "0");
        const range = h("input", { type: "range", min: -3, max: 3, step: 0.5, value: 0 });
        range.addEventListener("input", () => { says.textContent = signed(range.valueAsNumber, 1); });
        range.addEventListener("change", () => { values.set(name, range.valueAsNumber); form.requestSubmit(); });
        return field(name, range, says);
      }));
    }
    const form = h("form", { novalidate: true },
      h("div", { class: "pair" }, field("Prompt", prompt), field("Arm", arm)),
      h("div", { class: "pair" }, field("Person (a seed of the space)", person), field("Noise (a seed)", noise)),
      h("p", { class: "small quiet" }, "Attributes, in gaps between those who have one and those who do not:"), sliders,
      h("div", { class: "run" }, run));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      await fill(shown, draw);
      run.disabled = false;
    });
    arm.addEventListener("change", offer);
    service.hear("facts", offer);
    card.append(h("header", {}, h("h2", { id: "render" }, "A person, by attributes"), h("p", { class: "small quiet" }, "The base, a person of the weight space, and the same person moved: three rows of one batch")), form, shown);
    return card;
  },
};

const STRIP = {
  needs: ["POST /v1/render/counterfactual", "GET /v1/render"],
  mount() {
    const arm = armsThat((id) => !["base", "auto"].includes(id));
    const picture = picking(arm);
    const words = h("input", { maxlength: 200, autocomplete: "off", placeholder: "a picture of a leopard" });
    const target = h("select");
    const most = h("input", { type: "range", min: 0.5, max: 3, step: 0.25, value: 1.5 });
    const mostSays = h("output", { class: "small" }, "1.5");
    const shown = h("div", { class: "stack" });
    const card = h("section", { class: "card", "aria-labelledby": "strip", hidden: true });
    const run = h("button", { class: "main" }, "Move it");
    const make = h("button", { type: "button" }, "Draw one to begin with");
    most.addEventListener("input", () => { mostSays.textContent = most.valueAsNumber.toFixed(2); });

    async function strip() {
      const steps = [0, 0.25, 0.5, 0.75, 1].map((part) => part * most.valueAsNumber);
      const body = { image: picture.data(), model: arm.value, ask: { target: target.value }, sweep: { name: "amount", values: steps } };
      const got = await json("POST /v1/render/counterfactual", { body });
      return [h("img", { class: "strip", src: `data:image/png;base64,${got.strip}`, alt: `The picture, then moved towards ${target.value}` }),
        h("p", { class: "small quiet" }, "As it was sent, then by class gaps: ", got.data.map((one) => `${one.value.toFixed(2)} (changed ${(100 * (one.l1 ?? 0)).toFixed(1)} %)`).join(", "), ".")];
    }
    async function offer() {
      const about = await takes(arm.value).catch(() => null);
      const names = about?.names?.classes ?? [];
      card.hidden = !names.length;
      if (target.dataset.names === names.join()) return;
      target.dataset.names = names.join();
      target.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      words.value ||= names.length ? `a picture of a ${names[0]}` : "";
    }
    make.addEventListener("click", async () => {
      await fill(shown, async () => {
        const body = { prompt: words.value, model: "base", patchbay: { guidance: 5, steps: 10 } };
        const { data: [one] } = await json("POST /v1/images/generations", { body });
        await picture.take({ png: `data:image/png;base64,${one.b64_json}` });
        return [];
      });
    });
    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, picture.el,
        h("div", { class: "stack" }, picture.fields, field("Or say what to draw", words), h("div", { class: "run" }, make),
          h("div", { class: "pair" }, field("Arm", arm), field("Towards", target)), field("Up to, in class gaps", most, mostSays))),
      h("div", { class: "run" }, run));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      run.disabled = true;
      await fill(shown, strip);
      run.disabled = false;
    });
    arm.addEventListener("change", offer);
    service.hear("facts", offer);
    card.append(h("header", {}, h("h2", { id: "strip" }, "A picture towards another class"), h("p", { class: "small quiet" }, "Inverted once, drawn again by growing amounts; the rest of it should stay")), form, shown);
    return card;
  },
};

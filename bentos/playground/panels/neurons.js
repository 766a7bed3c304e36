// ---- panel: neurons, what they say of a picture and where; what misleads a class --------------------------------------

const NEURONS = {
  needs: ["POST /v1/explain/attributes", "GET /v1/explain/neurons", "GET /v1/explain/neurons/{layer}/{neuron}", "POST /v1/explain/segment", "POST /v1/explain/mine", "GET /v1/models"],
  mount() {
    const arm = armsThat((id) => id !== "base" && id !== "auto");
    const picture = picking(arm);
    const text = h("input", { maxlength: 200, autocomplete: "off", placeholder: "the first word they say" });
    const against = h("input", { maxlength: 200, autocomplete: "off", placeholder: "nothing" });
    const run = h("button", { class: "main" }, "Read the neurons");
    const says = h("output", { class: "quiet", "aria-live": "polite" });
    const failed = h("div", { hidden: true });
    const columns = ["base", "patched"].map((name) => {
      const who = h("div", { class: "who quiet" }, name === "base" ? "The base." : "The patched model.");
      const [words, where] = [h("div", { class: "stack" }, h("p", { class: "quiet" }, "Not read yet.")), h("div")];
      return { name, who, words, where, el: h("article", { class: `side ${name}`, "aria-label": `${name} neurons` }, who, words, where) };
    });

    // ---- a card
    const layer = h("input", { type: "number", min: 0, value: 0 });
    const neuron = h("input", { type: "number", min: 0, value: 0 });
    const card = h("div", { class: "stack" });
    const edited = h("div", { class: "row features" });
    const finding = h("form", { class: "find", novalidate: true }, field("Layer", layer), field("Neuron", neuron), h("button", {}, "Show the card"));
    finding.addEventListener("submit", (event) => {
      event.preventDefault();
      open({ layer: layer.value, neuron: neuron.value });
    });
    let going = new AbortController();
    function open(at, button) {
      [layer.value, neuron.value] = [at.layer, at.neuron];
      going.abort();
      going = new AbortController();
      const { signal } = going;
      for (const b of edited.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b === button));
      return fill(card, async () => aboutNeuron(await json("GET /v1/explain/neurons/{layer}/{neuron}", { at, query: { model: readerOf(arm) }, signal })));
    }
    function aboutNeuron(one) {
      const most = Math.max(...one.texts.map((t) => Math.abs(t.coefficient)));
      const percent = (x) => `${(100 * x).toFixed(0)} %`;
      return [
        h("div", { class: "row" }, h("h3", {}, `Neuron ${one.neuron} of layer ${one.layer}`), one.edited && h("span", { class: "chip warn" }, "edited")),
        h("div", { class: "halves" },
          h("div", { class: "stack" },
            h("p", { class: "small quiet" }, `Its effect has one direction that holds ${percent(one.explained[0])} of it; these texts explain ${percent(one.texts_explain)} of that:`),
            h("div", { class: "scores wide" }, one.texts.map((t) => scored(t.text, t.coefficient, most, signed(t.coefficient), t.coefficient < 0 && "minus")))),
          h("div", { class: "stack" },
            h("p", { class: "small quiet" }, "Later heads carry it to the output:"),
            h("div", { class: "row" }, one.carriers.map((c) => h("span", { class: "chip" }, `${c.layer}.${c.head} `, h("span", { class: "quiet" }, percent(c.share))))),
            h("p", { class: "small quiet" }, "Pictures in which its effect is largest; choose one to read it:"),
            choosable(one.pictures, follow, (p) => `picture ${p.picture}: ${signed(p.projection)}`))),
      ];
    }
    /** Words with their weights; each opens into the neurons that say it. */
    function words(found) {
      const most = Math.max(...found.map((one) => Math.abs(one.weight)));
      return h("div", { class: "words" }, found.map((one) => h("details", {},
        h("summary", {}, h("div", { class: "scores" }, scored(one.text, one.weight, most, signed(one.weight), one.weight < 0 && "minus"))),
        h("div", { class: "row features" }, one.neurons.map((n) => h("button", { type: "button", onclick: () => show(n) }, `${n.layer}/${n.neuron} `, h("span", { class: "quiet small" }, signed(n.adds))))))));
    }
    async function show(at) {
      await open(at);
      card.scrollIntoView({ block: "nearest" });
    }

    // ---- the neurons that the patch edits
    const list = () => fill(edited, async () => {
      const { data } = await json("GET /v1/explain/neurons", { query: { model: readerOf(arm) } });
      if (!card.childElementCount && data.length) open(data[0]);
      return data.length && [h("span", { class: "label" }, "The patch edits"), data.slice(0, 12).map((one) => h("button", { type: "button", "aria-pressed": "false", onclick: (event) => open(one, event.currentTarget) },
        `${one.layer}/${one.neuron} `, h("span", { class: "quiet small" }, one.texts.slice(0, 2).map((t) => t.text).join(", ")))),
      data.length > 12 && h("span", { class: "small quiet" }, `and ${whole.format(data.length - 12)} more`)];
    });
    service.hear("facts", list);
    arm.addEventListener("change", () => {
      card.replaceChildren(); // it was the other patch's
      list();
    });

    // ---- a pair of classes
    const [right, wrong] = ["cat", "dog"].map((value) => h("input", { value, maxlength: 200, autocomplete: "off" }));
    const mined = h("div", { class: "stack" });
    const mining = h("form", { class: "find", novalidate: true }, field("The true class", right), field("Mistaken for", wrong), h("button", {}, "Mine words"));
    mining.addEventListener("submit", (event) => {
      event.preventDefault();
      fill(mined, async () => {
        const got = await json("POST /v1/explain/mine", { body: { true: right.value.trim(), wrong: wrong.value.trim(), top: 12, model: readerOf(arm) } });
        return [
          got.data.length ? words(got.data) : h("p", { class: "quiet" }, "No word pulls from the one to the other."),
          got.left_out.length > 0 && h("p", { class: "small quiet" }, `Left out, for they only say a class again: ${got.left_out.slice(0, 12).join(", ")}.`),
        ];
      });
    });

    async function follow(one) {
      await picture.take(one);
      form.requestSubmit();
    }
    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, picture.el,
        h("div", { class: "stack" }, picture.fields,
          h("div", { class: "pair" }, field("Where is", text), field("Rather than", against)), field("Patched arm", arm))),
      h("div", { class: "run" }, run, says));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (run.disabled) return; // a picture may be chosen while another is read
      run.disabled = true;
      says.textContent = "reading …";
      failed.hidden = true;
      try {
        const data = picture.data();
        const model = arm.value;
        const { results: [one] } = await json("POST /v1/explain/attributes", { body: { images: [{ data }], top: 12, compare: true, model } });
        for (const { name, who, words: place } of columns) {
          const { attributes, neurons_that_count: count } = one[name];
          who.classList.remove("quiet");
          who.replaceChildren(h("span", { class: "chip" }, name), `${whole.format(count)} neurons count`);
          place.replaceChildren(attributes.length ? words(attributes) : h("p", { class: "quiet" }, "No neuron says anything of this picture."));
        }
        says.textContent = "What the picture shows, in the words of the neurons that count in it; open a word for its neurons.";
        const [sought, rather] = [text.value.trim() || one.base.attributes[0]?.text, against.value.trim() || null];
        const maps = sought ? json("POST /v1/explain/segment", { body: { image: { data }, text: sought, against: rather, format: ["png"], compare: true, model } }) : null;
        await Promise.all(columns.map(({ name, where }) => fill(where, async () => maps && overlay((await maps)[name], `Where it is “${sought}”${rather ? ` rather than “${rather}”` : ""}`))));
      } catch (error) {
        says.textContent = "Refused.";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
      run.disabled = false;
    });
    return h("section", { class: "card", "aria-labelledby": "neurons" },
      h("header", {}, h("h2", { id: "neurons" }, "What the neurons say"), h("p", { class: "small quiet" }, "One picture in words, base and patched")),
      form, failed, h("div", { class: "sides" }, columns.map((c) => c.el)),
      h("div", { class: "stack more" }, h("h3", {}, "One neuron"), edited, finding, card),
      h("div", { class: "stack more" }, h("h3", {}, "What a class is mistaken for"), h("p", { class: "small quiet" }, "Words that pull a picture of one class to the other, though they name neither."), mining, mined));
  },
};

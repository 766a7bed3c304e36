// ---- panel: heads, what each adds to a picture, where, and which pictures are alike -----------------------------------

/** Values of layers x heads as buttons: red adds, blue takes away, as in overlays; both out of `most`. */
function headMap(values, most, title, open) {
  const cells = new Map();
  const readout = h("output", { class: "small" });
  const rows = values.map((row, layer) => h("tr", {}, h("th", { scope: "row" }, layer), row.map((value, head) => {
    const name = `${layer}.${head}`;
    const cell = h("button", { type: "button", class: value < 0 ? "minus" : "plus", tabindex: cells.size ? -1 : 0, "aria-pressed": "false", title: title(name),
      "aria-label": title(name), onclick: () => open(name) });
    cell.style.setProperty("--share", `${(100 * Math.abs(value)) / (most || 1)}%`);
    cells.set(name, cell);
    return h("td", {}, cell);
  })));
  const table = h("table", { class: "heat" },
    h("thead", {},
      h("tr", {}, h("th", { scope: "col", rowspan: 2 }, "layer"), h("th", { scope: "colgroup", colspan: values[0].length }, "head")),
      h("tr", {}, values[0].map((_, head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows));
  const reach = (name) => { // one stop for the tab key, arrows from there
    for (const [other, cell] of cells) cell.tabIndex = other === name ? 0 : -1;
  };
  const turns = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    const turn = turns[event.key];
    const from = [...cells].find(([, cell]) => cell === event.target);
    if (!turn || !from) return;
    event.preventDefault();
    const [layer, head] = from[0].split(".").map(Number);
    const to = `${layer + turn[0]}.${head + turn[1]}`;
    if (!cells.has(to)) return;
    reach(to);
    cells.get(to).focus();
  });
  for (const kind of ["mouseover", "focusin"]) table.addEventListener(kind, (event) => { readout.textContent = event.target.title || readout.textContent; });
  return {
    el: [h("div", { class: "scroll" }, table),
      h("div", { class: "legend small quiet" }, h("span", {}, signed(-most)), h("i", { "aria-hidden": "true" }), h("span", {}, signed(most))), readout],
    mark(name) {
      for (const [other, cell] of cells) cell.setAttribute("aria-pressed", String(other === name));
      reach(name);
      readout.textContent = cells.get(name)?.title ?? "";
    },
    only(fits) { for (const [name, cell] of cells) cell.classList.toggle("faint", !fits(name)); },
  };
}

const HEADS = {
  needs: ["POST /v1/explain/decompose", "GET /v1/explain/heads", "GET /v1/explain/heads/{head}", "POST /v1/explain/segment", "POST /v1/explain/neighbours", "GET /v1/models"],
  mount() {
    const arm = armsThat((id) => id !== "base" && id !== "auto");
    const picture = picking(arm);
    const text = h("input", { value: "a photo of a dog", maxlength: 200, autocomplete: "off" });
    const against = h("input", { maxlength: 200, autocomplete: "off", placeholder: "nothing" });
    const run = h("button", { class: "main" }, "Read the heads");
    const says = h("output", { class: "quiet", "aria-live": "polite" });
    const failed = h("div", { hidden: true });
    const columns = ["base", "patched"].map((name) => {
      const who = h("div", { class: "who quiet" }, name === "base" ? "The base." : "The patched model.");
      const [map, where] = [h("div", { class: "stack" }, h("p", { class: "quiet" }, "Not read yet.")), h("div")];
      return { who, map, where, el: h("article", { class: `side ${name}`, "aria-label": `${name} heads` }, who, map, where) };
    });
    const named = h("div", { class: "row features more" });
    const detail = h("div", { class: "stack more", hidden: true });
    let asked = null; // what the maps are of, whatever the fields say by now
    let maps = [];
    let opened = null;
    let going = new AbortController();

    /** Where the picture is the text, for all heads or one. */
    async function where(model, about, heads, signal) {
      const { image, text, against } = asked;
      return overlay(await json("POST /v1/explain/segment", { body: { image, text, against, heads, format: ["png"], model }, signal }), about);
    }

    function open(name) {
      const { image, text, against, model, labels, sides } = asked;
      going.abort();
      going = new AbortController();
      const { signal } = going;
      opened = name;
      for (const map of maps) map.mark(name);
      const [card, places, alike, near] = ["stack", "maps", "", ""].map((kind) => h("div", { class: kind }));
      const nearest = async (to) => {
        const { data } = await json("POST /v1/explain/neighbours", { body: { ...to, heads: [name], top: 12, model }, signal });
        return choosable(data, follow, (one) => `${one.name}: ${signed(one.score)}`);
      };
      fill(card, async () => aboutHead(await json("GET /v1/explain/heads/{head}", { at: { head: name }, query: { model }, signal })));
      fill(places, () => Promise.all(sides.map((side) => where(side, side === "base" ? "Base" : "Patched", [name], signal))));
      fill(alike, () => nearest({ image }));
      fill(near, () => nearest({ text }));
      detail.replaceChildren(h("h3", {}, `Head ${name}`, labels.has(name) && `: ${labels.get(name)}`),
        h("div", { class: "halves" }, card, h("div", { class: "stack" }, h("p", { class: "small quiet" }, `Where this head sees “${text}”`, against && ` rather than “${against}”`), places)),
        h("span", { class: "label" }, "Pictures alike to this one for this head; choose one to read it"), alike,
        h("span", { class: "label" }, `Pictures in which this head says most of “${text}”`), near);
      detail.hidden = false;
    }

    function aboutHead(one) {
      const most = Math.max(...one.texts.map((t) => t.share));
      return [
        h("div", { class: "row" }, h("span", { class: "chip" }, one.label), one.also.map((label) => h("span", { class: "chip" }, `also ${label}`))),
        h("p", { class: "small quiet" }, `Named by ${one.source}, score ${one.score.toFixed(2)}, ${one.p ? `p = ${one.p.toPrecision(2)}` : "p < 0.000001"}. `
          + `Its texts explain ${(100 * one.explained).toFixed(0)} % of its variance, random ones ${(100 * one.explained_random).toFixed(0)} %:`),
        h("div", { class: "scores wide" }, one.texts.map((t) => scored(t.text, t.share, most, `${(100 * t.share).toFixed(1)} %`, t.fits && "best"))),
        one.texts.some((t) => t.fits) && h("p", { class: "small quiet" }, "Bold: texts that fit the label."),
        one.trail.map((t) => h("p", { class: "small quiet" }, `${t.who} changed ${t.was} to ${t.label}: ${t.why}`)),
      ];
    }

    async function follow(one) {
      await picture.take(one);
      form.requestSubmit();
    }

    /** Which heads are called what; a label chosen leaves only its heads. */
    function legend(labels) {
      const count = new Map();
      for (const label of labels.values()) count.set(label, (count.get(label) ?? 0) + 1);
      const buttons = [...count].sort((a, b) => b[1] - a[1]).map(([label, n]) => h("button", { type: "button", "aria-pressed": "false", onclick: (event) => {
        const on = event.currentTarget.getAttribute("aria-pressed") === "false";
        for (const b of buttons) b.setAttribute("aria-pressed", String(on && b === event.currentTarget));
        for (const map of maps) map.only((name) => !on || labels.get(name) === label);
      } }, `${label} `, h("span", { class: "quiet small" }, n)));
      return buttons.length ? [h("span", { class: "label" }, "Only heads of"), buttons] : [];
    }

    function show(got, base, labels) {
      const rather = got.texts.length > 1; // a difference of two cosines, head by head
      const value = (v) => v[0] - (rather ? v[1] : 0);
      const sum = (rows) => rows.flat().reduce((total, v) => total + v, 0);
      const read = [base, got].map((one) => one && { cosine: value(one.cosine), heads: one.heads.map((row) => row.map(value)), mlps: one.mlps.map(value), bias: value(one.bias) });
      const most = Math.max(...read.filter(Boolean).flatMap((one) => one.heads.flat().map(Math.abs)));
      maps = [];
      for (const [i, one] of read.entries()) {
        columns[i].el.hidden = !one;
        if (!one) continue;
        const other = read[1 - i];
        const title = (name) => {
          const [layer, head] = name.split(".");
          return [`Head ${name}`, labels.has(name) && `${labels.get(name)}`, signed(one.heads[layer][head], 4), other && `${i ? "base" : "patched"} ${signed(other.heads[layer][head], 4)}`].filter(Boolean).join(" · ");
        };
        const map = headMap(one.heads, most, title, open);
        const { arm: label, patch } = i ? got.patchbay : { arm: "base", patch: "base" };
        columns[i].who.classList.remove("quiet");
        columns[i].who.replaceChildren(...whoSays(label, patch));
        const numbers = { [rather ? "Difference" : "Cosine"]: one.cosine, Heads: sum(one.heads), MLPs: sum(one.mlps), Constant: one.bias };
        columns[i].map.replaceChildren(
          h("dl", { class: "numbers" }, Object.entries(numbers).map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, signed(v))))), ...map.el);
        maps.push(map);
      }
      named.replaceChildren(...legend(labels).flat());
      return read[1].heads;
    }

    const form = h("form", { novalidate: true },
      h("div", { class: "look" }, picture.el,
        h("div", { class: "stack" }, picture.fields,
          h("div", { class: "pair" }, field("Text", text), field("Rather than", against)), field("Patched arm", arm))),
      h("div", { class: "run" }, run, says));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (run.disabled) return; // a picture may be chosen while another is read
      run.disabled = true;
      says.textContent = "reading …";
      failed.hidden = true;
      try {
        const ask = { image: { data: picture.data() }, text: text.value.trim(), against: against.value.trim() || null, model: arm.value };
        if (!ask.text) throw new Refused("Write a text to look for in the picture.");
        const texts = ask.against ? [ask.text, ask.against] : [ask.text];
        const [got, list] = await Promise.all([
          json("POST /v1/explain/decompose", { body: { image: ask.image, texts, model: ask.model, compare: true } }),
          json("GET /v1/explain/heads", { query: { model: ask.model } }).catch((error) => (error.status === 404 ? { data: [] } : Promise.reject(error))),
        ]);
        const labels = new Map(list.data.map((one) => [`${one.layer}.${one.head}`, one.label]));
        asked = { ...ask, labels, sides: got.base ? ["base", ask.model] : [ask.model] };
        const heads = show(got, got.base, labels);
        asked.sides.forEach((side) => fill(columns[side === "base" ? 0 : 1].where, () => where(side, "All heads")));
        const size = (name) => Math.abs(heads[name.split(".")[0]]?.[name.split(".")[1]] ?? 0);
        const names = heads.flatMap((row, layer) => row.map((_, head) => `${layer}.${head}`));
        const largest = names.reduce((a, b) => (size(b) > size(a) ? b : a));
        open(names.includes(opened) ? opened : largest);
        const about = ask.against ? `“${ask.text}” rather than “${ask.against}”` : `“${ask.text}”`;
        says.textContent = `What each head adds to the cosine with ${about}; head ${largest} weighs most. Choose a head.`;
      } catch (error) {
        says.textContent = "Refused.";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
      }
      run.disabled = false;
    });
    return h("section", { class: "card", "aria-labelledby": "heads" },
      h("header", {}, h("h2", { id: "heads" }, "What the heads see"), h("p", { class: "small quiet" }, "One picture, head by head, base and patched")),
      form, failed, h("div", { class: "sides" }, columns.map((c) => c.el)), named, detail);
  },
};

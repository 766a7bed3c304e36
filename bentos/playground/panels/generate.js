// ---- panel: generate, base beside patched --------------------------------------------------------------------------

const GENERATE = {
  needs: ["POST /v1/chat/completions", "GET /v1/generate", "GET /v1/models"],
  mount() {
    let start = { user: "Repeat the word {} over and over, separated by spaces.", word: "window", copies: 600, max_tokens: 48 };
    let context = 4096; // until the service has said what its base holds
    const word = h("input", { value: "window", maxlength: 40, spellcheck: "false", autocomplete: "off" });
    const slider = h("input", { type: "range", min: 0, max: 32, step: 1, "aria-label": "Copies, as a slider" });
    const copies = h("input", { type: "number", min: 1, max: 1024, value: 600 });
    const user = h("textarea", { rows: 3 });
    const begun = h("textarea", { rows: 3, spellcheck: "false" });
    const counted = h("span", { class: "small quiet" });
    const most = h("input", { type: "number", min: 1, max: 1024, value: 48, placeholder: "what fits" });
    const heat = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
    const strength = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 1 });
    const strengthSays = h("output", { class: "small" });
    const run = h("button", { class: "main", disabled: true }, "Run both"); // until it is known what fits
    const stop = h("button", { type: "button", hidden: true }, "Stop");
    const says = h("output", { class: "quiet", "aria-live": "polite" });

    const examples = {
      "Repeat a word": () => {
        user.value = start.user.replace("{}", word.value);
        begun.value = Array(Math.max(0, Math.min(4096, copies.valueAsNumber || 0))).fill(word.value).join(" ");
        most.value = start.max_tokens;
      },
      "A question": () => {
        user.value = context < 256 ? "Why?" : "Why is the sky blue? Answer in two sentences.";
        begun.value = "";
        most.value = Math.min(96, context >> 2);
      },
      "Your own": () => {
        user.value = begun.value = "";
        most.value = ""; // as many as fit
        user.focus();
      },
    };
    let example = "Repeat a word";
    const repeating = h("div", { class: "copies" }, field("Word", word), field("Copies the answer has begun with", slider), field("Copies", copies));

    function count() {
      const n = begun.value.trim() ? begun.value.trim().split(/\s+/).length : 0;
      counted.textContent = n ? `${whole.format(n)} words, ${whole.format(begun.value.length)} characters` : "empty: the answer starts afresh";
    }
    function choose(name) {
      example = name;
      repeating.hidden = name !== "Repeat a word";
      slider.value = Math.round(4 * Math.log2((copies.valueAsNumber || 4) / 4));
      examples[name]();
      count();
    }
    slider.addEventListener("input", () => { // four steps an octave
      copies.value = Math.round(4 * 2 ** (slider.valueAsNumber / 4));
      choose(example);
    });
    for (const input of [word, copies]) input.addEventListener("input", () => choose(example));
    begun.addEventListener("input", count);
    const showStrength = () => { strengthSays.textContent = strength.valueAsNumber.toFixed(2); };
    strength.addEventListener("input", showStrength);
    showStrength();

    const sides = [side("Left", () => "base"), side("Right", (facts) => (facts.challenger ? "challenger" : "champion"))];
    const picker = h("fieldset", { class: "choices" }, h("legend", { class: "label" }, "Start from an example"),
      Object.keys(examples).map((name) => h("label", {},
        h("input", { type: "radio", name: "example", checked: name === example, onchange: () => choose(name) }), name)));
    const form = h("form", { novalidate: true },
      picker,
      h("div", { class: "asking" },
        h("div", { class: "stack" }, repeating, field("User says", user), field("The answer has begun with", begun, counted)),
        h("div", { class: "stack" },
          h("div", { class: "pair" }, field("Max tokens", most), field("Temperature", heat)),
          field("Strength of the patch", strength, strengthSays),
          h("p", { class: "small quiet" }, "At 0 a patched arm is exactly the base. Both sides get the same seed and are decoded in one batch, on one copy of the base; the right one’s prompt is read after the left one’s."))),
      h("div", { class: "run" }, run, stop, h("kbd", {}, "Ctrl + Enter"), says));
    choose(example);
    async function fit() { // once: what is asked first must fit this base
      if (user.dataset.fits) return;
      user.dataset.fits = "asked";
      const about = await json("GET /v1/generate").catch(() => null);
      run.disabled = false;
      if (!about) return delete user.dataset.fits;
      context = about.context;
      if (!about.start) return choose("A question");
      start = about.start;
      [word.value, copies.value] = [start.word, start.copies];
      choose(example);
    }
    service.hear("facts", fit);

    let going = null;
    stop.addEventListener("click", () => going?.abort());
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (going) return;
      going = new AbortController();
      run.disabled = true;
      stop.hidden = false;
      says.textContent = "decoding …";
      const messages = [{ role: "user", content: user.value }];
      if (begun.value) messages.push({ role: "assistant", content: begun.value });
      const ask = {
        messages,
        continue_final_message: Boolean(begun.value),
        max_tokens: Number.isNaN(most.valueAsNumber) ? null : most.valueAsNumber,
        temperature: Number.isNaN(heat.valueAsNumber) ? null : heat.valueAsNumber,
        seed: Math.floor(Math.random() * 2 ** 31),
        patchbay: { strength: strength.valueAsNumber },
      };
      const watch = example === "Repeat a word" ? word.value.trim() : "";
      const said = await Promise.all(sides.map((one) => one.run(ask, watch, going.signal)));
      says.textContent = said.join(" ");
      going = null;
      run.disabled = false;
      stop.hidden = true;
    });
    return h("section", { class: "card", "aria-labelledby": "side-by-side" },
      h("header", {}, h("h2", { id: "side-by-side" }, "Side by side"), h("p", { class: "small quiet" }, "One prompt, two arms")),
      form, h("div", { class: "sides" }, sides.map((one) => one.el)));
  },
};

/** One arm's column: `run` streams an answer into it and returns a sentence about it. */
function side(name, preferred) {
  const arm = h("select");
  const who = h("div", { class: "who quiet" }, "Not asked yet.");
  const numbers = Object.fromEntries(["First token", "Tokens / s", "Tokens", "Finish"].map((k) => [k, h("dd", {}, "–")]));
  const verdict = h("p", { class: "verdict", hidden: true });
  const ticks = h("div", { class: "ticks", hidden: true, "aria-hidden": "true" });
  const answer = h("div", { class: "answer", tabindex: 0, role: "region", "aria-label": `${name} answer` });
  const failed = h("div", { hidden: true });
  const el = h("article", { class: "side", "aria-label": `${name} arm` },
    field(`${name} arm`, arm), who,
    h("dl", { class: "numbers" }, Object.entries(numbers).map(([k, dd]) => h("div", {}, h("dt", {}, k), dd))),
    verdict, ticks, answer, failed);

  let chosen = null;
  const colour = () => el.classList.toggle("patched", arm.value !== "base");
  arm.addEventListener("change", () => { chosen = arm.value; colour(); });
  service.hear("facts", (facts) => {
    const wanted = chosen && service.arms.includes(chosen) ? chosen : preferred(facts);
    const about = { auto: "what a user gets", base: "no patch", champion: short(facts.champion), challenger: short(facts.challenger) };
    const names = service.arms.map((id) => [id, about[id] ? `${id} · ${about[id]}` : short(id)]);
    if (JSON.stringify(names) !== arm.dataset.names) { // an open list must not be rebuilt under somebody's hand
      arm.dataset.names = JSON.stringify(names);
      arm.replaceChildren(...names.map(([id, text]) => h("option", { value: id }, text)));
    }
    arm.value = wanted;
    colour();
  });

  function draw(text, watch, begun, finish) {
    const open = finish === null;
    const before = begun ? h("span", { class: "before" }, `${begun.length > 60 ? "… " : ""}${tail(begun, 60)}`) : null;
    const caret = open ? h("span", { class: "caret" }) : null;
    if (!watch) return answer.replaceChildren(...[before, text, caret].filter(Boolean));
    const got = follow(text, watch, finish);
    const parts = got.departs
      ? [text.slice(0, got.departs.from), h("mark", { class: "here" }, text.slice(got.departs.from, got.departs.to)), h("span", { class: "off" }, text.slice(got.departs.to))]
      : [text];
    if (got.ended || got.blank) parts.push(h("mark", {}, got.ended ? "ended here" : "nothing but blanks"));
    answer.replaceChildren(...[before, ...parts, caret].filter(Boolean));
    ticks.replaceChildren(...got.words.slice(0, 256).map((right) => h("i", { class: right && "right" })));
    verdict.className = `verdict ${got.departs || got.ended || got.blank ? "bad" : got.words.length ? "good" : ""}`;
    verdict.textContent = got.says;
    return got;
  }

  async function run(ask, watch, signal) {
    const begun = ask.continue_final_message ? ask.messages.at(-1).content : "";
    const asked = arm.value;
    const start = performance.now();
    let [text, finish, first, last, frame] = ["", null, 0, 0, 0];
    for (const dd of Object.values(numbers)) dd.textContent = "–";
    who.replaceChildren("asking …");
    for (const part of [verdict, ticks]) { part.hidden = !watch; part.replaceChildren(); }
    failed.hidden = true;
    answer.hidden = false;
    answer.setAttribute("aria-busy", "true");
    draw("", watch, begun, null);
    try {
      const body = { ...ask, model: asked, stream: true, stream_options: { include_usage: true } };
      const response = await call("POST /v1/chat/completions", { body, signal });
      const [label, patch, experiment, unit, request] = ["arm", "patch", "experiment", "unit", "request"].map((k) => response.headers.get(`x-patchbay-${k}`));
      who.classList.remove("quiet");
      who.replaceChildren(h("span", { class: "chip" }, label), patch === "base" ? "no patch" : patchName(patch), experiment ? h("span", { class: "quiet" }, `in ${experiment}`) : "");
      for await (const said of events(response)) {
        const choice = said.choices[0];
        if (choice?.delta.content) {
          last = performance.now();
          if (!first) {
            first = last;
            numbers["First token"].textContent = `${((first - start) / 1000).toFixed(2)} s`;
          }
          text += choice.delta.content;
          frame ||= requestAnimationFrame(() => { frame = 0; draw(text, watch, begun, finish); });
        }
        if (choice?.finish_reason) finish = choice.finish_reason;
        if (said.usage) {
          const tokens = said.usage.completion_tokens;
          numbers.Tokens.textContent = whole.format(tokens);
          if (tokens > 1 && last > first) numbers["Tokens / s"].textContent = ((tokens - 1) / ((last - first) / 1000)).toFixed(1);
        }
      }
      if (experiment) service.tell("answered", { side: name, experiment, unit, request });
    } catch (error) {
      finish = "stopped";
      if (error.name !== "AbortError") {
        finish = "refused";
        failed.replaceChildren(trouble(error));
        failed.hidden = false;
        answer.hidden = !text;
        if (!text) who.replaceChildren("No answer.");
      }
    }
    cancelAnimationFrame(frame);
    numbers.Finish.textContent = finish;
    answer.removeAttribute("aria-busy");
    const got = draw(text, watch, begun, finish);
    if (finish === "refused") {
      verdict.hidden = ticks.hidden = true;
      return `${name} (${asked}): refused.`;
    }
    return `${name} (${asked}): ${watch ? got.says.toLowerCase() : `finished, ${finish}`}.`;
  }
  return { el, run };
}

const tail = (text, n) => (text.length > n ? text.slice(text.indexOf(" ", text.length - n) + 1) : text);

/** How an answer follows a word: which of its words are right, and where it first departs or ends. */
function follow(text, word, finish) {
  const found = [...text.matchAll(/\S+/g)];
  const last = found.at(-1);
  // the last piece may be half a word: still coming, or cut by the limit
  const half = last && last.index + last[0].length === text.length && finish !== "stop" && word.startsWith(last[0]) && last[0] !== word;
  if (half || (finish === null && last && last[0] === word && text.endsWith(word))) found.pop();
  const words = found.map((m) => m[0] === word);
  const right = words.filter(Boolean).length;
  const at = words.indexOf(false);
  const departs = at < 0 ? null : { from: found[at].index, to: found[at].index + Math.min(24, found[at][0].length) };
  const ended = finish === "stop" && !departs;
  const blank = finish === "length" && !words.length;
  const many = (n) => `${whole.format(n)} ${n === 1 ? "word" : "words"}`;
  let says = words.length ? `All ${many(right)} right so far` : "…";
  if (departs) says = `Departs after ${many(at)}${right > at ? `; ${right} of ${words.length} right in all` : ""}`;
  else if (ended) says = `Ends after ${many(right)}`;
  else if (finish !== null) says = blank ? "Departs at once: no word at all" : words.length ? `All ${many(right)} right` : "Stopped before a word";
  return { words, right, departs, ended, blank, says };
}

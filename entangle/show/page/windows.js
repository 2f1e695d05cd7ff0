// Whole windows of text, each token coloured by a neuron's value, and the four cases of a gated unit.

const levelsOf = (text) => Int8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const rounded = (x) => short(Number(x.toPrecision(3)));

// The shade is the distance to the median in reaches, from -1 to 1.
function colouredToken(text, value, { median, reach }) {
  const token = make("span", {}, visible(text) || "");
  if (value === null) return token; // it is not counted
  const shade = Math.max(-1, Math.min(1, (value - median) / reach));
  token.className = shade < 0 ? "low" : "high";
  token.style.setProperty("--shade", Math.abs(shade).toFixed(3));
  token.dataset.value = value;
  return token;
}

function colouredWindow(one, tokens, scale) {
  const levels = levelsOf(one.levels), shown = tokens.slice(one.first, one.end), skipped = shown.length - levels.length;
  const text = make("code", {});
  if (one.first > 0) text.append("…");
  shown.forEach((piece, i) => {
    const level = i < skipped ? -128 : levels[i - skipped]; // -128: no value
    const value = level === -128 ? null : scale.median + scale.reach * Math.sinh(scale.step * level);
    const token = colouredToken(piece, value, scale);
    if (one.first + i === one.position) token.classList.add("chosen");
    token.dataset.place = `window ${one.window}, position ${one.first + i}`;
    text.append(token);
  });
  if (one.end < tokens.length) text.append("…");
  return make("li", {}, make("span", { class: "output" }, `${one.why}, window ${one.window}`), text);
}

function scaleOf({ median, reach }) {
  const ends = [median - reach, median, median + reach];
  return make("div", { class: "shades" }, make("div", { class: "ramp", "aria-hidden": "true" }),
    make("div", { class: "ends" }, ...ends.map((end) => make("span", {}, rounded(end)))));
}

function colouredWindows(found, texts, side) {
  const said = make("output", { class: "said", "aria-live": "polite" }, "Point at a token, or use the arrow keys, to read its value.");
  const list = make("ol", {}, ...found.shown.map((one) => colouredWindow(one, texts[one.window], found.scale)));
  const region = make("div", { class: "coloured", role: "group", "aria-label": "windows in colour: left and right move from token to token, up and down from window to window", tabindex: "0" }, list);
  const tokens = [...region.querySelectorAll("[data-value]")];
  let current = -1;
  const show = (token) => {
    if (!token) return;
    tokens[current]?.classList.remove("current");
    current = tokens.indexOf(token);
    token.classList.add("current");
    said.replaceChildren(make("code", {}, token.textContent || "∅"), ` ${side} ${rounded(Number(token.dataset.value))}, ${token.dataset.place}`);
  };
  region.addEventListener("pointerover", (event) => show(event.target.closest("[data-value]")));
  region.addEventListener("click", (event) => show(event.target.closest("[data-value]")));
  region.addEventListener("keydown", (event) => {
    const chosen = (way) => { // the token that the next or last window was chosen for
      const places = [...region.querySelectorAll(".chosen")].map((token) => tokens.indexOf(token));
      return way > 0 ? places.find((place) => place > current) : places.findLast((place) => place < current);
    };
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, ArrowUp: chosen(-1), ArrowDown: chosen(1), Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || !tokens[to]) return;
    event.preventDefault();
    show(tokens[to]);
    tokens[to].scrollIntoView({ block: "nearest" });
  });
  return make("div", { class: "windows" }, make("h4", {}, "Windows in colour"),
    make("p", { class: "quiet" }, `Colour: the distance to the median ${side}, full for the farthest 1% of the tokens. A frame marks the token that a window was chosen for.`),
    scaleOf(found.scale), said, region);
}

// How often gate and up of a hidden unit have which signs, and what their product is then.
function signCases(unit, own) {
  const parts = [["gate", "gate"], ["up", "up"], ["product", "act(gate) · up"]];
  const names = make("ul", { class: "parts" }, ...parts.map(([part, label]) =>
    make("li", {}, make("b", {}, label), ` ${unit[part]}${unit[part] === own ? " (this one)" : ""}: ${unit.wasserstein[part] === null ? "no distance" : `W1 ${unit.wasserstein[part].toFixed(4)}`}`)));
  const head = make("tr", {}, ...["gate", "up", "tokens", "mean product"].map((name) => make("th", { scope: "col" }, name)));
  const rows = unit.cases.map((one) => make("tr", {}, ...[one.gate, one.up, percent(one.share), one.mean === null ? "–" : short(one.mean)].map((text) => make("td", {}, text))));
  const examples = unit.cases.filter((one) => one.examples.length).map((one) => make("details", {},
    make("summary", {}, `examples of gate ${one.gate}, up ${one.up}`),
    make("ol", {}, ...one.examples.map((example) => make("li", {},
      make("span", { class: "output" }, `${rounded(example.gate)}, ${rounded(example.up)} → ${rounded(example.product)} `),
      make("code", {}, "…" + visible(example.before), make("mark", {}, visible(example.token) || "∅"), visible(example.after) + "…"))))));
  return make("div", { class: "unit" }, make("h4", {}, "Gate and up together"), names,
    make("div", { class: "scroll", role: "region", "aria-label": "signs of gate and up", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))),
    make("p", { class: "quiet" }, "Examples have the largest products, by size: gate, up → product."), ...examples);
}

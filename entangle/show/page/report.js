"use strict";

// The page is one file: its data are in script elements, deflated and in base64.
async function unpack(element) {
  const packed = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  element.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Bytes are stored plane by plane, the lowest first; absent low planes are zeros.
function numbers(bytes, Kind) {
  const count = Kind === Uint32Array ? bytes.length / 4 : bytes.length / 3;
  const planes = bytes.length / count;
  const whole = new Uint8Array(4 * count);
  for (let plane = 0; plane < planes; plane++) {
    for (let i = 0; i < count; i++) whole[4 * i + plane + 4 - planes] = bytes[plane * count + i];
  }
  return new Kind(whole.buffer);
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (x) => {
  if (!Number.isFinite(x)) return "–";
  if (x !== 0 && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3)) return x.toExponential(2);
  return Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(4)));
};
const distanceOrShort = (key, x) => (key.startsWith("wasserstein") && Number.isFinite(x) ? x.toFixed(4) : short(x));
const percent = (x) => `${(100 * x).toFixed(1)}%`;
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

const COLUMNS = [
  ["wasserstein", "W1 (std)"], ["wasserstein_error", "± bound"], ["wasserstein_bulk", "W1 of the bulk"],
  ["far_variance", "variance beyond 6 std"], ["mean", "mean"], ["std", "std"],
  ["skewness", "skewness"], ["kurtosis", "excess kurtosis"], ["modes", "modes"], ["min", "min"],
  ["max", "max"],
];
const INFERNO = ["#000004", "#160b39", "#420a68", "#6a176e", "#932667", "#bc3754", "#dd513a", "#f37819", "#fca50a", "#f6d746", "#fcffa4"];
const KINDS = ["", "outliers", "shape"]; // of what makes a distance
const OF_EACH_KIND = 8; // neurons in the first table
const ROWS = 50; // of the table at first, and more by as many

class Explorer {
  static async open(root) {
    const held = {};
    for (const element of [...root.querySelectorAll("script[data-name]")]) {
      held[element.dataset.name] = await unpack(element);
    }
    const header = JSON.parse(new TextDecoder().decode(held.header));
    const explorer = new Explorer(root, header, held);
    explorer.build();
    return explorer;
  }

  constructor(root, header, held) {
    Object.assign(this, { root, header, sketch: held.sketch, modes: held.modes, kinds: held.kind });
    this.index = numbers(held.index, Uint32Array);
    for (const name of ["wasserstein", "wasserstein_error", "mean", "std", "skewness", "kurtosis", "min", "max", "low", "high", "highest", "wasserstein_bulk", "far_variance"]) {
      this[name] = numbers(held[name], Float32Array);
    }
    this.count = this.index.length;
    this.layerOf = new Uint16Array(this.count);
    let first = 0;
    header.layers.forEach((layer, place) => {
      layer.first = first;
      this.layerOf.fill(place, first, (first += layer.shown));
    });
    this.names = Array.from(this.index, (index, row) => `${header.layers[this.layerOf[row]].name}:${index}`);
    this.current = null;
  }

  build() {
    this.root.replaceChildren();
    this.status = make("output", { class: "status", "aria-live": "polite" });
    this.panels = make("div", { class: "panels" });
    this.neuron = make("aside", { class: "neuron", "aria-label": "one neuron", tabindex: "-1" });
    this.neuron.addEventListener("keydown", (event) => { if (event.key === "Escape") this.back(); });
    this.tableBox = make("div");
    const top = Math.sqrt(quantile(this.wasserstein, 0.998)) || 1;
    this.root.append(
      make("div", { class: "columns" },
        make("div", {},
          make("h3", {}, "Every neuron"),
          make("p", { class: "quiet" }, "A panel for each kind of layer: a row per block, or for each expert of a block, neurons from the most entangled on the left. Hover to read a neuron, click to open it; drag to zoom, double-click to go back. With the keyboard: arrow keys move, Enter opens."),
          legend(top), this.panels, this.status),
        this.neuron),
      this.tableBox);
    const roles = [...new Set(this.header.layers.map((layer) => layer.panel))];
    this.heatmaps = roles.map((role) => new Heatmap(this, role, top));
    for (const heatmap of this.heatmaps) heatmap.draw(); // once all are in their places
    this.table = new Table(this);
  }

  label(row) {
    return `${this.names[row]}  W1 ${this.wasserstein[row].toFixed(4)} std`;
  }

  showStatus(row) {
    this.status.textContent = this.label(row);
  }

  // Show one neuron; with `jump` scroll to it if the page has one column.
  select(row, jump = true) {
    this.current = row;
    if (jump && !this.neuron.contains(document.activeElement)) this.from = document.activeElement;
    this.showStatus(row);
    this.drawNeuron(row);
    for (const heatmap of this.heatmaps) heatmap.mark(row);
    this.table.mark();
    if (jump) {
      const section = this.root.closest("section").id;
      const alone = document.querySelectorAll(".explorer").length === 1;
      history.replaceState(null, "", `#${alone ? "" : `${section}/`}${this.names[row]}`);
      if (matchMedia("(max-width: 68rem)").matches) this.neuron.scrollIntoView();
      this.neuron.focus({ preventScroll: true });
    }
  }

  described(row) {
    return this.header.descriptions[this.names[row]] ?? "";
  }

  // To where the neuron was opened from, which on a phone is a long way up or down.
  back() {
    if (!this.from?.isConnected) return;
    this.from.focus({ preventScroll: true });
    this.from.scrollIntoView({ block: "center" });
  }

  // The rows of a kind with the largest values, largest first.
  largest(kind, values, count) {
    const rows = [];
    for (let row = 0; row < this.count; row++) {
      if (KINDS[this.kinds[row]] === kind && Number.isFinite(values[row])) rows.push(row);
    }
    return rows.sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
  }

  // The neuron that is open at first: the one with the most conspicuous shape, if any is known.
  first() {
    const shapes = this.largest("shape", this.wasserstein_bulk, 1);
    if (shapes.length) return shapes[0];
    let first = 0;
    for (let i = 1; i < this.count; i++) if (this.wasserstein[i] > this.wasserstein[first]) first = i;
    return first;
  }

  heights(row) {
    const bars = this.header.bars, found = new Float64Array(bars);
    let level = 0;
    for (let bar = 0; bar < bars; bar++) {
      level = (level + this.sketch[bar * this.count + row]) & 255;
      found[bar] = (level / this.header.levels) * this.highest[row]; // a share of the tokens
    }
    return found;
  }

  gaussian(row, x) {
    const z = (x - this.mean[row]) / this.std[row];
    return Math.exp(-z * z / 2) / (this.std[row] * Math.sqrt(2 * Math.PI));
  }

  // A histogram over its fitted Gaussian, small enough for a line of the table.
  small(row) {
    const heights = this.heights(row), bars = heights.length;
    const width = (this.high[row] - this.low[row]) / bars;
    const fit = Array.from(heights, (_, bar) => width * this.gaussian(row, this.low[row] + (bar + 0.5) * width));
    const top = Math.max(...heights, ...fit);
    const place = (value) => (22 - 22 * value / top).toFixed(1);
    const outline = Array.from(heights, (value, bar) => `H${2 * bar}V${place(value)}`).join("");
    const line = fit.map((value, bar) => `${2 * bar + 1},${place(value)}`).join(" ");
    const box = make("div");
    box.innerHTML = `<svg class="small" width="${2 * bars}" height="23" aria-hidden="true"><path class="bar" d="M0 22${outline}H${2 * bars}V22Z"/><polyline class="fit" points="${line}"/></svg>`;
    return box.firstChild;
  }

  drawNeuron(row) {
    const name = this.names[row], layer = this.header.layers[this.layerOf[row]];
    const rank = row - layer.first + 1;
    const facts = make("dl");
    for (const [key, label] of COLUMNS) {
      const text = distanceOrShort(key, this[key][row]);
      facts.append(make("div", {}, make("dt", {}, label), make("dd", {}, text)));
    }
    this.picture = make("div", { class: "picture", role: "img", "aria-label": `histogram of the ${layer.side}s of ${name} over the fitted Gaussian` });
    this.neuron.replaceChildren(
      make("h3", {}, name),
      make("p", { class: "quiet" }, `rank ${rank.toLocaleString("en")} of the ${layer.neurons.toLocaleString("en")} ${layer.side === "input" ? "inputs" : "neurons"} of its layer, on ${layer.tokens.toLocaleString("en")} tokens`),
      this.picture, facts, inWords(this.header, name), this.contexts(name));
    const back = make("button", { type: "button", class: "plain" }, "back to where it was opened");
    back.addEventListener("click", () => this.back());
    this.neuron.append(back);
    this.drawPicture();
  }

  drawPicture() {
    const row = this.current, heights = this.heights(row), bars = heights.length;
    const side = this.header.layers[this.layerOf[row]].side;
    const width = (this.high[row] - this.low[row]) / bars;
    const middles = Array.from(heights, (_, bar) => this.low[row] + (bar + 0.5) * width);
    const fine = Array.from({ length: 201 }, (_, i) => this.low[row] + (i / 200) * (this.high[row] - this.low[row]));
    // The axis follows the bulk; what is beyond it is told at its ends.
    const std = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)} std`;
    const tails = [];
    for (const [right, end, farthest] of [[0, this.low[row], this.min[row]], [1, this.high[row], this.max[row]]]) {
      if (right ? farthest <= end : farthest >= end) continue;
      const words = `to ${std((farthest - this.mean[row]) / this.std[row])}`;
      tails.push({ xref: "paper", yref: "paper", x: right, xanchor: right ? "right" : "left", y: 1, yanchor: "top", showarrow: false, text: right ? `${words} ▸` : `◂ ${words}`, font: { size: 11, color: colour("--ink") } });
    }
    Plotly.react(this.picture, [
      { type: "bar", x: middles, y: Array.from(heights, (share) => share / width), width: width, marker: { color: colour("--bar") }, name: `${side}s`, hovertemplate: `${side} %{x:.4g}: density %{y:.4g}<extra></extra>` },
      { type: "scatter", mode: "lines", x: fine, y: fine.map((x) => this.gaussian(row, x)), line: { color: colour("--fit"), width: 2, simplify: false }, name: "fitted Gaussian", hoverinfo: "skip" },
    ], layout({
      height: 270, margin: { l: 64, r: 8, t: 30, b: 40 }, bargap: 0,
      xaxis: { title: { text: `${side} (${side} units)` }, range: [this.low[row], this.high[row]] }, yaxis: { title: { text: "density" } },
      annotations: tails,
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    }), CONFIG);
  }

  contexts(name) {
    const found = this.header.contexts[name], box = make("div");
    if (!found) {
      box.append(make("p", { class: "quiet" }, "The contexts of this neuron are missing. To see the tokens behind its distance, run ", make("code", {}, `entangle contexts RUN ${name}`), " and write the report again."));
      return box;
    }
    const side = this.header.layers[this.layerOf[this.names.indexOf(name)]].side;
    if (found.shown) box.append(colouredWindows(found, this.header.windows, side));
    else box.append(make("p", { class: "quiet" }, "An older version found these contexts. To see whole windows in colour, run ", make("code", {}, `entangle contexts RUN ${name}`), " again."));
    if (found.unit) box.append(signCases(found.unit, name));
    const interval = found.low === null ? "" : `, 95% interval ${found.low.toFixed(4)} to ${found.high.toFixed(4)}`;
    box.append(make("h4", {}, "Origin of the distance"), make("p", {}, `Exact W1 ${found.wasserstein.toFixed(4)}${interval} (${found.tokens.toLocaleString("en")} tokens, bootstrap of windows).`));
    const without = make("ol");
    for (const left of found.without) {
      const rest = left.wasserstein === null ? "no distance" : `W1 ${left.wasserstein.toFixed(4)}`;
      without.append(make("li", {}, make("b", {}, rest), ` without ${visible(left.what)} (${left.tokens.toLocaleString("en")} tokens, ${percent(left.variance)} of the variance)`));
    }
    const tokens = make("p", {}, "Shares of the distance by frequent tokens: ");
    found.frequent.forEach((one, place) => tokens.append(place ? ", " : "", make("code", {}, make("mark", {}, visible(one.token) || "∅")), ` ${percent(one.share)}`));
    const positions = make("div");
    const most = Math.max(...found.positions), size = 240 / found.positions.length;
    const bars = found.positions.map((share, i) => `M${i * size} 40v${(-36 * share / most).toFixed(1)}h${0.9 * size}V40Z`).join("");
    positions.innerHTML = `<svg class="small" width="240" height="41" role="img" aria-label="shares of the distance over the window, from ${percent(Math.min(...found.positions))} to ${percent(most)} in each of ${found.positions.length} parts"><path class="bar" d="${bars}"/></svg>`;
    box.append(without, tokens, make("p", { class: "quiet" }, `Shares of the distance over the window, in ${found.positions.length} parts, the largest ${percent(most)}:`), positions, make("h4", {}, "Tokens in their text"));
    const texts = make("div", { class: "texts", role: "region", "aria-label": "tokens in their text", tabindex: "0" });
    box.append(texts);
    let why = null, list = null;
    for (const one of found.contexts) {
      if (one.why !== why) {
        why = one.why;
        list = make("ol");
        texts.append(make("h5", {}, why), list);
      }
      list.append(make("li", {},
        make("span", { class: "output" }, `${short(one.output)} (${one.deviation >= 0 ? "+" : ""}${one.deviation.toFixed(1)} std) `),
        make("code", {}, "…" + visible(one.before), make("mark", {}, visible(one.token) || "∅"), visible(one.after) + "…"),
        make("span", { class: "output" }, ` window ${one.window}, position ${one.position}`)));
    }
    return box;
  }

  recolour() {
    if (this.current !== null) this.drawPicture();
    for (const heatmap of this.heatmaps) heatmap.recolour();
  }
}

const CONFIG = { displayModeBar: false, responsive: true };

function layout(own) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: 12, family: "system-ui, sans-serif" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...own, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis },
  };
}

function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

// The colour bar of all heatmaps: colours go by the square root of the distance.
function legend(top) {
  const most = top * top;
  const ticks = make("div", { class: "ticks" });
  for (const part of [0, 0.05, 0.2, 0.5, 1]) {
    ticks.append(make("span", { style: `left:${100 * Math.sqrt(part)}%` }, String(Number((part * most).toPrecision(2)))));
  }
  return make("div", { class: "legend" },
    make("span", {}, "distance to a Gaussian (std)"),
    make("div", { class: "scale" }, make("div", { class: "ramp", style: `background:linear-gradient(90deg,${INFERNO.join(",")})` }), ticks),
    make("span", { class: "quiet" }, "and larger"));
}

const rowName = (layer) => (layer.expert === null ? String(layer.block) : `${layer.block}.${layer.expert}`);

class Heatmap {
  constructor(explorer, role, top) {
    Object.assign(this, { explorer, role });
    this.layers = explorer.header.layers.filter((layer) => layer.panel === role);
    this.ofExperts = this.layers.some((layer) => layer.expert !== null);
    const kind = this.layers[0].side === "input" ? "inputs" : "neurons";
    this.wide = Math.max(...this.layers.map((layer) => layer.shown), 1);
    // Square roots of ranks: the few at the left are wide enough to point at.
    this.edges = Array.from({ length: this.wide + 1 }, (_, rank) => Math.sqrt(rank / this.wide));
    this.z = [];
    this.text = [];
    for (const layer of this.layers) {
      const rows = Array.from({ length: this.wide }, (_, rank) => (rank < layer.shown ? layer.first + rank : null));
      this.z.push(rows.map((row) => (row === null ? null : Math.sqrt(explorer.wasserstein[row]))));
      this.text.push(rows.map((row) => (row === null ? "" : `${explorer.names[row]}<br>W1 ${explorer.wasserstein[row].toFixed(4)} std`)));
    }
    const size = [...new Set(this.layers.map((layer) => layer.neurons))].map((n) => n.toLocaleString("en")).join(" or ");
    this.plot = make("div", { tabindex: "0", role: "application", "aria-roledescription": "heatmap", "aria-label": `${role}: ${this.layers.length} ${this.ofExperts ? "experts of blocks" : "blocks"}, ${size} ${kind} each, most entangled first; arrow keys move, Enter opens a neuron` });
    this.box = make("div", { class: "panel" }, make("h4", {}, `${role} `, make("small", {}, `${size} ${kind}`)), this.plot);
    explorer.panels.append(this.box);
    this.top = top;
    this.place = [0, 0];
    this.layers.forEach((layer, place) => {
      const first = this.layers[this.place[0]];
      if (layer.shown && (!first.shown || explorer.wasserstein[layer.first] > explorer.wasserstein[first.first])) this.place = [place, 0];
    });
  }

  draw() {
    const { explorer, z, text, top } = this;
    Plotly.newPlot(this.plot, [{
      type: "heatmap", x: this.edges, y: this.layers.map((_, place) => place), z, text,
      hovertemplate: "%{text}<extra></extra>", colorscale: INFERNO.map((tint, i) => [i / (INFERNO.length - 1), tint]),
      zmin: 0, zmax: top, showscale: false, hoverongaps: false,
    }], layout(this.layout()), CONFIG);
    const rowOf = (event) => this.row(event.points[0].pointNumber);
    this.plot.on("plotly_hover", (event) => explorer.showStatus(rowOf(event)));
    this.plot.on("plotly_click", (event) => {
      this.place = event.points[0].pointNumber;
      this.plot.focus({ preventScroll: true });
      explorer.select(rowOf(event));
    });
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.plot.addEventListener("focus", () => this.point(this.row(this.place)));
  }

  layout() {
    const step = Math.max(1, Math.ceil(this.layers.length / 8));
    const shown = this.layers.map((_, place) => place).filter((place) => place % step === 0);
    const parts = [0, 0.01, 0.1, 0.25, 0.5, 1];
    return {
      height: 90 + Math.max(60, Math.min(10 * this.layers.length, 200)), margin: { l: this.ofExperts ? 56 : 40, r: 12, t: 6, b: 40 },
      xaxis: { range: [0, 1], tickvals: parts.map(Math.sqrt), ticktext: parts.map((part) => `${100 * part}%`), title: { text: "share of the neurons shown" }, showgrid: false, zeroline: false },
      yaxis: { range: [this.layers.length - 0.5, -0.5], tickvals: shown, ticktext: shown.map((place) => rowName(this.layers[place])), title: { text: this.ofExperts ? "block.expert" : "block" }, showgrid: false, zeroline: false },
      plot_bgcolor: colour("--none"),
    };
  }

  row([place, rank]) {
    return this.layers[place].first + rank;
  }

  // Mark a neuron and show its name; a layer may have no neuron to show.
  point(row) {
    if (!this.layers[this.place[0]].shown) return;
    this.mark(row);
    this.explorer.showStatus(row);
  }

  mark(row) {
    const place = this.layers.findIndex((layer) => row >= layer.first && row < layer.first + layer.shown);
    let shapes = [];
    if (place >= 0) {
      const rank = row - this.layers[place].first;
      this.place = [place, rank];
      shapes = [{ type: "rect", x0: this.edges[rank], x1: this.edges[rank + 1], y0: place - 0.5, y1: place + 0.5, line: { color: "#19e0ff", width: 2 } }];
    }
    Plotly.relayout(this.plot, { shapes });
  }

  move(event) {
    const [place, rank] = this.place, far = event.shiftKey ? Math.ceil(this.wide / 10) : 1;
    const beside = (step) => { // the next layer that has neurons to show, or this one
      let next = place + step;
      while (this.layers[next] && !this.layers[next].shown) next += step;
      return this.layers[next] ? next : place;
    };
    const to = {
      ArrowLeft: [place, rank - far], ArrowRight: [place, rank + far], ArrowUp: [beside(-1), rank],
      ArrowDown: [beside(1), rank], Home: [place, 0], End: [place, this.wide],
    }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.layers[this.place[0]].shown) this.explorer.select(this.row(this.place));
    }
    if (!to) return;
    event.preventDefault();
    const layer = this.layers[to[0]];
    if (!layer.shown) return;
    const row = layer.first + Math.max(0, Math.min(to[1], layer.shown - 1));
    this.point(row);
  }

  recolour() {
    Plotly.relayout(this.plot, layout(this.layout()));
    if (this.explorer.current !== null) this.mark(this.explorer.current);
  }
}

class Table {
  constructor(explorer) {
    this.explorer = explorer;
    this.by = "wasserstein";
    this.falling = true;
    this.shown = ROWS;
    this.search = make("input", { type: "search", placeholder: "such as 11.mlp.down_proj, or up_proj:816, or contexts", autocomplete: "off", spellcheck: "false" });
    this.search.addEventListener("input", () => { this.shown = ROWS; this.fill(); });
    this.found = make("output", { class: "quiet", "aria-live": "polite" });
    this.heads = new Map();
    const head = make("tr", {}, make("th", { scope: "col" }, "neuron"));
    for (const [key, label] of COLUMNS) {
      const button = make("button", { type: "button" }, label);
      button.addEventListener("click", () => this.sort(key));
      const cell = make("th", { scope: "col" }, button);
      this.heads.set(key, cell);
      head.append(cell);
    }
    head.append(make("th", { scope: "col" }, "distribution"));
    this.body = make("tbody");
    this.more = make("button", { type: "button" }, `${ROWS} more`);
    this.more.addEventListener("click", () => { this.shown += ROWS; this.fill(); });
    explorer.tableBox.append(
      make("h3", {}, "Shapes and outliers"),
      make("p", { class: "quiet" }, "A few outliers make a distance by squeezing all other tokens together. Such a distance is less than half as large in the bulk, all tokens but the 1% farthest from the median, or more than half of the variance is beyond 6 std. The other distances are of the shape. Near the noise floor this is an estimate."),
      make("div", { class: "kinds" },
        this.kinds("Shapes", "shape", explorer.wasserstein_bulk),
        this.kinds("Outliers", "outliers", explorer.wasserstein)),
      make("h3", {}, "Ranked"),
      make("div", { class: "ask" }, make("label", {}, "search by layer and index", this.search), this.found),
      make("div", { class: "scroll", role: "region", "aria-label": "ranked neurons", tabindex: "0" },
        make("table", { class: "neurons" }, make("thead", {}, head), this.body)),
      make("p", {}, this.more));
    this.fill();
  }

  // A short table of the neurons of one kind, largest first.
  kinds(title, kind, values) {
    const body = make("tbody"), { explorer } = this;
    for (const row of explorer.largest(kind, values, OF_EACH_KIND)) {
      const open = make("button", { type: "button", class: "plain" }, explorer.names[row]);
      open.addEventListener("click", () => explorer.select(row));
      body.append(make("tr", {}, make("td", {}, open), ...["wasserstein", "wasserstein_bulk"].map((key) => make("td", {}, distanceOrShort(key, explorer[key][row]))), make("td", {}, explorer.small(row))));
    }
    const heads = ["neuron", "W1 (std)", "of the bulk", "distribution"];
    return make("div", {}, make("h4", {}, title),
      make("div", { class: "scroll", role: "region", "aria-label": `${title.toLowerCase()}, largest first`, tabindex: "0" },
        make("table", { class: "kind" }, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))), body)));
  }

  sort(key) {
    this.falling = this.by === key ? !this.falling : true;
    this.by = key;
    this.shown = ROWS;
    this.fill();
  }

  fill() {
    const { explorer } = this, values = explorer[this.by], terms = this.search.value.trim().toLowerCase().split(/\s+/);
    const rows = [];
    for (let row = 0; row < explorer.count; row++) {
      const name = explorer.names[row].toLowerCase() + (explorer.header.contexts[explorer.names[row]] ? " contexts" : "") + explorer.described(row).toLowerCase();
      if (terms.every((term) => name.includes(term))) rows.push(row);
    }
    const sign = this.falling ? -1 : 1;
    const known = (row) => (Number.isNaN(values[row]) ? 1 : 0); // what is not known comes last
    rows.sort((a, b) => known(a) - known(b) || sign * (values[a] - values[b]) || a - b);
    for (const [key, cell] of this.heads) {
      if (key === this.by) cell.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    this.body.replaceChildren(...rows.slice(0, this.shown).map((row) => this.line(row)));
    this.found.textContent = `${rows.length.toLocaleString("en")} neuron${rows.length === 1 ? "" : "s"}, ${Math.min(this.shown, rows.length).toLocaleString("en")} in the table`;
    this.more.hidden = rows.length <= this.shown;
    this.mark();
  }

  line(row) {
    const { explorer } = this, open = make("button", { type: "button", class: "plain" }, explorer.names[row]);
    open.addEventListener("click", () => explorer.select(row));
    const cells = COLUMNS.map(([key]) => make("td", {}, distanceOrShort(key, explorer[key][row])));
    const known = explorer.header.contexts[explorer.names[row]] ? [" ", make("small", {}, "contexts")] : [];
    const told = explorer.described(row) ? [make("div", { class: "told" }, explorer.described(row))] : [];
    return make("tr", { "data-row": row }, make("td", {}, open, ...known, ...told), ...cells, make("td", {}, explorer.small(row)));
  }

  mark() {
    for (const line of this.body.children) {
      line.setAttribute("aria-current", String(Number(line.dataset.row) === this.explorer.current));
    }
  }
}

function neuronOf(hash) {
  try {
    return decodeURIComponent(hash);
  } catch {
    return hash; // no link of ours
  }
}

(async () => {
  const boxes = [...document.querySelectorAll(".explorer")];
  try {
    const library = new TextDecoder().decode(await unpack(document.getElementById("plotly")));
    document.head.append(Object.assign(make("script"), { textContent: library }));
    const explorers = [];
    for (const box of boxes) explorers.push(await Explorer.open(box));
    const [, section, wanted] = /^(?:(run-\d+)\/)?(.*)$/s.exec(neuronOf(location.hash.slice(1)));
    let linked = null;
    for (const explorer of explorers) {
      const elsewhere = section && explorer.root.closest("section").id !== section;
      const row = elsewhere ? -1 : explorer.names.indexOf(wanted);
      linked ??= row >= 0 ? explorer : null;
      explorer.select(row >= 0 ? row : explorer.first(), explorer === linked);
    }
    if (wanted.includes(":") && !linked) explorers[0].status.textContent = `The link names ${wanted}, which is not shown here.`;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => explorers.forEach((one) => one.recolour()));
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    for (const box of boxes) {
      box.querySelector(".loading")?.replaceWith(make("p", { class: "notes" }, `This browser cannot unpack the page (${error.message}): use a browser of 2023 or newer.`));
    }
    throw error;
  }
})();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const symbols = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left", "triangle-right",
  "hexagon", "pentagon"];
const dashes = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot"];
let chosen = null;

const number = (value, digits = 3) => (value === null || value === undefined ? "" : value.toFixed(digits));
const task = () => data.tasks[byId("task").value];
const element = (name, text, attributes = {}) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const fill = (select, pairs, value) => {
  select.replaceChildren(...pairs.map(([key, text]) => element("option", text, { value: key })));
  if (value !== undefined) select.value = value;
};
const interval = (value, low, high) =>
  low === null || low === undefined || value === null || value === undefined ? number(value) : `${number(value)} [${number(low)}, ${number(high)}]`;
const setting = (point) =>
  point.family === "exits" ? `threshold ${point.value}` : point.family === "pruning" ? `${point.value} blocks` :
    point.family === "static" ? `exit ${point.value}` : "";

function drawChart() {
  const shown = task(), metric = byId("metric").value, axis = byId("axis").value;
  const narrow = byId("chart").clientWidth < 640;
  const score = (point) => point.scores[metric][0];
  const full = shown.points[0];
  const traces = [];
  const best = shown.fronts[metric][axis].map((i) => shown.points[i]);
  traces.push({ x: best.map((p) => p.at[axis]), y: best.map(score), mode: "lines", hoverinfo: "skip", showlegend: false,
    line: { color: "rgba(140,140,140,.3)", width: 10 } });
  const ends = [];
  shown.lines.forEach((line, i) => {
    const points = shown.points.filter((p) => p.line === line && p.valid).sort((a, b) => a.value - b.value);
    if (!points.length) return;
    const colour = data.colours[i % data.colours.length];
    traces.push({
      x: points.map((p) => p.at[axis]), y: points.map(score), name: line, mode: "lines+markers",
      customdata: points.map((p) => p.name),
      text: points.map((p) => `<b>${line}</b>, ${setting(p)}<br>score ${number(score(p))} ± ${number(p.scores[metric][1])}` +
        `<br>${data.axes[axis]} ${number(p.at[axis])}<br>same texts ${number(p.consistency.consistency_exact)}`),
      hovertemplate: "%{text}<extra></extra>",
      error_y: { type: "data", array: points.map((p) => p.scores[metric][1] || 0), thickness: 0.7, width: 2 },
      line: { color: colour, dash: dashes[i % dashes.length], width: 1.8 },
      marker: { color: colour, symbol: symbols[i % symbols.length], size: 9 },
    });
    const last = points.reduce((a, b) => (b.at[axis] > a.at[axis] ? b : a));
    ends.push({ height: score(last), text: line, colour });
  });
  traces.push({ x: [1], y: [score(full)], name: "full model", mode: "markers", customdata: ["full"],
    text: [`<b>full model</b><br>score ${number(score(full))} ± ${number(full.scores[metric][1])}`],
    hovertemplate: "%{text}<extra></extra>", marker: { color: "#000", symbol: "star", size: 15 } });
  const annotations = narrow ? [] : nameLines(ends, traces);
  const layout = {
    margin: { l: 60, r: narrow ? 10 : 160, t: 10, b: narrow ? 120 : 55 }, hovermode: "closest", showlegend: narrow,
    legend: { orientation: "h", y: -0.22, font: { size: 11 } }, annotations,
    xaxis: { title: { text: `${data.axes[axis]} (times)` }, gridcolor: "#e5e8eb", zeroline: false },
    yaxis: { title: { text: shown.metrics[metric] }, autorange: shown.higher_is_better[metric] ? true : "reversed", gridcolor: "#e5e8eb", zeroline: false },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: score(full), y1: score(full),
      line: { color: "#555", width: 1, dash: "dot" } }],
    font: { family: "system-ui, sans-serif", color: "#1b1f24" },
  };
  Plotly.react("chart", traces, layout, { responsive: true, displaylogo: false });
  const chart = byId("chart");
  chart.removeAllListeners("plotly_click");
  chart.on("plotly_click", (event) => {
    const name = event.points[0].customdata;
    if (name) choose(name);
  });
}

// Names right of the plot, at the height of each line's end, moved apart where they would touch.
function nameLines(ends, traces) {
  const heights = traces.flatMap((trace) => trace.y);
  const gap = Math.max(Math.max(...heights) - Math.min(...heights), 1e-6) * 0.05;
  let place = -Infinity;
  return ends.sort((a, b) => a.height - b.height).map((end) => {
    place = Math.max(end.height, place + gap);
    return { x: 1, xref: "paper", xanchor: "left", xshift: 6, y: place, text: end.text, showarrow: false,
      font: { color: end.colour, size: 12 } };
  });
}

function drawTable() {
  const shown = task(), metric = byId("metric").value;
  const pairs = shown.pairs[metric] ?? {}, without = shown.without[metric] ?? {};
  const columns = ["point", shown.metrics[metric], "±", "minus full model", "p (Holm)", ...Object.values(data.axes), "without loops", "left out", "mean exit layer", "tokens", "repeating",
    "same texts", "ROUGE-L"];
  const head = element("tr");
  head.append(...columns.map((text) => element("th", text, { scope: "col" })));
  const body = shown.points.map((point) => {
    const row = element("tr", undefined, { "data-name": point.name });
    const name = element("td"), button = element("button", point.family === "full" ? "full model" : `${point.line}, ${setting(point)}`,
      { type: "button" });
    button.addEventListener("click", () => choose(point.name));
    name.append(button);
    const pair = pairs[point.name];
    const difference = pair ? interval(pair.difference, pair.low, pair.high) : "";
    const kept = without[point.name], known = shown.intervals[point.name] ?? {};
    const of = (name, value) => interval(value, known[`${name}_low`], known[`${name}_high`]);
    const cells = [number(point.scores[metric][0]), number(point.scores[metric][1]), difference, pair ? number(pair.p_holm) : "",
      ...Object.keys(data.axes).map((axis) => of(axis, point.at[axis])),
      kept ? interval(kept.vs_full, kept.vs_full_low, kept.vs_full_high) : "", kept ? String(kept.left_out) : "", number(point.mean_exit_layer, 1), number(point.tokens, 1),
      number(point.degenerate, 2), of("consistency_exact", point.consistency.consistency_exact),
      of("consistency_rouge_l", point.consistency.consistency_rouge_l)];
    row.append(name, ...cells.map((text) => element("td", text)));
    row.classList.toggle("invalid", !point.valid);
    const within = point.within_noise[metric];
    if (within) row.title = `no further from the full model than that is from itself, with other rows in flight, in ${within}`;
    if (point.only_rounding) row.title = "no token left early; answers that differ from the full model's do so by rounding";
    if (!point.valid) row.title = "too many of its texts repeat themselves or hit the token limit; left out of the lines";
    return row;
  });
  const table = byId("points"), top = element("thead"), rest = element("tbody");
  top.append(head);
  rest.append(...body);
  table.replaceChildren(top, rest);
  markChosen();
}

function colourOf(layer, depth, first) {
  const share = depth > first ? (depth - layer) / (depth - first) : 0;
  return `hsl(205 75% ${Math.round(97 - 42 * share)}%)`;
}

function choose(name) {
  chosen = name;
  markChosen();
  drawDetails();
  byId("details").focus({ preventScroll: true });
  byId("details").scrollIntoView({ block: "start", behavior: "smooth" });
}

function markChosen() {
  for (const row of byId("points").querySelectorAll("tbody tr")) row.classList.toggle("chosen", row.dataset.name === chosen);
}

function drawDetails() {
  const shown = task(), details = byId("details");
  const point = shown.points.find((p) => p.name === chosen);
  details.replaceChildren();
  if (!point) return;
  const metric = byId("metric").value;
  details.append(element("h2", point.family === "full" ? "Full model" : `${point.line}, ${setting(point)}`));
  const list = element("dl");
  const facts = { [shown.metrics[metric]]: `${number(point.scores[metric][0])} ± ${number(point.scores[metric][1])}` };
  for (const [axis, label] of Object.entries(data.axes)) facts[label] = number(point.at[axis]);
  facts["mean exit layer"] = point.mean_exit_layer === null ? "nothing could exit" : `${number(point.mean_exit_layer, 1)} of ${shown.depth}`;
  facts["texts equal to the full model's"] = number(point.consistency.consistency_exact);
  if (!point.valid) facts["left out"] = "too many texts repeat themselves";
  for (const [key, value] of Object.entries(facts)) list.append(element("dt", key), element("dd", value));
  details.append(list);
  if (!point.samples.length) {
    details.append(element("p", "All answers are those of the full model."));
    return;
  }
  const layers = point.samples.flatMap((s) => (s.tokens || []).map(([, layer]) => layer));
  const first = Math.min(...layers, shown.depth);
  details.append(element("h3", `Where it differs from the full model (${point.samples.length} documents shown)`));
  if (layers.length) {
    const scale = element("p", "Blocks that gave a token:", { class: "scale" });
    for (const layer of [...new Set(layers)].sort((a, b) => a - b)) {
      const mark = element("span", String(layer), { class: "token" });
      mark.style.background = colourOf(layer, shown.depth, first);
      scale.append(mark);
    }
    details.append(scale);
  }
  for (const sample of point.samples) {
    const box = element("article", undefined, { class: "sample" });
    const add = (role, text) => {
      const line = element("p");
      line.append(element("span", role, { class: "role" }), text);
      box.append(line);
    };
    add("prompt", sample.prompt);
    add("full model", sample.full);
    if (sample.tokens) {
      const strip = document.createDocumentFragment();
      for (const [text, layer] of sample.tokens) {
        const token = element("span", text, { class: "token", title: `after ${layer} blocks` });
        token.style.background = colourOf(layer, shown.depth, first);
        strip.append(token);
      }
      add("this point", strip);
    } else add("this point", sample.ours);
    add("expected", sample.target);
    details.append(box);
  }
}

function showTask() {
  const shown = task();
  fill(byId("metric"), Object.entries(shown.metrics), shown.metric);
  chosen = null;
  draw();
}
function draw() {
  drawChart();
  drawTable();
  drawDetails();
}

if (data.missing.length) {
  byId("missing").textContent = `Not finished yet, and left out: ${data.missing.join(", ")}`;
  byId("missing").hidden = false;
}
fill(byId("task"), data.tasks.map((t, i) => [i, `${t.title} (${t.documents} documents)`]));
fill(byId("axis"), Object.entries(data.axes));
byId("task").addEventListener("change", showTask);
byId("metric").addEventListener("change", draw);
byId("axis").addEventListener("change", draw);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
let width = window.innerWidth;
window.addEventListener("resize", () => { if (width !== window.innerWidth) { width = window.innerWidth; drawChart(); } });
showTask();

// The curves. Plotly draws; ranges, joined points and labels are decided here and in curves.py.
const NORMAL = 1.959964; // a 95 % interval in standard errors
const score = (point) => point.scores[state.metric][0];
const plain = { displayModeBar: false };
let isDrawn = false; // Plotly is there

const barOf = (point) => {
  const spread = point.scores[state.metric][1];
  return known(spread) ? [score(point) - NORMAL * spread, score(point) + NORMAL * spread] : [null, null];
};
const lengths = (points, value, bar) => ({
  type: "data", symmetric: false, thickness: 1, width: 0,
  array: points.map((p) => Math.max((bar(p)[1] ?? value(p)) - value(p), 0)),
  arrayminus: points.map((p) => Math.max(value(p) - (bar(p)[0] ?? value(p)), 0)),
});
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function hoverOf(point) {
  const bar = barOf(point), lines = [`<b>${escaped(titleOf(point))}</b>`];
  lines.push(`${escaped(task().metrics[state.metric])} ${number(score(point))} ${range(...bar)}`);
  for (const [axis, label] of Object.entries(data.axes)) lines.push(`${label} ${times(point.at[axis])} ${range(...point.bars[axis])}`);
  if (known(point.mean_exit_layer)) lines.push(`mean exit layer ${number(point.mean_exit_layer, 1)} of ${task().depth}`);
  if (known(point.tokens)) lines.push(`${number(point.tokens, 1)} tokens per answer`);
  if (known(point.consistency.consistency_exact)) lines.push(`same as the full model ${percent(point.consistency.consistency_exact)}`);
  if (!point.valid) lines.push(`<b>left out:</b> ${escaped(point.invalid_because)}`);
  if (point.within_noise[state.metric]) lines.push(`within rounding in ${point.within_noise[state.metric]}`);
  return lines.join("<br>");
}

function drawChart() {
  if (!isDrawn) return;
  const shown = task(), chart = byId("chart"), axis = state.x, full = shown.points[0], ink = colour("ink"), soft = colour("soft");
  const at = (p) => p.at[axis], visible = shown.points.filter((p) => p !== full && isShown(p) && shown.lines.includes(p.line));
  const best = shown.fronts[state.metric][axis].map((i) => shown.points[i]), quiet = { hoverinfo: "skip", showlegend: false };
  const veil = visible.length > 24 ? "40" : "70"; // of bars, which cover each other where there are many
  // A front of one point would be hidden by its marker.
  const traces = best.length < 2 ? [] : [{ ...quiet, x: best.map(at), y: best.map(score), mode: "lines+markers", line: { color: colour("front"), width: 11 },
    marker: { color: colour("front"), size: 11 } }];
  for (const line of shown.lines.filter((name) => !state.hidden.has(name))) {
    const style = styleOf(line), points = visible.filter((p) => p.line === line);
    const through = shown.joined[line][state.metric][axis].map((i) => shown.points[i]).filter((p) => p === full || points.includes(p));
    if (through.length > 1)
      traces.push({ ...quiet, x: through.map(at), y: through.map(score), mode: "lines", line: { color: style.colour, dash: style.dash, width: 1.8 } });
    if (points.length)
      traces.push({ showlegend: false, x: points.map(at), y: points.map(score), mode: "markers", customdata: points.map((p) => p.name),
        text: points.map(hoverOf), hovertemplate: "%{text}<extra></extra>",
        error_x: { ...lengths(points, at, (p) => p.bars[axis]), color: style.colour + veil }, error_y: { ...lengths(points, score, barOf), color: style.colour + veil },
        marker: { color: style.colour, size: 9, symbol: points.map((p) => style.symbol + (p.valid ? "" : "-open")), line: { width: points.map((p) => (p.valid ? 0 : 1.6)), color: style.colour } } });
  }
  traces.push({ showlegend: false, x: [at(full)], y: [score(full)], mode: "markers", customdata: [full.name], text: [hoverOf(full)],
    hovertemplate: "%{text}<extra></extra>", marker: { color: ink, symbol: "star", size: 15 } });
  for (const [name, letter] of [[state.point, "first"], [state.compare, "second"]]) {
    const point = name && pointOf(name);
    if (point) traces.push({ ...quiet, x: [at(point)], y: [score(point)], mode: "markers", marker: { symbol: "circle-open", size: 21, color: colour(letter), line: { width: 2.5 } } });
  }
  const margin = { l: 62, r: 14, t: 8, b: 46 }, [low, high] = shown.ranges.y[state.metric], higher = shown.higher_is_better[state.metric];
  const grid = { gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), ticks: "outside", tickcolor: colour("line"), tickfont: { size: 12 }, automargin: false };
  const ranges = { x: shown.ranges.x[axis], y: higher ? [low, high] : [high, low] };
  const layout = {
    width: chart.clientWidth, height: chart.clientHeight, margin, hovermode: "closest", showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", color: ink, size: 13 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: soft, font: { color: ink, size: 12.5 }, align: "left" },
    xaxis: { ...grid, title: { text: `${data.axes[axis]} (×)`, standoff: 8 }, range: ranges.x, nticks: chart.clientWidth < 500 ? 5 : 9 },
    yaxis: { ...grid, title: { text: shown.metrics[state.metric] + (higher ? "" : " (less is better)"), standoff: 8 }, range: ranges.y },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: score(full), y1: score(full), layer: "below", line: { color: soft, width: 1, dash: "dot" } }],
  };
  const labelsIn = (found) => labels(shown.labelled.map((i) => shown.points[i]).filter((p) => visible.includes(p)), [full, ...visible], found,
    { width: chart.clientWidth - margin.l - margin.r, height: chart.clientHeight - margin.t - margin.b });
  layout.annotations = labelsIn(ranges);
  Plotly.react(chart, traces, layout, plain);
  for (const name of ["plotly_click", "plotly_relayout"]) chart.removeAllListeners(name);
  // Where there is more room, more points bear their setting.
  chart.on("plotly_relayout", (event) => {
    if (Object.keys(event).some((key) => key.startsWith("xaxis.") || key.startsWith("yaxis.")))
      Plotly.relayout(chart, { annotations: labelsIn({ x: chart.layout.xaxis.range, y: chart.layout.yaxis.range }) });
  });
  chart.on("plotly_click", (event) => {
    const name = event.points[0].customdata;
    if (!name) return;
    if (event.event.shiftKey && state.point) compareWith(name);
    else choose(name);
  });
}

// Settings beside their markers, where they cover neither another label nor a marker; all distances are in pixels. What
// finds no place is left to the pointer, but for the chosen points.
function labels(points, all, ranges, size) {
  const pixel = (p) => [((p.at[state.x] - ranges.x[0]) / (ranges.x[1] - ranges.x[0])) * size.width,
    ((score(p) - ranges.y[0]) / (ranges.y[1] - ranges.y[0])) * size.height];
  const taken = all.map((p) => [...pixel(p), 5, 5]);
  const covered = ([x, y, w, h]) => taken.reduce((sum, [x2, y2, w2, h2]) => sum + Math.max(0, w + w2 - Math.abs(x - x2)) * Math.max(0, h + h2 - Math.abs(y - y2)), 0) +
    1e3 * (Math.max(0, w - x) + Math.max(0, x + w - size.width) + Math.max(0, h - y) + Math.max(0, y + h - size.height));
  const veil = colour("panel").replace("rgb(", "rgba(").replace(")", ", 0.7)");
  const chosen = chosenPoints(), isIn = ([x, y]) => x >= 0 && y >= 0 && x <= size.width && y <= size.height;
  const order = [...chosen.filter((p) => all.includes(p) && p.label && p.family !== "full"), ...points.filter((p) => !chosen.includes(p))];
  return order.filter((p) => isIn(pixel(p))).flatMap((point) => {
    const [x, y] = pixel(point), w = 3.4 * point.label.length + 1, h = 7;
    const places = [[0, 14], [0, -14], [w + 8, 0], [-w - 8, 0], [w + 6, 10], [-w - 6, 10], [w + 6, -10], [-w - 6, -10], [0, 26], [0, -26]];
    const cost = places.map(([dx, dy]) => covered([x + dx, y + dy, w, h]));
    const least = Math.min(...cost), [dx, dy] = places[cost.indexOf(least)];
    if (least > w * h && !chosen.includes(point)) return []; // a quarter of the label would be covered
    taken.push([x + dx, y + dy, w, h]);
    return [{ x: point.at[state.x], y: score(point), xshift: dx, yshift: dy, text: point.label, showarrow: false, captureevents: false, bgcolor: veil, borderpad: 0,
      font: { size: 11.5, color: styleOf(point.line).colour } }];
  });
}

function drawLegend() {
  const shown = task(), left = shown.points.filter((p) => !p.valid);
  const swatch = (...parts) => drawing("svg", { class: "swatch", viewBox: "-17 -7 34 14", "aria-hidden": "true" }, ...parts);
  const stroke = (ink, more) => {
    const path = drawing("path", { d: "M-17,0H17", "stroke-width": 1.8, fill: "none", ...more });
    path.style.stroke = ink;
    return path;
  };
  const mark = (d, ink, isFilled = true) => {
    const path = drawing("path", { d, "stroke-width": 1.5 });
    path.style.stroke = ink;
    path.style.fill = isFilled ? ink : "var(--panel)";
    return path;
  };
  const entry = (name, text, picture) => {
    const button = element("button", { type: "button", "aria-pressed": String(!state.hidden.has(name)) }, picture, text);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(name)) state.hidden.add(name);
      button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
      drawChart();
      drawTable();
    });
    return button;
  };
  const lines = shown.lines.map((line) => {
    const style = styleOf(line);
    return entry(line, line, swatch(stroke(style.both, { "stroke-dasharray": style.array }), mark(style.path, style.both)));
  });
  byId("legend").replaceChildren(
    element("span", {}, swatch(stroke("var(--soft)", { "stroke-dasharray": "2 3" }), mark(star, "var(--ink)")), "full model"),
    ...(shown.fronts[state.metric][state.x].length > 1 ? [element("span", {}, swatch(stroke("var(--front)", { "stroke-width": 9 })), "Pareto front")] : []), ...lines,
    ...(left.length ? [entry(LEFT_OUT, `left out (${left.length})`, swatch(mark(markers[0][1], "var(--soft)", false)))] : []),
  );
}

// Puts the parts together.
function say(text) {
  byId("said").textContent = text;
}

function changed() {
  writeAddress();
  markRows();
  drawChart();
  drawDetails();
}
function choose(name) {
  state.point = name;
  if (state.compare === name) state.compare = null;
  changed();
  showRow(name);
  say(`${titleOf(pointOf(name))} is shown${state.compare ? `, compared with ${titleOf(pointOf(state.compare))}` : ""}.`);
}
function compareWith(name) {
  if (!state.point || state.point === name) return choose(name);
  state.compare = state.compare === name ? null : name;
  changed();
  say(state.compare ? `${titleOf(pointOf(state.point))} compared with ${titleOf(pointOf(name))}.` : `${titleOf(pointOf(state.point))} is shown alone.`);
}
function goToDetails() {
  byId("details-title").focus({ preventScroll: true });
  byId("details").scrollIntoView({ block: "start" });
}
// From texts to the row, from two points to one, from one to none.
function back(event) {
  if (event.key !== "Escape" || event.target.matches("select, input")) return;
  if (byId("details").contains(event.target)) {
    focusRow(state.point);
    return;
  }
  if (state.compare) state.compare = null;
  else if (state.point) state.point = null;
  else return;
  changed();
}

function drawHead() {
  const facts = Object.entries(task().facts);
  byId("facts").replaceChildren(...facts.map(([name, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, text))));
  const links = [["points.csv", "CSV"], ["points.parquet", "Parquet"], ["report.md", "report"], ...(task().figures[state.metric] ?? []).map((file) => [file, file.split(".").pop().toUpperCase()])];
  const save = element("button", { type: "button", class: "button" }, "Save this view");
  save.addEventListener("click", () => isDrawn && Plotly.downloadImage(byId("chart"), { format: "png", scale: 2, filename: `${task().title}-${state.metric}` }));
  byId("downloads").replaceChildren("Files: ", ...links.flatMap(([file, text], i) => [i ? ", " : "", element("a", { href: encodeURIComponent(file) }, text)]), ". ", save);
}

// Of a metric that has one value at all points: that it has, and what the page opened with in its place.
function drawFlat() {
  const { flat, metrics, metric, usual_metric: usual } = task(), isReplaced = state.metric === metric && metric !== usual && usual in flat;
  const line = flat[state.metric] ?? (isReplaced ? `${flat[usual]} Shown instead: ${metrics[metric]}.` : "");
  byId("flat").textContent = line;
  byId("flat").hidden = !line;
}

function draw() {
  byId("task").value = String(state.task);
  fill(byId("metric"), Object.entries(task().metrics), state.metric);
  byId("x").value = state.x;
  byId("board").classList.toggle("beside", byId("columns").value === "main");
  writeAddress();
  drawHead();
  drawFlat();
  drawLegend();
  drawTable();
  drawChart();
  drawDetails();
  drawDrafts();
}

if (data.missing.length) {
  byId("missing").textContent = `Not finished yet, and left out (${data.missing.length}): ${data.missing.join(", ")}`;
  byId("missing").hidden = false;
}
if (data.commands.length) {
  byId("commands").append(...data.commands.map((command) => element("pre", { tabindex: "0" }, command)));
  byId("commands").hidden = false;
}
fill(byId("task"), data.tasks.map((found, i) => [String(i), found.title]));
fill(byId("x"), Object.entries(data.axes));
byId("task").addEventListener("change", () => {
  Object.assign(state, { task: Number(byId("task").value), point: null, compare: null, sort: null, hidden: new Set() });
  // The metric of the task before, where this one has it too and it tells points apart.
  state.metric = state.metric in task().metrics && !(state.metric in task().flat) ? state.metric : task().metric;
  draw();
});
for (const name of ["metric", "x"]) byId(name).addEventListener("change", () => {
  state[name] = byId(name).value;
  draw();
});
byId("columns").addEventListener("change", draw);
byId("filter").addEventListener("input", () => {
  state.filter = byId("filter").value;
  drawTable();
  drawChart();
});
byId("only-front").addEventListener("change", () => {
  state.onlyFront = byId("only-front").checked;
  drawTable();
  drawChart();
});
byId("theme").addEventListener("change", () => {
  keepTheme(byId("theme").value);
  draw();
});
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("points").addEventListener("keydown", onTableKey);
byId("skip").addEventListener("click", () => focusRow(state.point));
document.addEventListener("keydown", back);
systemIsDark.addEventListener("change", draw);
window.addEventListener("hashchange", () => {
  readAddress();
  draw();
});
new ResizeObserver(drawChart).observe(byId("chart"));

setTheme(keptTheme());
readAddress();
draw();
// The table is there at once; the curves and the texts follow when they are unpacked.
unpack("texts").then((text) => {
  texts = JSON.parse(text);
  drawDetails();
});
unpack("plotly").then((text) => {
  document.head.append(element("script", {}, text));
  isDrawn = true;
  drawChart();
  drawHistogram(chosenPoints());
  document.documentElement.dataset.ready = "";
});

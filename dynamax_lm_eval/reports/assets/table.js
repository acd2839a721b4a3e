// The table of points: sorted by any column, filtered, walked through with the arrow keys.
const differenceOf = (point) => (task().pairs[state.metric] ?? {})[point.name];
const intervalOf = (point, name) => {
  const found = task().intervals[point.name] ?? {};
  return point.family === "full" ? "" : range(found[`${name}_low`], found[`${name}_high`]);
};
const loopless = (point) => (task().without[state.metric] ?? {})[point.name];

// key: head, title, value by which it sorts, text, second line, and whether narrow windows leave it out.
const allColumns = [
  { key: "score", head: "Score", title: () => `${task().metrics[state.metric]}, with its standard error`, value: score, small: (p) => (known(p.scores[state.metric][1]) ? `±${number(p.scores[state.metric][1])}` : ""), main: true },
  { key: "difference", head: "vs. full", title: () => "score minus the full model's, with a 95 % interval over documents", value: (p) => differenceOf(p)?.difference,
    small: (p) => range(differenceOf(p)?.low, differenceOf(p)?.high), main: true, wide: true },
  { key: "p", head: "p", title: () => "of no difference, corrected by Holm's method", value: (p) => differenceOf(p)?.p_holm },
  { key: "compute_vs_full", head: "Run ×", title: () => "whole-run compute reduction: MACs of the full model's run over those of this one", value: (p) => p.at.compute_vs_full,
    small: (p) => intervalOf(p, "compute_vs_full"), main: true },
  { key: "compute_reduction", head: "Token ×", title: () => "per-token compute reduction, what exits cost included", value: (p) => p.at.compute_reduction,
    small: (p) => (p.family === "full" ? "" : range(...p.bars.compute_reduction)), main: true },
  { key: "without", head: "Run × without loops", title: () => "without documents whose text repeats or ends at the token limit in either run", value: (p) => loopless(p)?.vs_full,
    small: (p) => range(loopless(p)?.vs_full_low, loopless(p)?.vs_full_high) },
  { key: "left_out", head: "Loops", title: () => "documents that this leaves out", value: (p) => loopless(p)?.left_out, digits: 0 },
  { key: "depth", head: "Depth", title: () => `mean number of blocks after which tokens left, of ${task().depth}`, value: (p) => p.mean_exit_layer, digits: 1, main: true, wide: true },
  { key: "tokens", head: "Tokens", title: () => "generated per answer", value: (p) => p.tokens, digits: 1 },
  { key: "degenerate", head: "Repeating", title: () => "share of texts that repeat themselves", value: (p) => p.degenerate },
  { key: "exact", head: "Same text", title: () => "share of answers equal to the full model's", value: (p) => p.consistency.consistency_exact, small: (p) => intervalOf(p, "consistency_exact") },
  { key: "rouge", head: "ROUGE-L", title: () => "with the full model's answers", value: (p) => p.consistency.consistency_rouge_l, small: (p) => intervalOf(p, "consistency_rouge_l") },
  { key: "first", head: "First token, ms", title: () => "mean time to the first token", value: (p) => p.timing.time_to_first_token_ms, digits: 1 },
  { key: "later", head: "Token, ms", title: () => "mean time per further token", value: (p) => p.timing.time_per_output_token_ms, digits: 1 },
  { key: "seconds", head: "All, s", title: () => "time for all answers", value: (p) => p.timing.seconds, digits: 1 },
  { key: "energy", head: "J per token", title: () => "energy that was drawn per generated token", value: (p) => p.timing.joules_per_token },
];

function shownColumns() {
  const isAll = byId("columns").value === "all";
  return allColumns.filter((column) => (column.main || isAll) && task().points.some((point) => known(column.value(point))));
}

function sorted(points) {
  const column = state.sort && allColumns.find((found) => found.key === state.sort.key);
  if (!state.sort) return points;
  const value = column ? column.value : titleOf, sign = state.sort.direction === "ascending" ? 1 : -1;
  return [...points].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (!known(x) || !known(y)) return known(y) - known(x); // what has no number is last either way
    return sign * (x > y ? 1 : x < y ? -1 : 0);
  });
}

function head(key, text, title, isWide) {
  const direction = state.sort?.key === key ? state.sort.direction : undefined;
  const button = element("button", { type: "button", title }, text);
  button.addEventListener("click", () => {
    state.sort = direction === "descending" ? { key, direction: "ascending" } : direction === "ascending" ? null : { key, direction: "descending" };
    drawTable();
    byId("points").querySelector(`th[data-key="${key}"] button`).focus();
  });
  return element("th", { scope: "col", "data-key": key, "aria-sort": direction, class: isWide ? "wide" : undefined }, button);
}

function noteOf(point) {
  if (!point.valid) return ["left out", `left out of lines and the front: ${point.invalid_because}`];
  if (point.only_rounding) return ["rounding", "no token left early; answers that differ from the full model's do so by rounding"];
  const within = point.within_noise[state.metric];
  return within ? ["within rounding", `no further from the full model than a second run of the full model, with another number of sequences at once, in ${within}`] : null;
}

function rowOf(point, columns) {
  const note = noteOf(point);
  const name = element("button", { type: "button", class: "name", tabindex: "-1" }, markOf(point), titleOf(point));
  const versus = element("button", { type: "button", class: "versus", tabindex: "-1", "aria-label": `compare ${titleOf(point)} with the chosen point` }, "vs");
  const row = element("tr", { "data-name": point.name, class: point.valid ? undefined : "invalid" },
    element("td", {}, name, note && element("small", {}, element("span", { class: "tag", title: note[1] }, note[0]))),
    ...columns.map((column) => element("td", { class: column.wide ? "wide" : undefined }, number(column.value(point), column.digits ?? 3),
      column.small && column.small(point) ? element("small", {}, column.small(point)) : null)),
    element("td", {}, versus));
  row.addEventListener("click", (event) => {
    setCurrent(row);
    if (event.target === versus) compareWith(point.name);
    else if (event.detail === 0 && state.point === point.name) goToDetails(); // Enter once more
    else choose(point.name);
  });
  return row;
}

function drawTable() {
  const columns = shownColumns(), table = byId("points"), points = sorted(task().points.filter(isShown));
  const hadFocus = table.querySelector("tbody")?.contains(document.activeElement) && document.activeElement.closest("tr").dataset.name;
  table.replaceChildren(
    element("thead", {}, element("tr", {}, head("point", "Point", "setting"),
      ...columns.map((column) => head(column.key, column.head, column.title(), column.wide)), element("th", { class: "plain" }, element("span", { class: "hidden" }, "compare")))),
    element("tbody", {}, ...points.map((point) => rowOf(point, columns))),
  );
  if (!points.length) table.tBodies[0].append(element("tr", {}, element("td", { colspan: columns.length + 2 }, "No point fits the filter.")));
  markRows();
  const rows = [...table.tBodies[0].rows], current = rows.find((row) => row.dataset.name === (hadFocus || state.point)) ?? rows[0];
  setCurrent(current);
  if (hadFocus) current.querySelector("button")?.focus();
  showRow(state.point);
}

function markRows() {
  for (const row of byId("points").tBodies[0].rows) {
    row.classList.toggle("chosen", row.dataset.name === state.point);
    row.classList.toggle("compared", row.dataset.name === state.compare);
    row.querySelector(".name")?.setAttribute("aria-current", String(row.dataset.name === state.point));
    const versus = row.querySelector(".versus");
    if (!versus) continue;
    versus.hidden = !state.point || row.dataset.name === state.point;
    versus.setAttribute("aria-pressed", String(row.dataset.name === state.compare));
  }
}

// Scrolls the table, and not the page.
function showRow(name) {
  const row = [...byId("points").tBodies[0].rows].find((found) => found.dataset.name === name), box = byId("points").parentElement;
  if (!row) return;
  const head = byId("points").tHead.offsetHeight, top = row.offsetTop - head, bottom = row.offsetTop + row.offsetHeight;
  if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) box.scrollTop = top - (box.clientHeight - head - row.offsetHeight) / 2;
}

// One row of the table is in the order of the Tab key.
function setCurrent(row) {
  for (const button of byId("points").querySelectorAll("tbody .name")) button.tabIndex = button.closest("tr") === row ? 0 : -1;
}
function focusRow(name) {
  const rows = [...byId("points").tBodies[0].rows], row = rows.find((found) => found.dataset.name === name) ?? rows[0];
  setCurrent(row);
  row.querySelector("button")?.focus();
}

function onTableKey(event) {
  const row = event.target.closest("tbody tr");
  if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = [...row.parentNode.rows], i = rows.indexOf(row), buttons = [...row.querySelectorAll("button:not([hidden])")];
  const places = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: rows.length - 1 };
  if (event.key in places) focusRow(rows[Math.min(Math.max(places[event.key], 0), rows.length - 1)].dataset.name);
  else if (event.key === "ArrowRight") buttons.at(-1).focus();
  else if (event.key === "ArrowLeft") buttons[0].focus();
  else if (event.key.toLowerCase() === "c") compareWith(row.dataset.name);
  else return;
  event.preventDefault();
}

// One point, or two side by side: numbers, where tokens left, and documents.
let texts = null; // by task, once they are unpacked
let kind = "all"; // which documents are listed
const letter = (text) => element("span", { class: `letter ${text === "A" ? "a" : text === "B" ? "b" : "full"}` }, text);
const kinds = { all: "all", worse: "got worse", better: "got better", same: "same score", changed: "text changed", apart: "A and B differ" };

function chosenPoints() {
  return [state.point, state.compare].filter(Boolean).map(pointOf);
}

function factsOf(point) {
  const difference = differenceOf(point), changed = point.changes[state.metric];
  return {
    [task().metrics[state.metric]]: [number(score(point)), range(...barOf(point))],
    "minus the full model": [number(difference?.difference), range(difference?.low, difference?.high)],
    "p (Holm)": [number(difference?.p_holm)],
    "documents worse / better / same": [changed && point.family !== "full" ? `${changed.worse} / ${changed.better} / ${changed.same}` : ""],
    "whole-run compute reduction": [times(point.at.compute_vs_full), intervalOf(point, "compute_vs_full")],
    "per-token compute reduction": [times(point.at.compute_reduction), point.family === "full" ? "" : range(...point.bars.compute_reduction)],
    "mean exit layer": [known(point.mean_exit_layer) ? `${number(point.mean_exit_layer, 1)} of ${task().depth}` : ""],
    "tokens per answer": [number(point.tokens, 1)],
    "texts that repeat themselves": [percent(point.degenerate)],
    "texts that end at the token limit": [percent(point.at_limit)],
    "same text as the full model": [percent(point.consistency.consistency_exact), intervalOf(point, "consistency_exact")],
    "ROUGE-L with the full model": [number(point.consistency.consistency_rouge_l), intervalOf(point, "consistency_rouge_l")],
    "time to first token, ms": [number(point.timing.time_to_first_token_ms, 1)],
    "time per further token, ms": [number(point.timing.time_per_output_token_ms, 1)],
    "time for all answers, s": [number(point.timing.seconds, 1)],
    "energy per token, J": [number(point.timing.joules_per_token)],
  };
}

function values(points) {
  const all = [task().points[0], ...points.filter((p) => p.family !== "full")], columns = all.map(factsOf);
  const heads = all.map((p) => element("th", { scope: "col" }, p.family === "full" ? "full model" : letter(p.name === state.point ? "A" : "B")));
  const rows = Object.keys(columns[0]).filter((name) => columns.some((column) => column[name][0] !== ""));
  return element("div", { class: "values", tabindex: "0", role: "group", "aria-label": "Numbers of the chosen points" }, element("table", {},
    element("thead", {}, element("tr", {}, element("td", {}), ...heads)),
    element("tbody", {}, ...rows.map((name) => element("tr", {}, element("th", { scope: "row" }, name),
      ...columns.map((column) => element("td", {}, column[name][0], column[name][1] ? element("small", {}, column[name][1]) : null)))))));
}

function drawHistogram(points) {
  const box = byId("histogram");
  if (!box || !isDrawn) return;
  const shown = points.map((point) => {
    const counts = Object.entries(point.histogram ?? {}), sum = counts.reduce((total, [, count]) => total + count, 0);
    return { point, layers: counts.map(([layer]) => Number(layer)), shares: counts.map(([, count]) => count / sum), counts: counts.map(([, count]) => count) };
  }).filter((found) => found.layers.length);
  if (!shown.length) return void box.replaceChildren(element("p", { class: "note" }, "No token could leave early."));
  const layers = [...new Set(shown.flatMap((found) => found.layers))].sort((a, b) => a - b), soft = colour("soft");
  Plotly.react(box, shown.map(({ point, layers: at, shares, counts }) => ({
    type: "bar", x: at.map(String), y: shares, customdata: counts, name: titleOf(point), hovertemplate: "after %{x} blocks: %{y:.1%} (%{customdata} tokens)<extra></extra>",
    marker: { color: colour(point.name === state.point ? "first" : "second"), pattern: { shape: point.name === state.point ? "" : "/", solidity: 0.35 } },
  })), {
    margin: { l: 48, r: 8, t: 6, b: 42 }, showlegend: false, bargap: 0.25, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", color: colour("ink"), size: 12 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: soft, font: { color: colour("ink") } },
    xaxis: { type: "category", categoryorder: "array", categoryarray: layers.map(String), title: { text: `blocks that ran (all: ${task().depth})`, standoff: 6 }, linecolor: colour("line") },
    yaxis: { tickformat: ".0%", range: [0, 1.02], dtick: 0.25, gridcolor: colour("line"), zeroline: false },
  }, { ...plain, responsive: true });
}

function verdictOf(answer) {
  const gain = answer.gains[state.metric];
  if (gain < 0) return ["worse", "▼ worse"];
  if (gain > 0) return ["better", "▲ better"];
  return ["same", answer.same ? "= same text" : known(gain) ? "= same score" : "≠ changed"];
}

function fits(answers, name) {
  const [first, second] = answers;
  if (name === "all") return true;
  if (name === "changed") return !first.same;
  if (name === "apart") return known(second) && JSON.stringify(first.tokens ?? first.text) !== JSON.stringify(second.tokens ?? second.text);
  return verdictOf(first)[0] === name;
}

function sampleOf(document, rows, first, isOpen) {
  const [full, ...others] = rows, place = firstDifference(others[0].answer, full.answer);
  const summary = element("summary", {}, element("span", { class: `verdict ${verdictOf(others[0].answer)[0]}` }, others[1] ? letter("A") : null, ` ${verdictOf(others[0].answer)[1]}`),
    others[1] ? element("span", { class: `verdict ${verdictOf(others[1].answer)[0]}` }, letter("B"), ` ${verdictOf(others[1].answer)[1]}`) : null,
    element("span", { class: "question" }, `${document.id}: ${document.prompt.trim().replaceAll("\n", " ")}`),
    element("span", { class: "where" }, place === null ? "" : `differs from token ${place + 1}`));
  const box = element("details", { class: "sample", open: isOpen }, summary);
  const add = () => {
    const line = (role, text) => element("p", {}, element("span", { class: "role" }, role), text);
    const body = element("div", { class: "body" }, line("prompt", document.prompt.trim()));
    if (rows.every((row) => tokensOf(row.answer))) body.append(...strip(rows, first));
    else body.append(...rows.map((row) => element("p", {}, letter(row.letter), ` ${row.answer.text ?? row.answer.tokens.join("")}`)));
    body.append(line("expected", document.target));
    box.append(body);
  };
  if (isOpen) add();
  box.addEventListener("toggle", () => box.open && box.childElementCount === 1 && add());
  return box;
}

function documentsOf(points) {
  const own = texts?.[state.task];
  if (!own || !own.documents.length) return element("p", { class: "note" }, texts ? "This task has no texts to show." : "Texts are unpacked …");
  const others = points.filter((p) => p.family !== "full");
  if (!others.length) others.push(...points);
  const full = own.answers[task().points[0].name], answers = others.map((p) => own.answers[p.name]);
  const first = Math.min(task().depth, ...answers.flat().flatMap((answer) => answer.layers ?? []));
  const count = (name) => own.documents.filter((_, i) => fits(answers.map((of) => of[i]), name)).length;
  const offered = Object.entries(kinds).filter(([name]) => name !== "apart" || answers.length > 1);
  if (!offered.some(([name]) => name === kind)) kind = "all";
  const select = element("select", { id: "kind" }, ...offered.map(([name, text]) => element("option", { value: name }, `${text} (${count(name)})`)));
  select.value = kind;
  select.addEventListener("change", () => {
    kind = select.value;
    drawDetails();
    byId("kind").focus();
  });
  const listed = own.documents.map((document, i) => ({ document, i })).filter(({ i }) => fits(answers.map((of) => of[i]), kind));
  const samples = listed.map(({ document, i }, place) => sampleOf(document, [{ letter: "full", name: "full model", answer: full[i] },
    ...others.map((p, k) => ({ letter: p.name === state.compare ? "B" : "A", name: p.name === state.compare ? "B" : "A", answer: answers[k][i], exits: p.exits }))], first, place === 0));
  const toggle = element("button", { type: "button", class: "button" }, "Open all");
  toggle.addEventListener("click", () => {
    const open = samples.some((sample) => !sample.open);
    for (const sample of samples) sample.open = open;
    toggle.textContent = open ? "Close all" : "Open all";
  });
  return element("div", { class: "documents" },
    element("div", { class: "bar" }, element("h3", {}, `Answers (${own.documents.length} of ${plural(task().documents, "document")})`), element("label", {}, "Show ", select), toggle),
    scale(answers.flat(), first),
    own.shared ? element("details", { class: "sample" }, element("summary", {}, "Every prompt begins with the same lines (few-shot examples, instructions)"),
      element("div", { class: "body" }, element("p", {}, own.shared.trim()))) : null,
    ...(samples.length ? samples : [element("p", { class: "note" }, "No document is of this kind.")]));
}

function drawDetails() {
  const details = byId("details"), points = chosenPoints();
  details.hidden = !points.length;
  details.replaceChildren();
  if (!points.length) return;
  const title = element("h2", { id: "details-title", tabindex: "-1" }, letter("A"), ` ${titleOf(points[0])}`, ...(points[1] ? [" compared with ", letter("B"), ` ${titleOf(points[1])}`] : []));
  const notes = points.map(noteOf).map((note, i) => note && element("p", { class: "note" }, letter("AB"[i]), ` ${note[1]}.`)).filter(Boolean);
  details.append(title, ...notes,
    element("div", { class: "pair" }, element("div", {}, values(points)),
      element("div", {}, element("h3", {}, "Where tokens left"), element("div", { id: "histogram", role: "group", "aria-label": "Share of tokens by the number of blocks that ran" }))),
    documentsOf(points));
  drawHistogram(points);
}

function drawDrafts() {
  const rows = task().drafts, box = byId("drafts");
  box.hidden = !rows.length;
  if (!rows.length) return;
  const heads = ["point", "weights ×", "95 % interval", "drafted", "accepted", "accepted length", "compute ×", "same texts"];
  box.replaceChildren(element("h2", { id: "drafts-title" }, "Exits as drafts"),
    element("p", { class: "note" }, "Texts are the full model's; what is gained is weights that are read once for several tokens. With few rows the clock gains no more than that."),
    element("div", { class: "values", tabindex: "0", role: "group", "aria-label": "Exits as drafts" }, element("table", {},
      element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, element("th", { scope: "row" }, row.point), ...[times(row.weights_reduction), range(row.low, row.high),
        String(row.drafted), percent(row.draft_acceptance), number(row.accepted_length, 2), times(row.compute_reduction), percent(row.same_texts)].map((text) => element("td", {}, text))))))));
}

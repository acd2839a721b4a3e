// Answers token by token: the full model's and those of points in the same columns, shaded by how early tokens left.
const signs = { "\n": "⏎", "\n\n": "⏎⏎", "\t": "⇥", " ": "␣", "": "∅" };
const visibleToken = (text) => signs[text] ?? text.replaceAll("\n", "⏎");
// How much a token saved, between 0 and 0.85 so that ink stays legible on it.
const saved = (layer, first) => (task().depth > first ? (0.85 * (task().depth - layer)) / (task().depth - first) : 0).toFixed(3);

const tokensOf = (answer) => answer.tokens ?? null;
function firstDifference(answer, full) {
  if (!answer.tokens || !full.tokens) return null;
  const i = answer.tokens.findIndex((token, place) => token !== full.tokens[place]);
  return i >= 0 ? i : answer.tokens.length === full.tokens.length ? null : answer.tokens.length;
}

// What was said of a token at the exits that it came to: " (confidence 0.412 at 6, 0.871 at 8)".
function confidencesOf(row, i) {
  const said = (row.answer.confidences?.[i] ?? []).map((value, k) => (known(value) ? `${number(value)} at ${row.exits[k]}` : "")).filter(Boolean);
  return said.length ? ` (confidence ${said.join(", ")})` : "";
}

// rows: [{ letter, name, answer, exits }], the full model first.
function strip(rows, first) {
  const full = rows[0].answer, length = Math.max(...rows.map((row) => row.answer.tokens.length));
  const breaks = rows.map((row) => firstDifference(row.answer, full));
  const earliest = Math.min(...breaks.filter((place) => place !== null));
  const cellOf = (row, r, i) => {
    const token = row.answer.tokens[i], kinds = ["cell", r ? "point" : "full"];
    if (token === undefined) return element("span", { class: "cell" });
    if (i === (r ? breaks[r] : earliest)) kinds.push("break");
    if (token in signs) kinds.push("sign");
    return element("span", { class: kinds.join(" "), style: r ? { "--saved": saved(row.answer.layers[i], first) } : {} }, visibleToken(token));
  };
  // Where an answer ends, the others go on in lines of their own.
  let ends = [...new Set(rows.map((row) => row.answer.tokens.length))].sort((a, b) => a - b).filter(Boolean);
  // Stop tokens alone are no reason for a line.
  const last = ends.findIndex((end) => rows.every((row) => row.answer.tokens.slice(end).every((token) => token in signs)));
  ends = [...ends.slice(0, last), ends.at(-1)];
  const columns = [];
  const parts = ends.map((end, k) => {
    const start = k ? ends[k - 1] : 0, part = [];
    const alive = rows.map((row, r) => [row, r]).filter(([row]) => row.answer.tokens.length > start);
    for (let i = start; i < end; i++)
      part.push(element("span", { class: "column", "data-token": i }, ...alive.map(([row, r]) => cellOf(row, r, i))));
    columns.push(...part);
    return element("div", { class: "strip" }, element("span", { class: "column heads" }, ...alive.map(([row]) => element("span", { class: "cell" }, letter(row.letter)))), ...part);
  });
  const box = element("div", { class: "strips", tabindex: "0", role: "group", "aria-label": "Answer, token by token; left and right arrow keys move" }, ...parts);
  const reading = element("p", { class: "reading", role: "status" }, "Point at a token, tap it, or move with the arrow keys.");
  let current = -1;
  const read = (i) => {
    if (i < 0 || i >= length) return;
    columns[current]?.classList.remove("current");
    current = i;
    columns[i].classList.add("current");
    const said = rows.map((row) => {
      const token = row.answer.tokens[i];
      return `${row.name}: ${token === undefined ? "ended before" : `“${visibleToken(token)}” after ${row.answer.layers[i]} of ${task().depth} blocks${confidencesOf(row, i)}`}`;
    });
    reading.textContent = `Token ${i + 1} of ${length}. ${said.join("; ")}.`;
  };
  const at = (event) => Number(event.target.closest("[data-token]")?.dataset.token ?? -1);
  box.addEventListener("pointerover", (event) => read(at(event)));
  box.addEventListener("click", (event) => read(at(event)));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    read(Math.min(Math.max(current + step, 0), length - 1));
    columns[current].scrollIntoView({ block: "nearest" });
  });
  return [box, reading];
}

function scale(answers, first) {
  const layers = [...new Set(answers.flatMap((answer) => answer.layers ?? []))].sort((a, b) => a - b);
  if (layers.length < 2) return null;
  return element("p", { class: "scale" }, "Blocks that ran before a token was read:",
    ...layers.map((layer) => element("span", { class: "token", style: { "--saved": saved(layer, first) } }, String(layer))),
    "The stronger the colour, the earlier it left, and the more it saved. An answer's first token comes from the prompt's last one, which runs all blocks. " +
    "⏎ is a line break, here often the stop. A red edge marks the first token that is not the full model's.");
}

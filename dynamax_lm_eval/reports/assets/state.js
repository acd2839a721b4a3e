// What is shown, and its address: #task=...&metric=...&x=...&point=...&compare=...
const state = { task: 0, metric: "", x: "", point: null, compare: null, hidden: new Set(), filter: "", onlyFront: false, sort: null };
const task = () => data.tasks[state.task];
const pointOf = (name) => task().points.find((point) => point.name === name);
const LEFT_OUT = "left out";

function isShown(point) {
  if (state.hidden.has(point.line) || (!point.valid && state.hidden.has(LEFT_OUT))) return false;
  if (state.onlyFront && !task().fronts[state.metric][state.x].includes(task().points.indexOf(point))) return false;
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean), text = `${titleOf(point)} ${point.name}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

function writeAddress() {
  const words = new URLSearchParams({ task: task().title, metric: state.metric, x: state.x });
  if (state.point) words.set("point", state.point);
  if (state.compare) words.set("compare", state.compare);
  history.replaceState(null, "", `#${words}`);
}

// What an address does not say, or says of what is not there, is as at the beginning.
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const place = data.tasks.findIndex((found) => found.title === words.get("task"));
  state.task = Math.max(place, 0);
  state.metric = words.get("metric") in task().metrics ? words.get("metric") : task().metric;
  state.x = words.get("x") in data.axes ? words.get("x") : Object.keys(data.axes)[0];
  state.point = pointOf(words.get("point")) ? words.get("point") : null;
  state.compare = state.point && pointOf(words.get("compare")) ? words.get("compare") : null;
}

function setTheme(value) {
  byId("theme").value = value;
  document.documentElement.dataset.theme = value;
}
function keepTheme(value) {
  setTheme(value);
  try {
    localStorage.setItem("dynamax-theme", value);
  } catch { /* a page from a file may have no storage: the choice is this visit's */ }
}
function keptTheme() {
  try {
    return localStorage.getItem("dynamax-theme") ?? "auto";
  } catch {
    return "auto";
  }
}

"use strict";
// Reads view.json about once a second and draws it. An order is sent only from its form.

const PHASES = ["detect", "abort", "agree", "edit", "restore", "recompute"];
const SVG = "http://www.w3.org/2000/svg";
const MOST_RANKS = 512; // shown one by one
const $ = (id) => document.getElementById(id);
let last = null, awaySince = 0, took = 0;

const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const shape = (tag, attributes, text) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const number = (value, digits = 3) => value === null || value === undefined ? "-" : Number(value.toPrecision(digits)).toLocaleString("en");
const whole = (value) => value === null || value === undefined ? "-" : value.toLocaleString("en");
const seconds = (value) => {
  if (value === null || value === undefined) return "-";
  if (value < 0.1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 6000) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round(value % 3600 / 60)} min`;
};
const here = () => location.origin + location.pathname; // not all of the address: what it has of a user is refused by fetch
const percent = (value) => value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)}%`;
const clock = (view, at) => new Date(1000 * (at + view.unix_s - view.at_s)).toLocaleTimeString("en-GB");

function drawFigures(view) {
  $("job").textContent = view.job;
  document.title = `${view.phase}: ${view.job}`;
  $("phase").textContent = view.phase;
  $("phase").className = `badge ${view.phase}`;
  const exposure = view.exposure ? `${view.exposure.steps} step${view.exposure.steps === 1 ? "" : "s"}, ${seconds(view.exposure.seconds)}` : "-";
  const figures = [
    [`${whole(view.step + 1)} / ${whole(view.steps)}`, "steps"], [number(view.loss, 5), "loss"],
    [seconds(view.typical_step_s), "a step"], [number(view.samples_per_s), "samples/s"],
    [number(view.tokens_per_s), "tokens/s"], [percent(view.goodput), "goodput"],
    [whole(view.world_size), "ranks"], [view.generation, "generation"], [exposure, "a lost node would cost"],
    [view.checkpoint ? seconds(view.checkpoint.age_s) : "none", "since the checkpoint"],
  ];
  $("figures").replaceChildren(...figures.map(([value, name]) => {
    const made = node("div", "figure");
    made.append(node("b", "", value), node("span", "", name));
    return made;
  }));
  const now = view.recovering ? `recovering for ${seconds(view.recovering.seconds)}: ${view.recovering.why}. ` : "";
  $("concerns").replaceChildren(...view.concerns.map((text) => node("li", "", text)));
  $("protection").textContent = now + (view.protection || "");
}

function drawLayout(view) {
  const workers = new Map(view.workers.map((one) => [one[0], one]));
  const placed = new Set(view.stages.flatMap((stage) => stage.ranks));
  const rows = view.stages.map((stage, index) => [`stage ${index}: layers ${stage.layers[0]}-${stage.layers[1] - 1}`, stage.ranks]);
  const others = view.workers.map((one) => one[0]).filter((rank) => !placed.has(rank));
  if (others.length) rows.push(["not placed", others]);
  const brief = view.workers.length > MOST_RANKS;
  $("layout").replaceChildren(...rows.map(([name, ranks]) => {
    const row = node("div", "stage"), cells = node("div", "ranks");
    const shown = brief ? ranks.filter((rank) => unwell(workers.get(rank))).slice(0, 32) : ranks;
    if (brief) cells.append(node("span", "", `${whole(ranks.length)} ranks${shown.length ? ", of these:" : ", all well"}`));
    for (const rank of shown) cells.append(rankCell(rank, workers.get(rank)));
    row.append(node("span", "", name), cells);
    return row;
  }));
  if (!rows.length) $("layout").textContent = view.phase === "done" ? "the job is over" : "no rank trains yet";
}
const unwell = (one) => !one || one[4] || !["member", "finished"].includes(one[2]);
function rankCell(rank, one) {
  const [, where, status, slowdown, straggler, stepS, computeS, waitS] = one || [rank, "?", "gone", null, false, null, null, null];
  const well = ["member", "finished"].includes(status);
  const cell = node("div", `rank${!well ? " other" : straggler ? " slow" : ""}`, `${rank} `);
  cell.append(node("small", "", well ? seconds(stepS) : status));
  cell.title = `rank ${rank} on ${where}: ${status}, computes ${seconds(computeS)}, waits ${seconds(waitS)} of a step` +
    (slowdown ? `, ${slowdown.toFixed(2)} times its stage's median` : "");
  return cell;
}

function drawPlot(view, svg, value, fromZero) {
  const width = svg.clientWidth || 500, height = 170, left = 52, bottom = height - 18, top = 8;
  const points = view.series.filter((point) => value(point) !== null).map((point) => [point[0], value(point)]);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const drawn = [shape("line", { class: "axis", x1: left, y1: bottom, x2: width, y2: bottom })];
  if (!points.length) {
    svg.replaceChildren(...drawn, shape("text", { x: left + 8, y: height / 2 }, "no step yet"));
    return;
  }
  const t0 = points[0][0], t1 = Math.max(points.at(-1)[0], t0 + 1e-3);
  const values = points.map((point) => point[1]);
  let low = fromZero ? 0 : Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-9) high = low + Math.max(1e-6, Math.abs(low) * 0.1);
  const x = (t) => left + (width - left - 6) * (t - t0) / (t1 - t0), y = (v) => bottom - (bottom - top) * (v - low) / (high - low);
  const tell = fromZero ? seconds : (v) => number(v, 4);
  for (const v of [low, (low + high) / 2, high]) {
    drawn.push(shape("line", { class: "axis", x1: left, y1: y(v), x2: width, y2: y(v) }), shape("text", { x: 2, y: y(v) + 4 }, tell(v)));
  }
  for (const [t, anchor] of [[t0, "start"], [t1, "end"]]) {
    drawn.push(shape("text", { x: x(t), y: height - 4, "text-anchor": anchor }, clock(view, t)));
  }
  for (const fault of view.faults) {
    if (fault[0] < t0 || fault[0] > t1 + 5) continue;
    const at = Math.min(x(fault[0]), width - 2), mark = shape("line", { class: "fault", x1: at, y1: top, x2: at, y2: bottom });
    mark.append(shape("title", {}, `${clock(view, fault[0])} ${fault[1]}`));
    drawn.push(mark);
  }
  const path = points.map(([t, v], i) => `${i ? "L" : "M"}${x(t).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  drawn.push(shape("path", { class: "curve", d: path, "data-points": points.length }));
  const [t, v] = points.at(-1);
  drawn.push(shape("circle", { class: "point", cx: x(t), cy: y(v), r: 2.5 }));
  svg.replaceChildren(...drawn);
}

function drawRecoveries(view) {
  const shown = view.recoveries.slice(-12).reverse();
  $("legend").replaceChildren(...(shown.length ? PHASES : []).flatMap((phase) => [node("i", `phase-${phase}`), phase]));
  const longest = Math.max(...shown.map((one) => one.total_s), 1e-6);
  $("recoveries").replaceChildren(...shown.map((one) => {
    const row = node("div", "recovery"), bar = node("div", "bar"), right = node("div");
    for (const phase of PHASES) {
      const part = node("i", `phase-${phase}`);
      part.style.width = `${90 * one.phases[phase] / longest}%`;
      part.title = `${phase} ${seconds(one.phases[phase])}`;
      bar.append(part);
    }
    const who = one.nodes.length ? `node ${one.nodes.join(", ")}` : one.ranks.length ? `rank ${one.ranks.join(", ")}` : one.reason;
    const name = node("div", "name", `${clock(view, one.at_s)} step ${one.step}: ${who}`);
    name.title = one.why;
    right.append(bar, node("span", "", `${seconds(one.total_s)}, ${one.redone_micro_batches} micro-batches computed again` +
      (one.lost_steps ? `, ${one.lost_steps} steps` : "")));
    row.append(name, right);
    return row;
  }));
  if (!shown.length) $("recoveries").textContent = "none so far";
}

function drawHeat(view) {
  const heat = view.heat, canvas = $("heat"), columns = heat.steps.length, rows = heat.rows.length;
  const values = heat[$("measure").value];
  const all = values.flat().filter((value) => value !== null).sort((a, b) => a - b);
  if (!all.length) {
    canvas.height = 0;
    canvas.dataset.cells = 0;
    $("under").textContent = "no step yet";
    $("scale").textContent = "";
    return;
  }
  const low = all[0], high = Math.max(all[Math.floor(0.99 * (all.length - 1))], low + 1e-9);
  const wide = 960 / columns, tall = Math.max(2, Math.min(18, 420 / rows));
  canvas.height = Math.ceil(rows * tall);
  canvas.dataset.cells = all.length;
  const pen = canvas.getContext("2d");
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--ground").trim() !== "#fff";
  values.forEach((row, i) => row.forEach((value, j) => {
    if (value === null) return;
    const share = Math.max(0, Math.min(1, (value - low) / (high - low)));
    pen.fillStyle = `hsl(${220 - 215 * share} 70% ${dark ? 22 + 33 * share : 88 - 38 * share}%)`;
    pen.fillRect(Math.floor(j * wide), Math.floor(i * tall), Math.ceil(wide), Math.ceil(tall));
  }));
  $("scale").textContent = `blue ${seconds(low)}, red ${seconds(high)} and more`;
  const group = heat.group > 1 ? `; a row is the slowest of ${heat.group} ranks` : "";
  $("under").textContent = `steps ${heat.steps[0]} to ${heat.steps.at(-1)}, left to right; ranks ${heat.rows[0]} to ${heat.rows.at(-1)}, downwards${group}`;
}

function drawTables(view) {
  const row = (cells, tag = "td") => {
    const made = node("tr");
    made.append(...cells.map((cell) => node(tag, "", cell)));
    return made;
  };
  const share = (a, b) => b ? percent(a / b) : "-";
  $("nodes").replaceChildren(row(["node", "host", "ranks", "heard", "CPU", "memory", "keeper", "GPU", ""], "th"), ...view.nodes.map((one) => {
    const [name, host, ranks, silence, cpu, used, memory, keeper, gpu, note] = one;
    const made = row([name, host, ranks, `${seconds(silence)} ago`, percent(cpu), share(used, memory), keeper, gpu, note]);
    if (note) made.lastChild.className = "bad";
    return made;
  }));
  if (view.nodes_left_out) $("nodes").append(row([`and ${whole(view.nodes_left_out)} more, in which nothing is amiss`]));
  for (const [name, host, silence] of view.spares) $("nodes").append(row([name, host, "spare", `${seconds(silence)} ago`]));
  $("orders").hidden = !view.orders;
  $("known").replaceChildren(...view.nodes.map((one) => Object.assign(node("option"), { value: one[0] })));
  $("events").replaceChildren(...view.events.slice().reverse().map(([at, grade, event, text]) => {
    const made = row([clock(view, at), event, text]);
    made.className = grade;
    return made;
  }));
}

function draw(view) {
  drawFigures(view);
  drawLayout(view);
  drawPlot(view, $("loss"), (point) => point[3], false);
  drawPlot(view, $("step-time"), (point) => point[2], true);
  drawRecoveries(view);
  drawHeat(view);
  drawTables(view);
}

async function turn() {
  const began = performance.now();
  try {
    const answer = await fetch(new URL("view.json", here()), { cache: "no-store", signal: AbortSignal.timeout(10000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    last = await answer.json();
    awaySince = 0;
    $("away").hidden = true;
  } catch {
    awaySince = awaySince || Date.now();
    $("away").hidden = false;
    $("away").textContent = `The coordinator has not answered for ${seconds((Date.now() - awaySince) / 1000)}. Training continues without it; ` +
      "what is below is old. If another one has taken over, its page is at its own address.";
  }
  if (last) draw(last);
  took = performance.now() - began;
  setTimeout(turn, Math.max(document.hidden ? 10000 : 1000, 5 * took));
}

const ORDERS = {
  drain: (text) => ({ drain: { node: text, why: "asked for on the page" } }),
  quarantine: (text) => ({ quarantine: { host: text, seconds: 3600, why: "asked for on the page" } }),
  release: (text) => ({ release: { host: text } }),
  relayout: (text) => ({ relayout: { stages: Number(text) } }),
};
$("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  const chosen = $("what"), whom = $("whom").value.trim();
  if (!confirm(`${chosen.selectedOptions[0].text}: ${whom}?`)) return;
  const body = JSON.stringify(ORDERS[chosen.value](whom));
  try {
    const answer = await fetch(new URL("order", here()), { method: "POST", headers: { "X-Everstep-Order": "1" }, body });
    $("said").textContent = await answer.text();
    $("said").className = answer.ok ? "" : "bad";
  } catch {
    $("said").textContent = "the coordinator does not answer: whether the order was taken shows in the events";
    $("said").className = "bad";
  }
});
$("measure").addEventListener("change", () => last && drawHeat(last));
$("theme").addEventListener("click", () => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  if (last) draw(last);
});
turn();

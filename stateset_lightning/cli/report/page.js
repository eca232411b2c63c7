"use strict";
// Only text is ever set, never markup: completions are whatever a model wrote.
const run = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (space) => (tag, attributes = {}, ...children) => {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};
const el = make(null), svg = make("http://www.w3.org/2000/svg");
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const last = (values) => values[values.length - 1];
const number = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3))).replace("-", "−");
};
const signed = (value) => (value > 0 ? "+" : "") + number(value);

// Theme -----------------------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = (name) => { document.documentElement.dataset.theme = name; };
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
at("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

// Overview --------------------------------------------------------------------------------------------------------------------

const metric = (name) => run.metrics[name];
const ends = (name) => { // means of the first and the last tenth of a curve
  const values = metric(name) ? metric(name)[1] : [];
  const size = Math.ceil(values.length / 10);
  return values.length ? [mean(values.slice(0, size)), mean(values.slice(-size))] : null;
};
function overview() {
  at("facts").append(...Object.entries(run.facts).flatMap(([name, value], i) => [i ? "  ·  " : "", `${name} `, el("b", {}, String(value))]));
  const tiles = [];
  const tile = (name, value, more, kind) => tiles.push(el("div", { class: "card tile" },
    el("div", { class: "name" }, name), el("div", { class: "value" }, value), el("div", { class: `more ${kind || ""}` }, more || "")));
  const change = (name, label, digits) => {
    const curve = metric(name);
    if (!curve || !curve[1].length) return;
    const [first, final] = [curve[1][0], last(curve[1])];
    const several = curve[1].length > 1;
    tile(label, several ? `${number(first)} → ${number(final)}` : number(final),
      several ? `${signed(final - first)} by step ${last(curve[0])}` : `at step ${last(curve[0])}`, several && digits ? (final >= first ? "good" : "bad") : "");
  };
  change("val/reward", "validation reward", true);
  const reward = ends("train/reward"), length = ends("completion/mean_tokens"), seconds = metric("time/step_s"), speed = ends("work/tokens_per_s");
  if (reward) tile("training reward", `${number(reward[0])} → ${number(reward[1])}`, "first and last tenth", reward[1] >= reward[0] ? "good" : "bad");
  if (length) tile("completion length", `${number(length[0])} → ${number(length[1])}`, "tokens");
  if (seconds) {
    const steps = last(seconds[0]), total = mean(seconds[1]) * steps, half = percentile(seconds[1], 0.5);
    tile("optimizer steps", number(steps), `${number(half)} s each (median), ${total > 5400 ? `${number(total / 3600)} h` : `${number(total / 60)} min`} in all`);
  }
  if (speed) tile("sampling", number(speed[1]), "tokens per second, scoring included");
  if (metric("memory/peak_mb")) tile("peak memory", `${number(Math.max(...metric("memory/peak_mb")[1]) / 1024)} GB`, "");
  at("overview").append(el("div", { class: "tiles" }, ...tiles));
  const found = hints();
  if (found.length) at("overview").append(el("ul", { class: "hints" }, ...found.map((text) => el("li", {}, text))));
}
function hints() {
  const found = run.missing.map((name) => `${name} is not in the run's folder, and what it holds not in this page.`);
  const final = (name) => (ends(name) || [0, 0])[1];
  const percent = (share) => `${Math.round(100 * share)}%`;
  const right = final("groups/all_right"), wrong = final("groups/all_wrong");
  if (right + wrong > 0.7) found.push(`In the last tenth ${percent(right + wrong)} of the groups are constant (${percent(right)} all right, ${percent(wrong)} all wrong): they teach nothing.`);
  if (final("completion/truncated") > 0.1) found.push(`In the last tenth ${percent(final("completion/truncated"))} of the completions are cut at max_new_tokens.`);
  const bad = metric("policy/bad_steps") && mean(metric("policy/bad_steps")[1]);
  if (bad) found.push(`${percent(bad)} of the optimizer steps were skipped, since loss or gradient was not finite.`);
  for (const name of Object.keys(run.metrics).filter((name) => name.startsWith("reward_failures/"))) found.push(`Rewards failed: ${name.slice(16)}, ${number(mean(metric(name)[1]))} per episode in which any did.`);
  const trained = ends("train/reward");
  for (const name of Object.keys(run.metrics).filter((name) => name.startsWith("reward/"))) {
    const [before, after] = ends(name);
    if (trained && trained[1] - trained[0] > 0.05 && before - after > 0.05) found.push(`The total reward rose while ${name} fell, from ${number(before)} to ${number(after)}: is the reward being gamed?`);
  }
  return found;
}

// Curves ----------------------------------------------------------------------------------------------------------------------

const charts = [];
let smoothing = 0.8, chosen = "overview", cursor = null;

const series = (name, more = {}) => metric(name) && { label: name, steps: metric(name)[0], values: metric(name)[1], ...more };
const OVERVIEW = () => [
  { title: "Reward", series: [series("train/reward", { label: "training" }), series("val/reward", { label: "validation", dots: true, ...around("val/reward", "val/reward_ci95") })] },
  { title: "Rewards by function", series: names("reward/").length > 1 ? names("reward/").map((name) => series(name, { label: name.slice(7) })) : [] },
  { title: "Solved in validation", series: [series("val/solved", { label: "greedy", dots: true, low: values("val/solved_low"), high: values("val/solved_high") }), ...names("val/pass@").slice(-3).map((name) => series(name, { label: name.slice(4), dots: true }))] },
  { title: "Completion length, tokens", series: [series("completion/mean_tokens", { label: "mean, and range", low: values("completion/min_tokens"), high: values("completion/max_tokens") })] },
  { title: "Groups, share", stacked: true, series: [["all_right", 2], ["mixed", 0], ["all_wrong", 1], ["dropped", 7]].map(([name, colour]) => series(`groups/${name}`, { label: name.replace("_", " "), colour })) },
  { title: "Entropy, nats", series: [series("policy/entropy", { label: "of the policy" })] },
  { title: "KL from the reference, nats", series: [series("policy/kl", { label: "per token" }), series("policy/kl_reward", { label: "per completion" })] },
  { title: "Seconds per optimizer step", stacked: true, series: [series("time/sample_s", { label: "sample and score" }), series("time/train_s", { label: "train" })] },
].map((chart) => ({ ...chart, series: chart.series.filter((one) => one && one.values.length) })).filter((chart) => chart.series.length);
const names = (prefix) => Object.keys(run.metrics).filter((name) => name.startsWith(prefix));
const values = (name) => metric(name) && metric(name)[1];
const around = (name, half) => metric(name) && metric(half) && metric(half)[1].length === metric(name)[1].length
  ? { low: metric(name)[1].map((value, i) => value - metric(half)[1][i]), high: metric(name)[1].map((value, i) => value + metric(half)[1][i]) } : {};

function smoothed(list) { // a moving mean with weights that halve, corrected for its start
  let sum = 0, weight = 0;
  return list.map((value) => { sum = smoothing * sum + value; weight = smoothing * weight + 1; return sum / weight; });
}
function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  const size = [1, 2, 5, 10].map((factor) => factor * step).find((candidate) => (high - low) / candidate <= count);
  const found = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-9; value += size) found.push(Math.abs(value) < size * 1e-9 ? 0 : value);
  return found;
}
function drawCharts() {
  charts.length = 0;
  at("charts").replaceChildren();
  const specs = chosen === "overview" ? OVERVIEW()
    : names(chosen).filter((name) => name.split("/")[0] === chosen).map((name) => ({ title: name, series: [series(name, { label: "", dots: metric(name)[1].length < 30 })] }));
  for (const spec of specs) {
    const keys = el("div", { class: "keys" }), first = spec.series[0];
    const range = `${number(first.values[0])} at step ${first.steps[0]}, ${number(last(first.values))} at step ${last(first.steps)}`;
    const image = svg("svg", { role: "img", tabindex: "0", "aria-label": `${spec.title}: ${first.label} ${range}` });
    const chart = { ...spec, keys, image };
    charts.push(chart);
    at("charts").append(el("div", { class: "card chart" }, el("h3", {}, spec.title), keys, image));
    image.addEventListener("pointermove", (event) => moveCursor(chart.stepAt(event.offsetX)));
    image.addEventListener("pointerleave", () => moveCursor(null));
    image.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const steps = first.steps, here = cursor === null ? steps.length - 1 : steps.findIndex((step) => step >= cursor) + move;
      moveCursor(steps[Math.max(0, Math.min(steps.length - 1, here))]);
    });
    image.addEventListener("blur", () => moveCursor(null));
  }
  charts.forEach(draw);
}
function moveCursor(step) { cursor = step; charts.forEach(drawCursor); }

function draw(chart) {
  const width = chart.image.clientWidth || 360, height = chart.image.clientHeight || 190, left = 44, right = 16, top = 8, bottom = 22;
  chart.image.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.image.replaceChildren();
  const shown = chart.series.map((one) => ({ ...one, smooth: one.dots ? one.values : smoothed(one.values) }));
  if (chart.stacked) {
    let below = shown[0].values.map(() => 0);
    for (const one of shown) { one.low = below; below = one.smooth.map((value, i) => value + (below[i] || 0)); one.high = below; }
  }
  const all = shown.flatMap((one) => [...(chart.stacked ? one.high : one.values), ...(one.low || []), ...(one.high || [])]);
  const steps = shown.flatMap((one) => one.steps);
  const [x0, x1] = [Math.min(...steps), Math.max(...steps)];
  let [y0, y1] = chart.stacked ? [0, Math.max(...all)] : [Math.min(...all), Math.max(...all)];
  if (y0 === y1) [y0, y1] = [y0 - Math.abs(y0 || 1) / 2, y1 + Math.abs(y1 || 1) / 2];
  else if (!chart.stacked) [y0, y1] = [y0 - (y1 - y0) * 0.05, y1 + (y1 - y0) * 0.05];
  const x = (step) => left + ((step - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  for (const value of ticks(y0, y1, 4)) chart.image.append(
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  for (const step of ticks(x0, x1, 5).filter(Number.isInteger)) chart.image.append(svg("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, number(step)));
  const path = (one, list) => list.map((value, i) => `${i ? "L" : "M"}${x(one.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  shown.forEach((one, i) => {
    const group = svg("g", { class: `k${one.colour ?? i % 8}` });
    if (one.low && one.high) {
      const back = one.low.map((value, j) => `L${x(one.steps[j]).toFixed(1)} ${y(value).toFixed(1)}`).reverse().join("");
      group.append(svg("path", { class: chart.stacked ? "stack" : "area", d: `${path(one, one.high)}${back}Z` }));
    }
    if (!chart.stacked) {
      if (!one.dots && smoothing > 0) group.append(svg("path", { class: "curve raw", d: path(one, one.values) }));
      group.append(svg("path", { class: "curve", d: path(one, one.smooth) }));
      if (one.dots) group.append(...one.values.map((value, j) => svg("circle", { class: "dot", cx: x(one.steps[j]), cy: y(value), r: 3.2 })));
    }
    chart.image.append(group);
  });
  chart.line = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  chart.image.append(chart.line);
  Object.assign(chart, { shown, x, stepAt: (pixel) => x0 + ((pixel - left) / (width - left - right)) * (x1 - x0) });
  drawCursor(chart);
}
function drawCursor(chart) {
  const nearest = (one) => one.steps.reduce((best, step, i) => (Math.abs(step - cursor) < Math.abs(one.steps[best] - cursor) ? i : best), 0);
  const places = chart.shown.map((one) => (cursor === null ? one.steps.length - 1 : nearest(one)));
  chart.line.setAttribute("visibility", cursor === null ? "hidden" : "visible");
  if (cursor !== null) {
    const here = chart.x(chart.shown[0].steps[places[0]]);
    chart.line.setAttribute("x1", here);
    chart.line.setAttribute("x2", here);
  }
  chart.keys.replaceChildren(...chart.shown.map((one, i) => el("span", {}, el("i", { class: `k${one.colour ?? i % 8}` }), `${one.label} `, el("b", {}, number(one.values[places[i]])))),
    cursor === null ? "" : el("span", {}, `step ${chart.shown[0].steps[places[0]]}`));
}
function tabs(place, options, current, choose) {
  const buttons = options.map(([value, label]) => {
    const button = el("button", { type: "button", "aria-pressed": String(value === current) }, label);
    button.addEventListener("click", () => { buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button))); choose(value); });
    return button;
  });
  place.replaceChildren(...buttons);
}
function curves() {
  const groups = [...new Set(Object.keys(run.metrics).map((name) => name.split("/")[0]))].filter((name) => name !== "episode");
  if (!groups.length) { at("charts").append(el("p", { class: "note" }, "This run has no metrics.csv yet; without lightning.pytorch.loggers.CSVLogger in trainer.logger it will have none.")); return; }
  const order = ["train", "reward", "val", "test", "completion", "groups", "policy", "advantage", "lr", "time", "work", "memory"];
  groups.sort((a, b) => (order.indexOf(a) + 99) % 99 - (order.indexOf(b) + 99) % 99);
  tabs(at("groups"), [["overview", "Overview"], ...groups.map((name) => [name, name])], chosen, (name) => { chosen = name; drawCharts(); });
  at("smoothing").addEventListener("input", (event) => { smoothing = Number(event.target.value); charts.forEach(draw); });
  new ResizeObserver(() => charts.forEach(draw)).observe(at("charts"));
  drawCharts();
}

// Completions -----------------------------------------------------------------------------------------------------------------

const PROMPTS_PER_PAGE = 5;
const FILTERS = {
  train: [["all", "all groups", () => true], ["mixed", "groups of several rewards", (group) => spread(group) > 0]],
  evaluation: [["all", "all prompts", () => true], ["better", "prompts that got better", (group) => gain(group) > 0], ["worse", "prompts that got worse", (group) => gain(group) < 0], ["short", "prompts short of the highest reward", (group) => last(group.completions).reward < best]],
};
const COLOURS = {
  update: ["what training changed", (c) => c.logprobs_after && c.logprobs.map((value, i) => (value === null ? null : c.logprobs_after[i] - value))],
  reference: ["distance from the reference", (c) => c.ref_logprobs && c.logprobs.map((value, i) => (value === null ? null : value - c.ref_logprobs[i]))],
  surprise: ["how unlikely they were", (c) => c.logprobs],
  none: ["nothing", () => null],
};
const rewardsOf = (group) => group.completions.map((c) => c.reward).filter((value) => value !== undefined && value !== null);
const spread = (group) => { const list = rewardsOf(group); return list.length ? Math.max(...list) - Math.min(...list) : 0; };
const gain = (group) => { const list = rewardsOf(group); return list.length ? last(list) - list[0] : 0; };
const best = Math.max(...run.evaluations.flatMap(rewardsOf), -Infinity);
let view = run.train.length ? "train" : "validation", colour = "update", page = 0;

function pages() {
  const filter = FILTERS[view === "train" ? "train" : "evaluation"].find(([name]) => name === at("filter").value) || FILTERS.train[0];
  const text = at("find").value.toLowerCase();
  const found = (view === "train" ? run.train : run.evaluations.filter((group) => group.split === view))
    .filter((group) => filter[2](group) && `${group.prompt} ${group.topic || ""} ${group.id}`.toLowerCase().includes(text));
  const byPage = new Map();
  found.forEach((group, i) => {
    const key = view === "train" ? `step ${group.step}, episode ${group.episode}` : `prompts ${Math.floor(i / PROMPTS_PER_PAGE) * PROMPTS_PER_PAGE + 1} to ${Math.min(found.length, (Math.floor(i / PROMPTS_PER_PAGE) + 1) * PROMPTS_PER_PAGE)} of ${found.length}`;
    byPage.set(key, [...(byPage.get(key) || []), group]);
  });
  return [...byPage];
}
function percentile(list, share) { return [...list].sort((a, b) => a - b)[Math.floor(share * (list.length - 1))]; }
const scales = {};
function scaleOf(mode) { // nats at which a colour is full: such that a twentieth of the tokens is beyond it
  const sizes = run.train.flatMap((group) => group.completions.flatMap((c) => COLOURS[mode][1](c) || [])).map(Math.abs);
  return (scales[mode] ??= Math.max(0.02, sizes.length ? percentile(sizes, 0.95) : 0));
}
function showCompletions() {
  const all = pages();
  page = Math.max(0, Math.min(page, all.length - 1));
  at("page").max = Math.max(0, all.length - 1);
  at("page").value = page;
  at("previous").disabled = page === 0;
  at("next").disabled = page >= all.length - 1;
  at("place").textContent = all.length ? all[page][0] : "nothing found";
  at("cards").replaceChildren(...(all.length ? all[page][1].map(card) : []));
  showLegend();
}
function showLegend() {
  const { episodes, prompts, evaluations } = run.shown;
  const count = (what, [some, every]) => (some < every ? `${some} of ${every} ${what} are in this page; all are in samples.jsonl. ` : "");
  const text = view === "train" ? count("written episodes", episodes) : count("prompts", prompts) + count("evaluations", evaluations);
  const parts = [text];
  if (view === "train" && colour !== "none") {
    const scale = number(scaleOf(colour)), ratio = number(Math.exp(scaleOf(colour)));
    const swatch = (kind) => el("span", { class: `swatch ${kind}` });
    if (colour === "update") parts.push("Probability of each token after the episode's optimizer steps, over that when it was sampled: ", `÷${ratio}`, swatch("both"), `×${ratio}. Inside an on-policy loss this ratio is 1; shown is what the steps then changed, through these and all other completions of the episode.`);
    if (colour === "reference") parts.push("Probability of each token when it was sampled, over that under the reference: ", `÷${ratio}`, swatch("both"), `×${ratio}. Only completions that trained have one.`);
    if (colour === "surprise") parts.push("Log-probability when sampled, in nats: 0", swatch("one"), `−${scale} and below.`);
  } else if (view !== "train") parts.push("Greedy completions of the same prompt, in the order of the run.");
  at("legend").replaceChildren(...parts);
}
function card(group) {
  const list = rewardsOf(group), chips = [];
  const chip = (name, value) => chips.push(el("span", { class: "chip" }, name ? `${name} ` : "", el("b", {}, value)));
  if (group.topic) chip("", group.topic);
  if (group.target !== undefined && group.target !== null) chip("target", String(group.target));
  if (view === "train" && list.length) chip("mean reward", number(mean(list)));
  if (view === "train") chip("completions", String(group.completions.length));
  if (view === "train" && list.length && spread(group) === 0) chip("", "constant: teaches nothing");
  const rows = view === "train" ? distinct(group.completions).sort((a, b) => (b.one.reward ?? -Infinity) - (a.one.reward ?? -Infinity)) : group.completions.map((one) => ({ one, times: 1 }));
  const largest = Math.max(...group.completions.map((c) => Math.abs(c.advantage || 0)), 1e-9);
  return el("article", { class: "card group" },
    el("div", { class: "head" }, el("h3", { class: "prompt" }, group.prompt), el("div", { class: "chips" }, ...chips)), ...rows.map((row) => completion(row, largest)));
}
function distinct(completions) { // the same text with the same reward is shown once
  const found = new Map();
  for (const one of completions) {
    const key = JSON.stringify([one.text, one.reward, one.advantage, one.finish_reason, one.tokens]);
    found.set(key, { one, times: (found.get(key)?.times || 0) + 1 });
  }
  return [...found.values()];
}
function completion({ one, times }, largest) {
  const rewards = Object.entries(one.rewards || {}), several = rewards.length > 1 || one.breakdown;
  const score = el("div", { class: "score" }, el("b", { class: one.reward === undefined ? "bad" : "" }, one.reward === undefined ? "failed" : number(one.reward)), times > 1 ? el("span", { class: "times" }, ` ${times} times`) : "",
    ...(several ? rewards.map(([name, value]) => el("small", {}, `${name} ${number(value)}`)) : []),
    ...Object.entries(one.breakdown || {}).flatMap(([name, parts]) => Object.entries(parts).map(([part, value]) => el("small", {}, `${name}.${part} ${typeof value === "number" ? number(value) : value}`))));
  const push = el("div", { class: "push" });
  if (one.advantage !== undefined) {
    const fill = el("div", { class: `fill ${one.advantage >= 0 ? "plus" : "minus"}` });
    fill.style.width = `${(50 * Math.abs(one.advantage)) / largest}%`;
    push.append(el("div", { class: "track", title: "advantage" }, fill), el("small", {}, signed(one.advantage)));
  }
  if (one.step !== undefined) push.append(el("small", {}, `step ${one.step}`));
  const said = el("div", { class: "said" }, ...spans(one));
  if (one.errors) said.append(...one.errors.map((text) => el("small", { class: "bad" }, `\n${text}`)));
  const length = `${one.num_tokens} tokens${one.finish_reason === "length" ? ", cut" : ""}`, kind = one.finish_reason === "length" ? "bad" : "";
  const size = one.tokens && one.tokens.length ? numbers(one, length, kind) : el("small", { class: `size ${kind}` }, length);
  return el("div", { class: "row" }, score, push, said, size);
}
function spans(one) {
  if (!one.tokens) return [one.text];
  const shades = view === "train" ? COLOURS[colour][1](one) : null, scale = colour === "none" ? 1 : scaleOf(colour);
  const theirs = one.tokens.map((_, i) => Boolean(one.logprobs) && one.logprobs[i] === null && (!one.logprobs_after || one.logprobs_after[i] === null));
  const talks = theirs.some(Boolean); // then tokens have what the template writes between turns, and the text names roles
  let position = 0;
  const parts = one.tokens.map((token, i) => {
    const special = !talks && position >= one.text.length && token !== "";
    const value = shades ? shades[i] : null;
    const kind = value === null ? "" : colour === "surprise" ? "rare" : value >= 0 ? "up" : "down";
    const span = el("span", { class: `tok ${kind} ${special ? "special" : ""} ${theirs[i] ? "theirs" : ""}` }, token.replaceAll("\n", "↵\n"));
    if (value !== null) span.style.setProperty("--a", String(Math.round(Math.min(1, Math.abs(value) / scale) * 55)));
    span.details = [one, i];
    position += token.length;
    return span;
  });
  return [...parts, talks ? "" : one.text.slice(position)];
}
const chance = (logprob) => number(Math.exp(logprob));
function describe(one, i) {
  if (one.logprobs[i] === null) return `${JSON.stringify(one.tokens[i])}\nno probability is known: an environment wrote it, or the server gave none`;
  const lines = [`${JSON.stringify(one.tokens[i])}`, `probability when sampled ${chance(one.logprobs[i])}`];
  if (one.logprobs_after) lines.push(`after the update ${chance(one.logprobs_after[i])} (×${number(Math.exp(one.logprobs_after[i] - one.logprobs[i]))})`);
  if (one.ref_logprobs) lines.push(`of the reference ${chance(one.ref_logprobs[i])}`);
  return lines.join("\n");
}
function numbers(one, length, kind) { // what the colours and the tips say, for keyboards and screen readers; made when it is opened
  const box = el("details", { class: "size" }, el("summary", { class: kind, "aria-label": `${length}, one by one` }, length));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    const columns = [["logprobs", "log-prob when sampled"], ["logprobs_after", "after the update"], ["ref_logprobs", "of the reference"]].filter(([name]) => one[name]);
    box.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "token"), ...columns.map(([, label]) => el("th", { scope: "col" }, label)))),
      el("tbody", {}, ...one.tokens.map((token, i) => el("tr", {}, el("th", { scope: "row" }, JSON.stringify(token)), ...columns.map(([name]) => el("td", {}, number(one[name][i])))))))));
  });
  return box;
}
function showTip(event) {
  const token = event.target.closest(".tok"), tip = at("tip");
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = describe(...token.details);
  const place = token.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${place.top > tip.offsetHeight + 12 ? place.top - tip.offsetHeight - 6 : place.bottom + 6}px`;
}
function completions() {
  const splits = [["train", "training"], ["validation", "validation"], ["test", "test"]].filter(([name]) => (name === "train" ? run.train.length : run.evaluations.some((group) => group.split === name)));
  if (!splits.length) {
    document.querySelectorAll("#completions .bar").forEach((bar) => bar.remove());
    at("legend").textContent = "This run has no samples.jsonl yet; without stateset_lightning.callbacks.SampleWriter among its callbacks it will have none.";
    return;
  }
  const select = (place, options) => at(place).replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
  view = splits[0][0];
  const known = Object.entries(COLOURS).filter(([name, [, values]]) => name === "none" || run.train.some((group) => group.completions.some(values)));
  colour = known[0][0];
  select("colour", known.map(([name, [label]]) => [name, label]));
  const choose = (name) => { view = name; page = 0; select("filter", FILTERS[name === "train" ? "train" : "evaluation"]); at("colour").disabled = name !== "train"; showCompletions(); };
  tabs(at("views"), splits, view, choose);
  const turn = (id, event, act) => at(id).addEventListener(event, (happened) => { act(happened); showCompletions(); });
  turn("filter", "change", () => { page = 0; });
  turn("find", "input", () => { page = 0; });
  turn("colour", "change", (event) => { colour = event.target.value; });
  turn("page", "input", (event) => { page = Number(event.target.value); });
  turn("previous", "click", () => { page -= 1; });
  turn("next", "click", () => { page += 1; });
  for (const event of ["pointerover", "click"]) document.addEventListener(event, showTip);
  document.addEventListener("scroll", () => { at("tip").hidden = true; }, true);
  choose(view);
}

// Evaluation, config, environment ---------------------------------------------------------------------------------------------

function spark(list) {
  const [low, high] = [Math.min(...list), Math.max(...list)];
  const points = list.map((value, i) => `${(2 + (116 * i) / (list.length - 1 || 1)).toFixed(1)},${(23 - (20 * (value - low)) / (high - low || 1)).toFixed(1)}`).join(" ");
  return svg("svg", { viewBox: "0 0 120 26", "aria-hidden": "true", class: "k0" }, svg("polyline", { class: "curve", points }));
}
function evaluation() {
  const order = (name) => ["reward", "solved", "pass", "avg", "majority", "topic"].findIndex((start) => name.slice(4).replace("/", "").startsWith(start)) + 1 || 99;
  for (const [prefix, title] of [["val/", "Validation"], ["test/", "Test"]]) {
    const rows = names(prefix).filter((name) => !/_(low|high|ci95)$|num_completions$/.test(name)).sort((a, b) => order(a) - order(b));
    if (!rows.length) continue;
    const steps = metric(rows[0])[0], several = steps.length > 1;
    const interval = (name, i) => {
      if (metric(`${name}_ci95`)) return ` ± ${number(values(`${name}_ci95`)[i])}`;
      return metric(`${name}_low`) ? ` [${number(values(`${name}_low`)[i])}, ${number(values(`${name}_high`)[i])}]` : "";
    };
    const heads = ["metric", ...(several ? [`step ${steps[0]}`] : []), `step ${last(steps)}`, ...(several ? ["change", "trend"] : [])];
    const body = rows.map((name) => {
      const list = values(name), end = list.length - 1, change = list[end] - list[0];
      const quality = /reward$|solved|pass|avg|majority/.test(name) && Math.abs(change) > 1e-9 ? (change > 0 ? "good" : "bad") : "";
      return el("tr", {}, el("th", { scope: "row" }, name.slice(prefix.length)), several ? el("td", {}, number(list[0]) + interval(name, 0)) : null, el("td", {}, el("b", {}, number(list[end])), interval(name, end)),
        ...(several ? [el("td", { class: quality }, signed(change)), el("td", {}, list.length > 1 ? spark(list) : "")] : []));
    });
    const count = values(`${prefix}num_completions`);
    at("evaluation").append(el("h3", {}, title), el("p", { class: "note" }, `${count ? `${number(last(count))} prompts, greedy. ` : ""}Intervals are of 95%, over prompts.`),
      el("div", { class: "card scroll" }, el("table", { class: "wide" }, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...body))));
  }
  if (at("evaluation").children.length === 1) at("evaluation").append(el("p", { class: "note" }, "Nothing was evaluated, or it is not in metrics.csv."));
}
function configuration() {
  at("config").append(run.config ? el("div", { class: "card" }, el("pre", { tabindex: "0" }, run.config)) : el("p", { class: "note" }, "There is no config.yaml in the run's folder: the command line writes one."));
  const facts = Object.entries(run.environment);
  at("environment").append(facts.length ? el("div", { class: "card" }, el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])))
    : el("p", { class: "note" }, "There is no environment.json in the run's folder: the command line writes one."));
}

overview();
curves();
completions();
evaluation();
configuration();
document.documentElement.dataset.ready = "true";

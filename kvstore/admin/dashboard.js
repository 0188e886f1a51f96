// The dashboard: history once, then /v1/status every second. Everything is drawn from `seen`, a
// list of samples of running totals; rates are differences of neighbours, so that a restart of
// the daemon (totals that fall) is a gap and never a spike. No text becomes markup.
"use strict";

const POLL_MS = 1000;
const REUSE_MS = 10_000;
const KEEP_SECONDS = 3600;
const RECENT_SECONDS = 60;
const TIERS = ["device", "host", "disk", "redis", "peer"];
const CAUSES_GOOD = ["present", "arriving"];
const SVG = "http://www.w3.org/2000/svg";

const seen = [];
let latest = null;
let lastGoodAt = 0;
let span = 300;
let failures = 0;
let restartedAt = 0;

const $ = (id) => document.getElementById(id);

// --- making elements -----------------------------------------------------------------

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// --- how things are written ------------------------------------------------------------

function scaled(value, step, units) {
  let unit = 0;
  while (Math.abs(value) >= step && unit < units.length - 1) { value /= step; unit += 1; }
  const digits = unit === 0 && Number.isInteger(value) ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0;
  return [value.toFixed(digits), units[unit]];
}
const bytes = (n) => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]).join(" ");
const rate = (n) => `${bytes(n)}/s`;
const count = (n) => Math.round(n).toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;

function seconds(value) {
  if (!value) return "–";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  return value < 1 ? `${(value * 1e3).toPrecision(3)} ms` : `${value.toFixed(2)} s`;
}
function lasting(value) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${Math.floor(value)} s`;
}
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

// --- samples and their differences ---------------------------------------------------------

function sampleOf(status) {
  const of = (field) => Object.fromEntries(status.tiers.map((tier) => [tier.tier, tier[field]]));
  const load = status.latencies.find((one) => one.op === "load");
  return {
    at: status.now_at, asked: status.lookups.asked, ready: status.lookups.ready, hits: of("hit_chunks"),
    load_bytes: status.counters.load_bytes, commit_bytes: status.counters.commit_bytes,
    load_p50_seconds: load && load.recent_count ? load.p50_seconds : 0,
    load_p99_seconds: load && load.recent_count ? load.p99_seconds : 0,
    flows: Object.fromEntries(status.flows.map((flow) => [`${flow.source}>${flow.target}`, flow.bytes])),
  };
}
function remember(sample) {
  seen.push(sample);
  while (seen.length && seen[0].at < sample.at - KEEP_SECONDS) seen.shift();
}
// The newest sample at least `age` seconds older than the last, of the same daemon, that has `pick`.
function before(age, pick = (sample) => sample.asked) {
  const last = seen.at(-1);
  let found = null;
  for (let i = seen.length - 2; i >= 0; i -= 1) {
    if (seen[i].asked > last.asked || seen[i].commit_bytes > last.commit_bytes || pick(seen[i]) === undefined) break;
    found = seen[i];
    if (found.at <= last.at - age) break;
  }
  return found;
}
function perSecond(pick, age = 5) {
  const last = seen.at(-1), first = seen.length > 1 ? before(age, pick) : null;
  if (!first || last.at <= first.at || pick(last) === undefined) return 0;
  return Math.max(0, (pick(last) - pick(first)) / (last.at - first.at));
}
function hitRate(age) {
  const last = seen.at(-1), first = seen.length > 1 ? before(age) : null;
  return first && last.asked > first.asked ? (last.ready - first.ready) / (last.asked - first.asked) : null;
}
// `seen` cut into equal steps of time: the last sample of each step, and null where there is none.
function steps() {
  const step = span / 60, last = Math.floor(seen.at(-1).at / step), first = last - 60;
  const picked = new Array(61).fill(null);
  for (const sample of seen) {
    const place = Math.floor(sample.at / step) - first;
    if (place >= 0) picked[place] = sample;
  }
  return picked.map((sample, i) => ({ at: (first + i) * step, sample }));
}

// --- charts over time ------------------------------------------------------------------

class TimeChart {
  constructor(place, { label, series, stacked, write, top, none }) {
    Object.assign(this, { place, label, series, stacked, write, top, none, marked: null, points: [] });
    place.tabIndex = 0;
    place.setAttribute("role", "img");
    place.addEventListener("pointermove", (event) => this.markAt(event));
    place.addEventListener("pointerleave", () => this.mark(null));
    place.addEventListener("blur", () => this.mark(null));
    place.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw(this.points)).observe(place);
  }
  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.points.length) return;
    event.preventDefault();
    const from = this.marked ?? this.points.length - 1;
    this.mark(Math.max(0, Math.min(this.points.length - 1, from + step)));
  }
  markAt(event) {
    const box = this.place.getBoundingClientRect(), share = (event.clientX - box.left - this.left) / (box.width - this.left);
    this.mark(Math.max(0, Math.min(this.points.length - 1, Math.round(share * (this.points.length - 1)))));
  }
  mark(index) { this.marked = index; this.draw(this.points); }

  draw(points) {
    this.points = points;
    this.width = Math.max(220, this.place.clientWidth);
    [this.height, this.left, this.foot] = [190, 46, 22];
    const known = points.filter((point) => point.values);
    if (!known.length) {
      this.place.replaceChildren(el("p", { class: "none" }, this.none));
      this.place.setAttribute("aria-label", `${this.label}: ${this.none}`);
      return;
    }
    const sums = known.map(({ values }) => this.stacked ? values.reduce((a, b) => a + b, 0) : Math.max(...values));
    this.max = this.top ?? niceAbove(Math.max(...sums, 1e-9));
    const drawn = svg("svg", { viewBox: `0 0 ${this.width} ${this.height}`, height: this.height, "aria-hidden": "true" });
    this.drawAxes(drawn);
    this.series.forEach((one, i) => this.drawSeries(drawn, one, i));
    const legend = el("div", { class: "legend" }, ...this.series.map((one) => el("span", { class: one.name }, el("i"), one.name)));
    this.place.replaceChildren(drawn, legend);
    if (this.marked !== null) this.drawMark(drawn);
    const last = known.at(-1).values.map((value, i) => `${this.series[i].name} ${this.write(value)}`);
    this.place.setAttribute("aria-label", `${this.label}, now: ${last.join(", ")}. Arrow keys read earlier values.`);
  }
  x(i) { return this.left + (this.width - this.left) * i / Math.max(1, this.points.length - 1); }
  y(value) { return 6 + (this.height - this.foot - 6) * (1 - Math.min(1, value / this.max)); }

  drawAxes(drawn) {
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const y = this.y(share * this.max);
      drawn.append(svg("line", { class: "grid", x1: this.left, x2: this.width, y1: y, y2: y }));
      if (share % 0.5 === 0) drawn.append(svg("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, share ? this.write(share * this.max) : "0"));
    }
    const ends = [[this.left, "start", `${lasting(span)} ago`], [this.width, "end", "now"]];
    for (const [x, anchor, text] of ends) drawn.append(svg("text", { x, y: this.height - 4, "text-anchor": anchor }, text));
  }
  drawSeries(drawn, one, index) {
    for (const run of runs(this.points)) {
      const value = (i) => this.points[i].values[index];
      const under = (i) => this.stacked ? this.points[i].values.slice(0, index).reduce((a, b) => a + b, 0) : 0;
      const path = (at) => run.map((i) => `${this.x(i).toFixed(1)},${this.y(at(i)).toFixed(1)}`);
      const upper = path((i) => under(i) + value(i));
      if (run.length === 1) {
        drawn.append(svg("circle", { class: `dot ${one.name}`, cx: this.x(run[0]), cy: this.y(under(run[0]) + value(run[0])), r: 3 }));
      } else if (this.stacked) {
        drawn.append(svg("path", { class: `area ${one.name}`, d: `M${upper.join("L")}L${path(under).reverse().join("L")}Z` }));
      } else {
        drawn.append(svg("path", { class: `line ${one.name}`, d: `M${upper.join("L")}` }));
      }
    }
  }
  drawMark(drawn) {
    const point = this.points[this.marked], x = this.x(this.marked);
    drawn.append(svg("line", { class: "cross", x1: x, x2: x, y1: 4, y2: this.height - this.foot }));
    const lines = point.values
      ? point.values.map((value, i) => el("span", { class: this.series[i].name }, `${this.series[i].name} ${this.write(value)}`, el("br")))
      : ["nothing seen"];
    const tip = el("div", { class: "tip", "aria-live": "polite" }, el("b", {}, clock(point.at)), ...lines);
    this.place.append(tip);
    tip.style.left = `${Math.min(x + 10, this.width - tip.offsetWidth)}px`;
  }
}
function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
// The places of `points` that have values, in unbroken runs.
function runs(points) {
  const found = [];
  points.forEach((point, i) => {
    if (!point.values) return;
    if (i && points[i - 1].values && found.length) found.at(-1).push(i); else found.push([i]);
  });
  return found;
}

const charts = {};
function drawHits() {
  const tiers = TIERS.filter((name) => latest.tiers.some((tier) => tier.tier === name));
  if (!charts.hits || charts.hits.series.length !== tiers.length) {
    charts.hits = new TimeChart($("hits-chart"), {
      label: "Hit rate by tier", series: tiers.map((name) => ({ name })), stacked: true, write: percent, top: 1, none: "Nothing has been looked up yet.",
    });
  }
  let last = null;
  charts.hits.draw(steps().map(({ at, sample }) => {
    const [from, asked] = [last, sample && last ? sample.asked - last.asked : 0];
    if (sample) last = sample;
    const share = (name) => Math.max(0, (sample.hits[name] ?? 0) - (from.hits[name] ?? 0)) / asked;
    return { at, values: asked > 0 ? tiers.map(share) : null };
  }));
}
function drawLatency() {
  charts.latency ??= new TimeChart($("latency-chart"), {
    label: "Latency of loads", series: [{ name: "p50" }, { name: "p99" }], stacked: false, write: seconds, none: "Nothing has been loaded yet.",
  });
  charts.latency.draw(steps().map(({ at, sample }) => ({
    at, values: sample && sample.load_p99_seconds ? [sample.load_p50_seconds, sample.load_p99_seconds] : null,
  })));
}

// --- the parts of the page ---------------------------------------------------------------

function drawHead() {
  const failing = latest.tiers.filter((tier) => tier.state !== "ready").map((tier) => tier.tier);
  const draining = latest.state === "draining";
  setState(draining ? "draining" : failing.length ? "degraded" : "ready", draining || failing.length ? "warn" : "good");
  $("identity").textContent = `version ${latest.version} · pid ${latest.pid} · up ${lasting(latest.uptime_seconds)} · ${bytes(latest.resident_bytes)} of its own memory`;
  const restarted = restartedAt && Date.now() - restartedAt < 30_000;
  if (draining) banner("warn", "The daemon is shutting down: engines compute for themselves until it is back.");
  else if (failing.length) banner("warn", `${failing.join(" and ")} does not answer and is not asked for now; the other tiers are not affected.`);
  else if (restarted) banner("good", "The daemon was started again. Totals begin anew.");
  else banner("", "");
}
function setState(text, kind) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = `pill ${kind}`;
}
function banner(kind, text) {
  const place = $("banner");
  place.hidden = !text;
  place.className = kind;
  if (place.textContent !== text) place.textContent = text;
}

function drawFigures() {
  const minute = hitRate(RECENT_SECONDS), load = latest.latencies.find((one) => one.op === "load");
  const { lookups, leases } = latest;
  const whole = (text) => { const [number, unit] = text.split(" "); return [number, unit ? el("small", {}, ` ${unit}`) : null]; };
  const figures = [
    ["Hit rate, last minute", [minute === null ? "–" : percent(minute)], lookups.asked ? `${percent(lookups.ready / lookups.asked)} since the start` : "no look-ups yet"],
    ["Loaded", whole(rate(perSecond((s) => s.load_bytes))), `${bytes(latest.counters.load_bytes)} in all`],
    ["Stored", whole(rate(perSecond((s) => s.commit_bytes))), `${bytes(latest.counters.commit_bytes)} in all`],
    ["Load, p50", whole(seconds(load && load.recent_count ? load.p50_seconds : 0)), load && load.recent_count ? `p99 ${seconds(load.p99_seconds)}` : "no loads lately"],
    ["Sessions", [count(latest.sessions)], `${count(latest.reservations)} chunks being written`],
    ["Leases", [count(leases.count)], `${count(leases.chunks)} chunks held, ${count(leases.expired)} expired`],
    ["Hand-offs", [count(latest.handoffs)], `${count(latest.handoff_chunks)} chunks under way`],
  ];
  $("figures").replaceChildren(...figures.map(([name, shown, more]) =>
    el("div", { class: "figure" }, el("dl", {}, el("dt", {}, name), el("dd", {}, ...shown)), el("p", {}, more))));
}

function drawTiers() {
  $("tier-list").replaceChildren(...latest.tiers.map((tier) => {
    const known = tier.capacity_bytes > 0, full = known ? tier.used_bytes / tier.capacity_bytes : 0;
    const part = (name, share) => { const made = el("span", { class: name }); made.style.width = percent(Math.max(0, Math.min(1, share))); return made; };
    const stored = known ? Math.min(tier.stored_bytes, tier.used_bytes) / tier.capacity_bytes : 0;
    const meter = { class: `bar ${tier.tier}`, role: "meter", "aria-label": `${tier.tier} used`, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * full) };
    const saved = tier.stored_bytes && tier.raw_bytes > tier.stored_bytes * 1.01 ? ` (${(tier.raw_bytes / tier.stored_bytes).toFixed(2)}× smaller)` : "";
    const fact = (name, value) => el("span", {}, `${name} `, el("b", {}, value));
    return el("li", { class: "tier" },
      el("div", { class: "row" }, el("strong", {}, tier.tier),
        el("span", { class: `pill ${tier.state === "ready" ? "good" : "bad"}` }, tier.tier === "host" ? tier.state : `${tier.state}, breaker ${tier.breaker}`),
        el("span", { class: "fill" }, known ? `${bytes(tier.used_bytes)} of ${bytes(tier.capacity_bytes)} · ${percent(full)}` : "capacity is the server's own")),
      known ? el("div", meter, part("", stored), part("room", full - stored)) : null,
      el("div", { class: "facts" }, fact("chunks", count(tier.chunks)), fact("hits", count(tier.hit_chunks)),
        fact("stored", bytes(tier.stored_bytes)), fact("raw", bytes(tier.raw_bytes) + saved),
        tier.write ? fact("write", tier.write) : null, tier.write ? fact("queued", bytes(tier.queued_bytes)) : null,
        tier.write ? fact("reads", rate(tier.read_bytes_per_second)) : null, tier.write ? fact("writes", rate(tier.write_bytes_per_second)) : null,
        tier.write && tier.read_seconds ? fact("a read", seconds(tier.read_seconds)) : null));
  }));
}

function drawFlows() {
  const place = $("flows"), width = Math.max(260, place.clientWidth), upright = width < 460;
  const slower = latest.tiers.map((tier) => tier.tier).filter((name) => name !== "host");
  const hasEnd = latest.flows.some((flow) => flow.target === "none");
  const height = upright ? 330 : Math.max(slower.includes("device") ? 330 : 210, 110 * slower.length);
  const at = upright ? uprightPlaces(width, height, slower) : levelPlaces(width, height, slower);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  const told = [], labels = [];
  for (const flow of latest.flows) {
    const [from, to] = [at[flow.source], at[flow.target]];
    if (!from || !to) continue;
    const speed = perSecond((s) => s.flows?.[`${flow.source}>${flow.target}`]);
    const [line, label] = edge(from, to, speed, flow);
    drawn.append(line);
    labels.push(label);
    told.push(`${flow.source} to ${flow.target === "none" ? "evicted" : flow.target} ${rate(speed)}, ${bytes(flow.bytes)} in all`);
  }
  for (const [name, spot] of Object.entries(at)) if (name !== "none" || hasEnd) drawn.append(node(name, spot));
  drawn.append(...labels);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", told.length ? told.join("; ") : "Nothing has moved yet");
  place.replaceChildren(drawn);
}
// Engines use the device tier without the host tier: it stands beside their way to that.
function levelPlaces(width, height, slower) {
  const below = slower.filter((name) => name !== "device"), level = height * (below.length < slower.length ? 0.5 : 0.36);
  const at = { engine: { x: 58, y: level }, host: { x: width / 2, y: level }, none: { x: width / 2, y: height - 24 } };
  if (below.length < slower.length) at.device = { x: width / 2, y: 26 };
  below.forEach((name, i) => { at[name] = { x: width - 58, y: below.length === 1 ? level : 34 + (height - 68) * i / (below.length - 1) }; });
  return at;
}
function uprightPlaces(width, height, slower) {
  const below = slower.filter((name) => name !== "device");
  const at = { engine: { x: 96, y: 26 }, host: { x: 96, y: height / 2 - 6 }, none: { x: width - 54, y: height / 2 - 6 } };
  if (below.length < slower.length) at.device = { x: width - 54, y: 26 };
  below.forEach((name, i) => { at[name] = { x: below.length === 1 ? 96 : 96 + (width - 150) * i / (below.length - 1), y: height - 30 }; });
  return at;
}
function node(name, { x, y }) {
  const tier = latest.tiers.find((one) => one.tier === name);
  const sub = name === "engine" ? `${latest.sessions} session${latest.sessions === 1 ? "" : "s"}` : name === "none" ? "" : tier ? `${count(tier.chunks)} chunks` : "";
  return svg("g", { class: `node ${name === "none" ? "none-node" : name}` },
    svg("rect", { x: x - 50, y: y - 22, width: 100, height: 44, rx: 10 }),
    svg("text", { x, y: sub ? y - 2 : y + 5 }, name === "none" ? "evicted" : name === "engine" ? "engines" : name),
    sub ? svg("text", { class: "sub", x, y: y + 15 }, sub) : "");
}
function edge(from, to, speed, flow) {
  // Two ways between the same nodes lie side by side.
  const length = Math.hypot(to.x - from.x, to.y - from.y), [nx, ny] = [-(to.y - from.y) / length, (to.x - from.x) / length];
  const off = flow.target === "none" ? 0 : 9, [x1, y1, x2, y2] = [from.x + nx * off, from.y + ny * off, to.x + nx * off, to.y + ny * off];
  const tier = flow.source === "host" || flow.source === "engine" ? flow.target : flow.source;
  const kind = TIERS.includes(tier) ? tier : "host";
  const line = svg("line", { class: speed > 0 ? `edge moves ${kind}` : "edge", x1, y1, x2, y2 });
  line.style.strokeWidth = speed > 0 ? String(Math.min(7, 1.5 + Math.log10(1 + speed / 1e4))) : "2";
  const arrow = Math.abs(x2 - x1) > Math.abs(y2 - y1) ? (x2 > x1 ? "→" : "←") : (y2 > y1 ? "↓" : "↑");
  const words = speed > 0 ? `${arrow} ${rate(speed)}` : flow.bytes ? `${arrow} ${bytes(flow.bytes)}` : "";
  // Beside an upright line the words begin or end at it; along any other they lie above or below.
  const isUpright = Math.abs(nx) > 0.8, away = isUpright ? 7 : Math.abs(nx) > 0.2 ? 26 : 14;
  const label = svg("text", { class: speed > 0 ? "rate" : "rate still", x: (x1 + x2) / 2 + nx * away, y: (y1 + y2) / 2 + (isUpright ? 4 : ny * 16 + 4) }, words);
  if (isUpright) label.style.textAnchor = nx < 0 ? "end" : "start";
  return [line, label];
}

function rows(id, made, width, none) {
  $(id).replaceChildren(...(made.length ? made : [el("tr", {}, el("td", { class: "none", colspan: width }, none))]));
}
const cells = (first, ...others) => el("tr", {}, el("td", { class: "name", title: first }, first), ...others.map((text) => el("td", {}, text)));

function drawTables() {
  const called = latest.latencies.filter((one) => one.count);
  rows("calls", called.map((one) => cells(one.op, one.recent_count ? (one.recent_count / RECENT_SECONDS).toFixed(1) : "0", seconds(one.p50_seconds), seconds(one.p90_seconds), seconds(one.p99_seconds))), 5, "No calls yet.");
  rows("tenants", latest.tenants.map((one) => cells(one.tenant || "(nobody in particular)", one.tier, count(one.chunks), bytes(one.used_bytes), bytes(one.quota_bytes), one.floor_bytes ? bytes(one.floor_bytes) : "–")), 6, "No tenants are configured: everybody shares everything.");
  rows("spaces", latest.namespaces.map((one) => cells(one.model || one.namespace.slice(0, 12), one.dtype, count(one.chunk_tokens), count(one.chunks))), 4, "No engine has stored anything yet.");
  const known = new Set([...$("explain-space").options].map((option) => option.value));
  for (const one of latest.namespaces) {
    if (!known.has(one.namespace)) $("explain-space").append(el("option", { value: one.namespace }, `${one.model} (${one.namespace.slice(0, 8)})`));
  }
}

let eventsShown = "";
function drawEvents() {
  const key = JSON.stringify(latest.events.map((event) => [event.id, event.count]));
  if (key === eventsShown) return;
  eventsShown = key;
  const mark = { info: "", warning: "warn", error: "bad" };
  const shown = [...latest.events].reverse().map((event) => el("li", {},
    el("time", { datetime: new Date(event.at * 1000).toISOString() }, clock(event.at)),
    el("span", { class: `pill ${mark[event.severity]}` }, event.severity),
    el("span", { class: "what" }, `${event.message}${event.count > 1 ? ` ×${event.count}` : ""} `,
      el("span", { class: "fields" }, Object.entries(event.fields).map(([name, value]) => `${name}=${value}`).join(" ")))));
  $("events").replaceChildren(...(shown.length ? shown : [el("li", { class: "none" }, "Nothing out of the ordinary.")]));
}

function drawReuse(curves) {
  const place = $("reuse");
  if (!curves.length) {
    place.removeAttribute("role");
    place.replaceChildren(el("p", { class: "none" }, "Not enough has been looked up yet to tell."));
    return;
  }
  const width = Math.max(240, place.clientWidth), [height, left, foot] = [190, 46, 22];
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  const times = curves[0].points.map((point) => point.times);
  const x = (i) => left + 14 + (width - left - 28) * i / Math.max(1, times.length - 1), y = (share) => 6 + (height - foot - 6) * (1 - share);
  for (const share of [0, 0.5, 1]) {
    drawn.append(svg("line", { class: "grid", x1: left, x2: width, y1: y(share), y2: y(share) }), svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
  }
  times.forEach((one, i) => drawn.append(svg("text", { x: x(i), y: height - 4, "text-anchor": "middle" }, one === 1 ? "today" : `${one}×`)));
  const told = curves.slice(0, 6).map((curve) => {
    const spots = curve.points.map((point, i) => [x(i), y(point.hit_rate)]);
    const line = svg("path", { class: `line ${curve.tier}`, d: `M${spots.map((spot) => spot.join(",")).join("L")}` });
    if (curve.tenant) line.style.strokeDasharray = "5 4";
    drawn.append(line);
    spots.forEach(([cx, cy], i) => drawn.append(svg("circle", { class: `dot ${curve.tier}`, cx, cy, r: times[i] === 1 ? 6 : 4 })));
    return `${curve.tier}${curve.tenant ? ` of ${curve.tenant}` : ""}: ${curve.points.map((point) => `${percent(point.hit_rate)} at ${point.times === 1 ? "today's" : `${point.times} times`}`).join(", ")}`;
  });
  const legend = el("div", { class: "legend" }, ...curves.slice(0, 6).map((curve) => el("span", { class: curve.tier }, el("i"),
    `${curve.tier}${curve.tenant ? ` of ${curve.tenant} (dashed)` : ""}: ${bytes(curve.capacity_bytes)} today`)));
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `Hit rate by capacity. ${told.join(". ")}`);
  place.replaceChildren(drawn, legend);
}

// --- explain ----------------------------------------------------------------------------

function question() {
  const kind = $("explain-kind").value, text = $("explain-keys").value.trim(), words = text.split(/[\s,;[\]"]+/).filter(Boolean);
  const asked = kind === "request" ? text : kind === "token_ids" ? words.map(Number) : words;
  if (kind === "token_ids" && asked.some((id) => !Number.isInteger(id) || id < 0)) throw new Error("Token ids are whole numbers.");
  const space = $("explain-space").value;
  return { [kind]: asked, ...(space ? { namespace: space } : {}) };
}
async function explain(event) {
  event.preventDefault();
  const place = $("explanation");
  try {
    const answer = await fetch("/v1/prefixes/explain", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question()) });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.detail || found.title);
    showExplanation(place, found);
  } catch (error) {
    place.replaceChildren(el("p", { class: "verdict" }, error.message));
  }
}
function showExplanation(place, found) {
  const { hits, chunks_asked: asked, cause, text } = found;
  const ended = cause ? `${hits} of ${asked} chunks are hits; the prefix ends there: ${cause.replaceAll("_", " ")}.` : text;
  const summary = hits && hits === asked ? `All ${asked} chunks are hits.` : ended;
  const first = found.chunks.length ? found.chunks[0].number : 0;
  const leading = first > 0 ? el("li", {}, el("span", {}, first > 1 ? `#0 to #${first - 1}` : "#0"), el("span", { class: "pill good" }, "present")) : null;
  place.replaceChildren(el("p", { class: "verdict" }, summary), el("ol", {}, ...(leading ? [leading] : []), ...found.chunks.map((chunk) => el("li", {},
    el("span", {}, `#${chunk.number}`),
    el("span", { class: `pill ${CAUSES_GOOD.includes(chunk.cause) ? "good" : "warn"}` }, chunk.cause.replaceAll("_", " ")),
    el("code", {}, chunk.digest.slice(0, 12)),
    el("span", {}, [chunk.text, ...chunk.differences.map((one) => `${one.field}: here ${one.here}, there ${one.there}`)].join("; "))))));
}

// --- the loop ----------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(4000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}
async function refill() {
  const history = await ask("/v1/history");
  seen.splice(0, seen.length, ...history.samples);
}
function draw() {
  drawHead(); drawFigures(); drawTiers(); drawFlows(); drawTables(); drawEvents();
  if (seen.length) { drawHits(); drawLatency(); }
}
async function poll() {
  try {
    const isNew = !latest || failures > 0, former = latest;
    const status = await ask("/v1/status");
    if (isNew) await refill();
    if (former && former.pid !== status.pid) { restartedAt = Date.now(); seen.length = 0; await refill(); }
    latest = status;
    if (!seen.length || seen.at(-1).at < status.now_at) remember(sampleOf(status));
    [failures, lastGoodAt] = [0, Date.now()];
    document.body.classList.remove("stale");
    draw();
  } catch (error) {
    failures += 1;
    if (failures > 1) lose(error);
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}
function lose(error) {
  setState("no answer", "bad");
  document.body.classList.toggle("stale", latest !== null);
  const since = lastGoodAt ? `for ${lasting((Date.now() - lastGoodAt) / 1000)}; this is what was last seen` : "";
  const isAnswered = /: \d+$/.test(error.message);
  banner("bad", isAnswered ? `The daemon refuses: ${error.message}.` : `The daemon has not answered ${since}. Engines compute for themselves meanwhile.`);
}
async function pollReuse() {
  try { drawReuse((await ask("/v1/reuse")).curves); } catch { if (!$("reuse").firstChild) drawReuse([]); }
  setTimeout(pollReuse, REUSE_MS);
}

const THEMES = { "": ["Auto", "as the system has them"], light: ["Light", "light"], dark: ["Dark", "dark"] };
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  const [word, said] = THEMES[theme];
  $("theme").textContent = word;
  $("theme").setAttribute("aria-label", `Colours: ${said}`);
  try { localStorage.setItem("theme", theme); } catch { /* a page that may keep nothing */ }
}
function start() {
  let kept = "";
  try { kept = localStorage.getItem("theme") ?? ""; } catch { /* a page that may keep nothing */ }
  setTheme(kept in THEMES ? kept : "");
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES), now = document.documentElement.dataset.theme ?? "";
    setTheme(names[(names.indexOf(now) + 1) % names.length]);
  });
  $("span").addEventListener("change", (event) => { span = Number(event.target.value); if (latest) draw(); });
  $("explain").addEventListener("submit", explain);
  new ResizeObserver(() => { if (latest) drawFlows(); }).observe($("flows"));
  poll();
  pollReuse();
}
start();

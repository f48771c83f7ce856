"use strict";

const page = JSON.parse(document.getElementById("report").textContent);
const rows = page.report[page.rows];
const NARROW = 600, MOST_ROWS = 500;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const $ = (selector, within = document) => within.querySelector(selector);
let measure = Object.keys(page.charts.maps)[0];

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const formats = {
  "": String,
  d: (value) => value.toLocaleString("en"),
  bytes: (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(1)} kB`),
  f: (value, digits) => value.toFixed(digits),
  "%": (value, digits) => `${(100 * value).toFixed(digits)}%`,
  g: (value, digits) => value.toPrecision(digits),
};

function formatted(value, format) {
  if (value === null || value === undefined) return "-";
  const [, digits, kind] = format.match(/^(?:\.(\d+))?(.*)$/);
  return formats[kind](value, Number(digits));
}

const kindOf = (format, minor) => `${format === "" ? "text" : ""} ${minor ? "minor" : ""}`.trim();

function cell(row, { key, title, format, under, minor }) {
  const made = element("td", formatted(row[key], format), { "data-label": title });
  made.className = kindOf(format, minor);
  if (under && row[under]) made.append(element("small", row.base_type && row.base_type !== row[under] ? `${row.base_type} > ${row[under]}` : row[under]));
  return made;
}

function table(columns, content, kind = "") {
  const made = element("table", undefined, { class: kind }), head = element("tr");
  for (const { title, format, minor } of columns) head.append(element("th", title, { class: kindOf(format, minor), scope: "col" }));
  made.append(element("thead"), element("tbody"));
  made.tHead.append(head);
  for (const row of content) {
    const line = element("tr", undefined, { class: row.total ? "total" : row.outcome === "error" || row.wrong ? "wrong" : page.best && row.options === page.best ? "best" : "" });
    line.append(...columns.map((column) => cell(row, column)));
    made.tBodies[0].append(line);
  }
  return made;
}

function show(id) {
  const section = document.getElementById(id);
  section.hidden = false;
  return section;
}

function draw(target, spec) {
  const full = { ...spec, data: { values: rows }, autosize: { type: "fit-x", contains: "padding" } };
  return vegaEmbed(target, full, { config: page.config[dark.matches ? "dark" : "light"], actions: false, renderer: "svg", ast: true });
}

async function drawMap() {
  const section = show("map"), chart = $(".chart", section), { tall, wide, about } = page.charts.maps[measure];
  for (const button of section.querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.measure === measure);
  $(".about", section).textContent = about;
  await draw(chart, chart.clientWidth < NARROW ? tall : wide);
}

// a folded chart has no width to be drawn in
function drawHistograms() {
  const shown = Object.entries(page.charts.histograms).filter((_, i) => !i || $("#histograms details").open);
  return Promise.all(shown.map(([name, spec]) => draw($(`[data-measure="${name}"]`, $("#histograms")), spec)));
}

async function drawAll() {
  await Promise.all([drawHistograms(), ...(measure ? [drawMap()] : [])]);
  document.body.dataset.drawn = "yes";
}

function prepareCharts() {
  for (const [name, { title }] of Object.entries(page.charts.maps)) {
    const button = element("button", title, { "data-measure": name, type: "button" });
    button.onclick = () => { measure = name; drawMap(); };
    $("#map .measures").append(button);
  }
  Object.keys(page.charts.histograms).forEach((name, i) => {
    const section = show("histograms"), folded = $("details", section);
    if (i) folded.hidden = false;
    (i ? $(".grid", section) : $(".first", section)).append(element("div", undefined, { class: "chart", "data-measure": name }));
  });
  $("#histograms details").addEventListener("toggle", drawHistograms);
  dark.addEventListener("change", drawAll);
  let narrow = window.innerWidth < NARROW;
  window.addEventListener("resize", () => {
    if (narrow !== window.innerWidth < NARROW) { narrow = !narrow; if (measure) drawMap(); }
  });
}

// accounts by what became of them, and by the kind of tensor that they went to
const GROUPS = [{ key: "outcome", title: "outcome", format: "" }, { key: "kind", title: "went to", format: "" }, { key: "count", title: "tensors", format: "d" }];

function grouped(accounts) {
  const groups = new Map();
  for (const { outcome, target, reason } of accounts) {
    const kind = (target || reason || "").replace(/^(?:(enc|dec)\.)?blk\.\d+\./, "$1").replace(/\.weight$/, ""), key = `${outcome} ${kind}`;
    groups.set(key, { outcome, kind, count: (groups.get(key)?.count || 0) + 1 });
  }
  return [...groups.values()];
}

function prepareAccounts(accounts) {
  const section = show("accounts"), counts = {}, columns = page.columns.accounts;
  for (const { outcome } of accounts) counts[outcome] = (counts[outcome] || 0) + 1;
  $(".summary", section).textContent = `${accounts.length} in all: ` + Object.entries(counts).map(([what, n]) => `${n} ${what}`).join(", ");
  $(".summary", section).after(table(GROUPS, grouped(accounts)));
  const others = accounts.filter(({ outcome }) => outcome !== "applied");
  if (others.length) $("details", section).before(table(columns, others.slice(0, MOST_ROWS), "cards"));
  const list = () => {
    const wanted = $("input", section).value.toLowerCase();
    const found = accounts.filter((account) => Object.values(account).join(" ").toLowerCase().includes(wanted));
    $("details .about", section).textContent = found.length > MOST_ROWS ? `the first ${MOST_ROWS} of ${found.length}` : `${found.length} shown`;
    $("details .scroll", section).replaceChildren(table(columns, found.slice(0, MOST_ROWS), "cards"));
  };
  $("input", section).oninput = list;
  $("details", section).addEventListener("toggle", list, { once: true });
}

function prepareTables() {
  for (const { title, key, columns, total } of page.tables) {
    const content = page.report[key], section = element("section", undefined, { id: key }), scroll = element("div", undefined, { class: "scroll" });
    if (!content.length) continue;
    scroll.append(table(columns, total ? [...content, { ...total, total: true }] : content));
    section.append(element("h2", title), scroll);
    $("#tables").append(section);
  }
}

function prepareText() {
  $("#title").textContent = page.title;
  $("#figure").textContent = page.figure.value;
  $("#label").textContent = page.figure.label;
  if (page.figure.bad) $("header").classList.add("bad");
  if (page.figure.badge) { $("#badge").textContent = page.figure.badge; $("#badge").hidden = false; }
  if (page.next.length) $("pre", show("next")).textContent = page.next.join("\n");
  if (page.tables_first) $("#map").before($("#tables"));
  $("#lines").append(...page.lines.map((line) => element("p", line)));
  if (page.warnings.length) $("ul", show("warnings")).append(...page.warnings.map((line) => element("li", line)));
  $("#command").textContent = page.run.command;
  $("#files").append(table(page.columns.files, page.run.files));
  $("#versions").textContent = Object.entries(page.run.versions).map((pair) => pair.join(" ")).join(", ");
}

prepareText();
prepareCharts();
prepareTables();
if (page.report.accounts && page.report.accounts.length) prepareAccounts(page.report.accounts);
drawAll();

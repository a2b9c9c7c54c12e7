"use strict";
// The page works without any of this: it sorts, filters, saves, and draws the charts.
const data = JSON.parse(document.getElementById("data").textContent);
const views = new Map(); // chart -> Vega's view of it

function download(name, url) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

async function save(name) {
  const [, key, ending] = name.match(/^(.*)\.(\w+)$/s);
  if (name in data.files) {
    const blob = new Blob([data.files[name]], { type: "text/plain;charset=utf-8" });
    download(name, URL.createObjectURL(blob));
  } else if (ending === "png") {
    download(name, await views.get(key).toImageURL("png", 2));
  } else {
    // On the page the text has the page's colour; a file needs one of its own.
    const svg = (await views.get(key).toSVG()).replaceAll("currentColor", "#16191d");
    download(name, URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" })));
  }
}

for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => save(button.dataset.save));
}

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}

function sort(head) {
  const column = head.cellIndex;
  const body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // empty cells come last
    const order = typeof x === "number" && typeof y === "number" ? x - y : compare(x, y);
    return up ? order : -order;
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll(".sort")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}

function filter(input) {
  const table = input.closest(".table");
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...table.querySelector("tbody").rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  table.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
}

for (const input of document.querySelectorAll("input[type=search]")) {
  input.addEventListener("input", () => filter(input));
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
});

const boxes = [...document.querySelectorAll("#shown input")];

function show() {
  const shown = boxes.filter((box) => box.checked).map((box) => box.value);
  for (const view of views.values()) {
    try {
      view.signal("shown", shown).run();
    } catch {
      // The confusion matrix has a choice of its own.
    }
  }
}

for (const box of boxes) box.addEventListener("change", show);

// Called by the charting library, which comes after this script.
window.drawCharts = async (embed) => {
  const ink = { titleColor: "currentColor", labelColor: "currentColor" };
  const lines = { gridColor: "currentColor", gridOpacity: 0.15, domainColor: "currentColor", tickColor: "currentColor" };
  const config = {
    background: "transparent",
    font: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    axis: { ...ink, ...lines, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { ...ink, orient: "bottom", labelFontSize: 12, symbolSize: 80, symbolOpacity: 1, labelLimit: 220 },
    view: { stroke: null },
  };
  for (const element of document.querySelectorAll("[data-chart]")) {
    const columns = Math.max(1, Math.floor(element.clientWidth / 110));
    const options = {
      actions: false, ast: true, defaultStyle: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
      config: { ...config, legend: { ...config.legend, columns } },
    };
    const result = await embed(element, data.charts[element.dataset.chart], options);
    views.set(element.dataset.chart, result.view);
  }
  document.body.dataset.drawn = "yes";
};

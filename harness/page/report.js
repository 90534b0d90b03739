{% include "sort.js" %}

// Charts follow the page's width and the system's light or dark; the arms' boxes hide arms in all of them.
const {specs, themes} = JSON.parse(document.getElementById("charts").textContent);
const boxes = [...document.querySelectorAll(".arms input")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = {};
const shown = () => boxes.filter(box => box.checked).map(box => box.value);
async function draw(holder) {
  const name = holder.dataset.chart;
  views[name]?.finalize();
  if (!holder.clientWidth) return;  // in a fold
  const config = structuredClone(themes[dark.matches ? 1 : 0]);
  config.background = null;
  if (holder.clientWidth < 500) [config.legend.columns, config.text.fontSize] = [1, 10];
  const options = {actions: false, renderer: "svg", config, tooltip: {theme: dark.matches ? "dark" : "light"}};
  views[name] = (await vegaEmbed(holder, specs[name], options)).view;
  // The holder is one picture with a text; its parts would be read out one by one.
  holder.querySelectorAll("[role]").forEach(part => part.removeAttribute("role"));
  if (boxes.length) views[name].signal("shown", shown()).run();
}
const holders = [...document.querySelectorAll("[data-chart]")];
const drawAll = () => holders.forEach(draw);
drawAll();
dark.addEventListener("change", drawAll);
document.querySelectorAll("details:has(.chart)").forEach(fold => fold.addEventListener("toggle", drawAll));
boxes.forEach(box => box.addEventListener("change", () => {
  for (const view of Object.values(views)) view.signal("shown", shown()).runAsync();
}));
for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => {
  const view = views.slots, by = Number(button.dataset.zoom);
  const [low, high] = view.scale("x").domain();
  const middle = (low + high) / 2, half = (high - low) / 2 * by;
  view.signal("zoom_from", by ? [middle - half, middle + half] : null).runAsync();
});

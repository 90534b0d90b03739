// Each step is a column as wide as it took: its live rows from below, dead ones above them, the rest is empty.
const canvas = document.getElementById("slots"), words = document.getElementById("live-words");
const COLOURS = {live: "#77AADD", dead: "#EE8866", empty: "#B0B0B040"}, SPAN_S = 20;
let next = null, steps = [];
async function watch() {
  try {
    const told = await (await fetch("api/live" + (next === null ? "" : `?after=${next}`))).json();
    if (told.problem) throw told.problem;
    if (told.is_new) steps = [];
    next = told.next;
    steps = [...steps, ...told.steps];
    const last = steps.at(-1), until = last ? last.start_s + last.duration_s : 0;
    steps = steps.filter(step => step.start_s > until - SPAN_S);
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    const paint = canvas.getContext("2d"), lane = canvas.height / told.slots, second = canvas.width / SPAN_S;
    paint.fillStyle = COLOURS.empty;
    paint.fillRect(0, 0, canvas.width, canvas.height);
    for (const step of steps) {
      const left = (step.start_s - until + SPAN_S) * second, width = Math.max(1, step.duration_s * second);
      let from = canvas.height;
      for (const [kind, rows] of [["live", step.num_rows], ["dead", step.num_dead_rows]]) {
        paint.fillStyle = COLOURS[kind];
        paint.fillRect(left, from -= rows * lane, width, rows * lane);
      }
    }
    const fresh = told.steps, time = fresh.reduce((sum, step) => sum + step.duration_s, 0);
    const mean = name => time ? fresh.reduce((sum, s) => sum + s[name] * s.duration_s, 0) / time : 0;
    words.textContent = `${told.variant} on ${told.model}: ${mean("num_rows").toFixed(1)} of ${told.slots} slots live, ` +
      `${mean("num_dead_rows").toFixed(1)} dead, ${fresh.at(-1)?.queue_depth ?? 0} waiting, ${fresh.length} new steps`;
  } catch (problem) {
    words.textContent = `waiting: ${problem}`;
  }
  setTimeout(watch, 1000);
}
watch();

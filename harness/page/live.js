// Each step is a column as wide as it took: its live rows from below, dead ones above them, the rest is empty.
const canvas = document.getElementById("slots"), words = document.getElementById("live-words"), SPAN_S = 20;
const colours = Object.fromEntries(["live", "dead", "empty"].map(
  kind => [kind, getComputedStyle(document.querySelector(`.note .${kind}`)).backgroundColor]));
let next = null, steps = [];
async function watch() {
  try {
    const told = await (await fetch("api/live" + (next === null ? "" : `?after=${next}`))).json();
    if (told.problem) throw told.problem;
    const fresh = told.steps;
    next = told.next;
    steps = told.is_new ? fresh : [...steps, ...fresh];
    const until = steps.length ? steps.at(-1).start_s + steps.at(-1).duration_s : 0;
    steps = steps.filter(step => step.start_s > until - SPAN_S);
    [canvas.width, canvas.height] = [canvas.clientWidth, canvas.clientHeight].map(px => px * devicePixelRatio);
    const paint = canvas.getContext("2d"), lane = canvas.height / told.slots, second = canvas.width / SPAN_S;
    const bar = (kind, left, from, width, height) => {
      paint.fillStyle = colours[kind];
      paint.fillRect(left, from - height, width, height);
    };
    bar("empty", 0, canvas.height, canvas.width, canvas.height);
    for (const step of steps) {
      const left = (step.start_s - until + SPAN_S) * second, width = Math.max(1, step.duration_s * second);
      const live = step.num_rows * lane;
      bar("live", left, canvas.height, width, live);
      bar("dead", left, canvas.height - live, width, step.num_dead_rows * lane);
    }
    const time = fresh.reduce((sum, step) => sum + step.duration_s, 0) || 1;
    const mean = name => (fresh.reduce((sum, step) => sum + step[name] * step.duration_s, 0) / time).toFixed(1);
    words.textContent = `${told.variant} on ${told.model}: ${mean("num_rows")} of ${told.slots} slots live, ` +
      `${mean("num_dead_rows")} dead, ${fresh.at(-1)?.queue_depth ?? 0} waiting, ${fresh.length} new steps`;
  } catch (problem) {
    words.textContent = `waiting: ${problem}`;
  }
  setTimeout(watch, 1000);
}
watch();

"""The page's style sheet and its one script: a click on a heading sorts the table by that column.

Nothing enters; two strings leave. No class here means a figure.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;line-height:1.25;margin:.4em 0}
h2{font-size:1.15rem;margin:1.8em 0 .5em;border-top:1px solid #ddd;padding-top:.9em}
p{margin:.4em 0}
.answer{font-size:1.2rem;font-weight:600}
.badge{display:inline-block;padding:2px 10px;border-radius:4px;font-weight:700;border:2px solid}
.valid{color:#00563f;border-color:#009E73}.caution{color:#6b4a00;border-color:#E69F00}
.invalid{color:#8c2f00;border-color:#D55E00}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:12px}
figure{margin:0;min-width:0;max-width:620px}
figure.wide{max-width:none}
figure svg{width:100%;height:auto;display:block}
.narrow{max-width:560px}
.wide{overflow-x:auto;margin:0 0 14px}
.wide svg{min-width:600px}
figcaption,.note{font-size:.88rem;color:#555}
figcaption{position:sticky;left:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
th button{font:inherit;font-weight:600;text-align:inherit;background:none;border:0;
padding:0;cursor:pointer;color:inherit}
th button:after{content:" \\2195";color:#999}
th[aria-sort=ascending] button:after{content:" \\2191";color:#222}
th[aria-sort=descending] button:after{content:" \\2193";color:#222}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].textContent.trim();
    const number = text => parseFloat(text.replace(/,/g, ""));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)], [m, n] = [number(x), number(y)];
      const order = isNaN(m) || isNaN(n) ? x.localeCompare(y) : m - n;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""

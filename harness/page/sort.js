// A click on a heading sorts the table by that column.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
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

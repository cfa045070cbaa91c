"use strict";
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return "";
    return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim();
  };
  const compare = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    const numeric = !Number.isNaN(x) && !Number.isNaN(y);
    return numeric ? x - y : a.localeCompare(b, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = head.getAttribute("aria-sort") === "descending" ? "ascending"
          : head.getAttribute("aria-sort") === "ascending" ? "descending"
          : head.classList.contains("n") ? "descending" : "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const empty = (text) => text === "" || text === "—";
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => empty(a) || empty(b) ? empty(a) - empty(b) : sign * compare(a, b));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }
  // what is folded away would be missing on paper
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
  });
})();

"use strict";
// Tables of all rows: a click on a column's head sorts by it, a field above them filters. Without this they are as printed.
for (const table of document.querySelectorAll("table.rows")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => {
    const cell = row.cells[k], number = parseFloat(cell.dataset.v ?? cell.textContent);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  const before = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  heads.forEach((head, k) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => before(value(a, k), value(b, k)) * (down ? -1 : 1));
      body.append(...rows);
    });
  });
  const field = document.createElement("input");
  field.className = "filter";
  field.type = "search";
  field.placeholder = "filter: words that a row has, as in gru train B32";
  field.setAttribute("aria-label", "filter the rows");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
  table.parentElement.before(field);
}

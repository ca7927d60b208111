"use strict";
// The table of all results: filtered by a text and by one choice a column, sorted by its headers.
(() => {
  const section = document.getElementById("results");
  const body = section.querySelector("tbody");
  const rows = [...body.rows];
  const count = section.querySelector("output");
  const text = section.querySelector("input");
  const choices = [...section.querySelectorAll("select")];

  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      const fits = words.every((word) => content.includes(word)) &&
        choices.every((choice) => !choice.value || row.cells[choice.dataset.column].textContent === choice.value);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };

  section.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const header = button.closest("th");
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[header.cellIndex].textContent;
    const number = (text) => text ? Number(text.replace(/^~/, "")) : NaN;  // ~: noisy, and a number all the same
    const compare = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;  // what is missing comes last, always
      const order = Number.isNaN(x) ? key(a).localeCompare(key(b), "en", {numeric: true}) : x - y;
      return down ? -order : order;
    };
    rows.sort(compare);
    body.append(...rows);
  }));
  section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  text.addEventListener("input", apply);
  choices.forEach((choice) => choice.addEventListener("change", apply));
  apply();
})();

// On a phone, tables of words show a row as a list (site.css); each cell then needs its column's name.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".table-wrapper table")) {
    const names = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    if (names.length < 3 || table.querySelector("td.text-right")) continue;
    table.classList.add("of-words");
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, index) => index && names[index] && cell.setAttribute("data-column", names[index]));
  }
});

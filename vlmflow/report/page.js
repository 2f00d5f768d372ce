"use strict";
// Pictures stand once in the data block and are put wherever they are shown. Nothing here makes HTML of text.
(() => {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  for (const image of document.querySelectorAll("img[data-p]")) {
    const [clear, blurred] = pictures[Number(image.dataset.p)];
    image.src = blurred === null ? clear : blurred;
  }
  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("button.reveal") : null;
    if (button === null) return;
    const image = button.querySelector("img");
    const [clear, blurred] = pictures[Number(image.dataset.p)];
    const show = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(show));
    image.src = show ? clear : blurred;
  });

  const body = document.querySelector("#table tbody");
  const rows = Array.from(body.rows, (row) => ({ row, text: row.textContent.toLowerCase() }));
  const words = document.getElementById("f-text");
  const choices = ["decision", "status", "sets"].map((name) => [name, document.getElementById("f-" + name)]);
  const shown = document.getElementById("shown");
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    let count = 0;
    for (const { row, text } of rows) {
      const fits = text.includes(wanted)
        && choices.every(([name, choice]) => !choice.value || row.dataset[name].split(" ").includes(choice.value));
      row.hidden = !fits;
      if (fits) count += 1;
    }
    shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows shown`;
  };
  words.addEventListener("input", filter);
  for (const [, choice] of choices) choice.addEventListener("change", filter);
  document.getElementById("f-clear").addEventListener("click", () => {
    words.value = "";
    for (const [, choice] of choices) choice.value = "";
    filter();
  });
  filter();

  const heads = Array.from(document.querySelectorAll("#table thead th"));
  const keyOf = (row, column) => {
    const score = row.cells[column].querySelector("[data-v]");
    return score === null ? row.cells[column].textContent.toLowerCase() : parseFloat(score.dataset.v);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : Number(a > b));
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button === null) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map(({ row }) => ({ row, key: keyOf(row, column) }));
      const isEmpty = ({ key }) => Number.isNaN(key) || key === "–";
      const full = keyed.filter((item) => !isEmpty(item));
      full.sort((a, b) => (down ? compare(b.key, a.key) : compare(a.key, b.key)));
      // What has no value comes last, whichever way it goes.
      body.append(...full.map(({ row }) => row), ...keyed.filter(isEmpty).map(({ row }) => row));
    });
  });
})();

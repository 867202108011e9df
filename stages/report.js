// What the page can do beyond being read: it is whole without this.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Tables are sorted by a click on a heading: down, up, then as they were.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value ?? cell.textContent.trim();
    return value === "" ? null : Number.isNaN(Number(value)) ? value : Number(value);
  };
  const compared = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
  for (const table of all("table.sortable")) {
    const body = table.tBodies[table.tBodies.length - 1];
    const original = [...body.rows];
    const heads = all("thead tr:last-child th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = { descending: "ascending", ascending: null }[now] ?? (now ? null : "descending");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (!next) return body.append(...original);
        head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const keyed = original.map((row) => [keyOf(row, column), row]);
        keyed.sort(([a], [b]) =>
          a === null || b === null ? (a === null) - (b === null) : sign * compared(a, b));
        body.append(...keyed.map(([, row]) => row));
      });
    });
  }

  // Points of figures tell what they are, at once and in the page's own type.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const point of all("figure .point")) {
    const words = point.querySelector("title");
    point.dataset.words = words.textContent;
    words.remove();
    point.addEventListener("pointerenter", () => {
      tip.textContent = point.dataset.words;
      tip.hidden = false;
      const box = point.getBoundingClientRect();
      const left = box.left + box.width / 2 - tip.offsetWidth / 2;
      const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(left, right)) + scrollX}px`;
      const above = box.top - tip.offsetHeight - 10;
      tip.style.top = `${(above > 8 ? above : box.bottom + 10) + scrollY}px`;
    });
    point.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // Samples are filtered by run, by verdict and by what they say.
  const form = document.querySelector("form.filters");
  if (!form) return;
  const samples = all("article.sample");
  const folded = document.querySelector("details.folded");
  const wasOpen = folded?.open;
  const texts = new Map(all(".entry").map((entry) =>
    [entry, entry.querySelector(".completion").textContent.toLowerCase()]));
  const refresh = () => {
    const { run, question, verdict, text } = Object.fromEntries(new FormData(form));
    const words = text.trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const asked = sample.querySelector(".prompt").textContent.toLowerCase().includes(words);
      let visible = 0;
      for (const entry of all(".entry", sample)) {
        const given = JSON.parse(entry.dataset.verdicts)[question];
        entry.hidden = (run && entry.dataset.run !== run) || (verdict && given !== verdict)
          || !(asked || texts.get(entry).includes(words));
        visible += !entry.hidden;
      }
      sample.hidden = !visible;
      shown += visible > 0;
    }
    form.querySelector("output").textContent = `${shown} of ${samples.length} prompts`;
    if (folded) folded.open = wasOpen || Boolean(words || verdict);
  };
  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  refresh();
})();


// What the page can do beyond being read: it is whole without this.
"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const frame = document.querySelector(".window");
  const svg = frame.querySelector("svg");
  const whole = svg.getAttribute("viewBox").split(" ").map(Number);
  let view = [...whole];
  const show = () => svg.setAttribute("viewBox", view.join(" "));
  frame.classList.add("moves");

  // A point of the screen in the picture's units.
  const at = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY);
    return point.matrixTransform(svg.getScreenCTM().inverse());
  };
  const middle = () => ({ x: view[0] + view[2] / 2, y: view[1] + view[3] / 2 });
  const zoom = (factor, { x, y }) => {
    const scale = Math.min(Math.max(view[2] * factor, whole[2] / 40), whole[2] * 2) / view[2];
    view = [x - (x - view[0]) * scale, y - (y - view[1]) * scale, view[2] * scale, view[3] * scale];
    show();
  };
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 500), at(event));
  }, { passive: false });

  // A drag moves the picture; a press that hardly moves is a click on a node.
  let held = null;
  let moved = false;
  svg.addEventListener("pointerdown", (event) => { held = at(event); moved = false; });
  window.addEventListener("pointermove", (event) => {
    if (!held) return;
    const now = at(event);
    const distance = Math.hypot(now.x - held.x, now.y - held.y) * svg.getScreenCTM().a;
    if (!moved && distance < 4) return;
    moved = true;
    frame.classList.add("held");
    view = [view[0] + held.x - now.x, view[1] + held.y - now.y, view[2], view[3]];
    show();
  });
  window.addEventListener("pointerup", () => {
    held = null;
    frame.classList.remove("held");
    setTimeout(() => { moved = false; });  // After the click that ends a drag.
  });
  svg.addEventListener("dragstart", (event) => event.preventDefault());

  const buttons = document.createElement("div");
  buttons.className = "zoom";
  const doings = [
    ["+", "nearer", () => zoom(0.7, middle())],
    ["−", "farther", () => zoom(1 / 0.7, middle())],
    ["⤢", "all of it", () => { view = [...whole]; show(); }],
  ];
  for (const [sign, words, act] of doings) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.title = words;
    button.setAttribute("aria-label", words);
    button.addEventListener("click", act);
    buttons.append(button);
  }
  frame.prepend(buttons);

  // One node's facts at a time, with its arrows lit; at first those of what is worst, or the last.
  const choose = (name) => {
    for (const article of all("article.facts")) article.hidden = article.dataset.node !== name;
    for (const link of all("svg a")) link.classList.toggle("chosen", link.dataset.node === name);
    for (const arrow of all("svg .arrow")) {
      arrow.classList.toggle("lit", [arrow.dataset.from, arrow.dataset.to].includes(name));
    }
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-node]");
    if (!link) return;
    event.preventDefault();
    if (moved && svg.contains(link)) return;
    choose(link.dataset.node);
    document.getElementById("facts").scrollIntoView({ block: "nearest" });
  });
  const first = document.querySelector("svg .failed, svg .unknown") ?? all("svg .node").at(-1);
  choose(first.closest("a").dataset.node);
})();

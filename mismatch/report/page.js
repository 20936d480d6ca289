"use strict";
// A report answers: marks of figures read out their numbers, tables sort, a figure shows the view that is chosen.

// Figures. A mark (a cell, a point, a bar) is what carries a title; the title becomes its label and the text of the tip.
const [tip, ring] = ["tip", "ring"].map((name) => {
  const box = document.createElement("div");
  box.className = name;
  box.hidden = true;
  return document.body.appendChild(box);
});
let shown = null; // the mark that is read out; the ring stands around it

function place() {
  const mark = shown.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = mark.left + mark.width / 2 - box.width / 2;
  const above = mark.top - box.height - 8;
  tip.style.left = Math.max(4, Math.min(left, document.documentElement.clientWidth - box.width - 4)) + "px";
  tip.style.top = (above < 4 ? mark.bottom + 8 : above) + "px";
  for (const side of ["left", "top", "width", "height"]) ring.style[side] = mark[side] + "px";
}

function show(mark) {
  if (mark === shown) return;
  shown = mark;
  tip.hidden = ring.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  place();
}

// How far a point is from a mark; 0 inside.
function distance(mark, x, y) {
  const box = mark.getBoundingClientRect();
  return Math.hypot(Math.max(box.left - x, x - box.right, 0), Math.max(box.top - y, y - box.bottom, 0));
}

// The mark at a point: the one that is hit, or the nearest within a finger's width.
function nearest(marks, event) {
  if (marks.includes(event.target)) return event.target;
  let best = null, least = event.pointerType === "touch" ? 24 : 10;
  for (const mark of marks) {
    const far = distance(mark, event.clientX, event.clientY);
    if (far < least) [best, least] = [mark, far];
  }
  return best;
}

// The next mark in the direction of an arrow key: near, and rather straight ahead than to the side.
function next(marks, from, key) {
  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(from), across = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  let best = null, least = Infinity;
  for (const mark of marks) {
    const [u, v] = middle(mark);
    const ahead = sign * (across ? u - x : v - y), aside = Math.abs(across ? v - y : u - x);
    if (ahead > 0.5 && ahead + 4 * aside < least) [best, least] = [mark, ahead + 4 * aside];
  }
  return best;
}

for (const svg of document.querySelectorAll("svg.figure")) {
  const marks = [...svg.querySelectorAll("title")].map((title) => {
    const mark = title.parentNode;
    mark.setAttribute("aria-label", title.textContent);
    mark.setAttribute("role", "img");
    mark.setAttribute("tabindex", "-1");
    title.remove(); // else the browser shows it a second time
    return mark;
  });
  if (!marks.length) continue;
  marks[0].setAttribute("tabindex", "0"); // one stop of the Tab key a figure; arrow keys go on from there
  const leave = () => show(marks.includes(document.activeElement) ? document.activeElement : null);
  svg.addEventListener("pointermove", (event) => show(nearest(marks, event)));
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("click", (event) => nearest(marks, event)?.focus({ preventScroll: true }));
  svg.addEventListener("focusin", (event) => show(event.target));
  svg.addEventListener("focusout", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const to = event.key.startsWith("Arrow") ? next(marks, event.target, event.key) : null;
    if (!to) return;
    event.preventDefault();
    event.target.setAttribute("tabindex", "-1");
    to.setAttribute("tabindex", "0");
    to.focus();
  });
}
addEventListener("scroll", () => shown && place(), { capture: true, passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && show(null));

// Views of a figure.
for (const choose of document.querySelectorAll("figure .choose")) {
  const views = choose.parentNode.querySelectorAll(".paper"), select = choose.querySelector("select");
  const pick = () => views.forEach((view, at) => { view.hidden = at !== select.selectedIndex; });
  select.addEventListener("change", pick);
  choose.hidden = false;
  pick();
}

// Tables: a heading sorts by its column, then the other way round, then gives the first order back.
// What has no number in a column of numbers goes last, either way.
function sorted(rows, at, way) {
  const keyed = rows.map((row) => {
    const text = row.cells[at].dataset.by ?? row.cells[at].textContent.trim();
    return { row, text, number: text === "" ? NaN : Number(text) };
  });
  keyed.sort((a, b) =>
    Number.isNaN(a.number) - Number.isNaN(b.number) ||
    way * (Number.isNaN(a.number) ? a.text.localeCompare(b.text) : a.number - b.number || 0));
  return keyed.map((one) => one.row);
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], rows = [...body.rows];
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const ways = head.classList.contains("n") ? ["descending", "ascending"] : ["ascending", "descending"];
      const way = { none: ways[0], [ways[0]]: ways[1], [ways[1]]: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", way);
      body.append(...(way === "none" ? rows : sorted(rows, at, way === "ascending" ? 1 : -1)));
    });
  });
}

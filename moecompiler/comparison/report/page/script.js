// what a mark, a cell or a token stands for: under the pointer, under a finger, or by arrow keys in its place
const tip = one("#tip");
const hideTip = () => {
  tip.textContent = "";
  for (const each of all(".active")) each.classList.remove("active");
};
const showTip = (mark) => {
  hideTip();
  mark.classList.add("active");
  tip.textContent = mark.dataset.tip;
  const [at, own] = [mark.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.min(Math.max(at.left + at.width / 2 - own.width / 2, 8), innerWidth - own.width - 8);
  const above = at.top - own.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
};
const nearest = (marks, x, y) => {
  let found;
  let least = Infinity;
  for (const mark of marks) {
    const box = mark.getBoundingClientRect();
    const distance = Math.hypot(x - box.left - box.width / 2, (y - box.top - box.height / 2) / 3);
    if (distance < least) [found, least] = [mark, distance];
  }
  return found;
};
const rests = {}; // the pointer: what scrolls past it was not pointed at
for (const area of all("[data-tips]")) {
  const marks = all("[data-tip]", area);
  if (!marks.length) continue;
  let current = -1;
  let pointed = false;
  const point = (event) => {
    if (event.type === "pointermove" && event.clientX === rests.x && event.clientY === rests.y) return;
    [rests.x, rests.y] = [event.clientX, event.clientY];
    const mark = area.dataset.tips === "near" ? nearest(marks, event.clientX, event.clientY) : event.target.closest("[data-tip]");
    current = marks.indexOf(mark);
    pointed = true;
    if (mark) showTip(mark);
    else hideTip();
  };
  area.addEventListener("pointermove", point);
  area.addEventListener("pointerdown", point);
  area.addEventListener("pointerleave", (event) => { if (pointed && event.pointerType === "mouse") hideTip(); });
  area.addEventListener("blur", hideTip);
  area.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    current = current < 0 ? (step > 0 ? 0 : marks.length - 1) : Math.min(Math.max(current + step, 0), marks.length - 1);
    pointed = false;
    marks[current].scrollIntoView({ block: "nearest", inline: "nearest" });
    showTip(marks[current]);
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("pointerdown", (event) => { if (!event.target.closest("[data-tips]")) hideTip(); });
for (const gone of ["wheel", "pointercancel"]) addEventListener(gone, hideTip, { passive: true });

const switches = all(".switch");
for (const button of switches) {
  button.addEventListener("click", () => {
    for (const each of switches) {
      const shows = each === button;
      each.setAttribute("aria-pressed", String(shows));
      one(`#${each.dataset.shows}`).hidden = !shows;
    }
  });
}

for (const head of all("th[data-sort]")) {
  const body = head.closest("table").tBodies[0];
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  const numeric = head.classList.contains("n");
  const value = (row) => {
    const text = row.cells[Number(head.dataset.sort)].textContent.trim();
    if (!numeric) return text;
    if (text === "∞" || text === "NaN") return Infinity;
    return text === "–" ? -Infinity : parseFloat(text);
  };
  button.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") !== "descending";
    for (const each of all("th[aria-sort]", head.closest("thead"))) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const compare = (a, b) => (numeric ? Number(a > b) - Number(a < b) : a.localeCompare(b, undefined, { numeric: true }));
    const rows = [...body.rows].sort((a, b) => (falling ? -1 : 1) * compare(value(a), value(b)));
    body.append(...rows);
  });
}

const filter = one("#filter");
if (filter) {
  const rows = all("#cases tbody tr").map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const apply = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const { row, text } of rows) {
      row.hidden = !text.includes(wanted);
      shown += !row.hidden;
    }
    one("#shown").textContent = `${shown} of ${rows.length}`;
  };
  filter.addEventListener("input", apply);
  apply();
}

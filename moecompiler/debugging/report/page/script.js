const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

const kinds = all(".kind").map((element) => {
  const step = element.closest(".pass").querySelector("h3").firstChild.textContent;
  const rows = all(".rewrite", element).map((row) => ({ row, text: row.textContent.toLowerCase() }));
  return { element, rows, text: `${step} ${element.querySelector("summary").textContent}`.toLowerCase() };
});
const filter = one("#filter");
const apply = () => {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  let rewrites = 0;
  for (const { element, rows, text } of kinds) {
    const whole = text.includes(wanted);
    let found = 0;
    for (const each of rows) {
      each.row.hidden = !whole && !each.text.includes(wanted);
      if (!each.row.hidden) found += Number(each.row.dataset.count);
    }
    element.hidden = found === 0;
    shown += found > 0;
    rewrites += found;
  }
  for (const group of all(".group")) {
    group.hidden = !group.querySelector(".kind:not([hidden])");
    if (wanted) group.open = true;
  }
  for (const step of all(".pass")) step.hidden = wanted !== "" && !step.querySelector(".kind:not([hidden])");
  one("#shown").textContent = `${counted(rewrites, "rewrite")} of ${counted(shown, "kind")}`;
};
filter.addEventListener("input", apply);
apply();

const setOpen = (open) => { for (const each of all(".group, .kind")) if (!open || !each.hidden) each.open = open; };
one("#expand").addEventListener("click", () => setOpen(true));
one("#collapse").addEventListener("click", () => setOpen(false));

// a picture wider than its place begins where something changes
for (const { element } of kinds) {
  element.addEventListener("toggle", () => {
    for (const canvas of element.open ? all(".canvas", element) : []) {
      const op = canvas.querySelector(".op:not(.context)");
      if (!op) continue;
      const [box, frame] = [op.getBoundingClientRect(), canvas.getBoundingClientRect()];
      canvas.scrollLeft += box.left + box.width / 2 - frame.left - frame.width / 2;
    }
  });
}

for (const button of all(".fit")) {
  button.addEventListener("click", () => {
    const fitted = button.closest(".kind").classList.toggle("fitted");
    button.setAttribute("aria-pressed", String(fitted));
  });
}

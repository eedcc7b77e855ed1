// An answer, token by token: the less likely, the stronger its colour; hovering, or a click, shows what else could have come.
// Texts come as data and are written by textContent alone.
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(p < 0.001 ? 2 : 1)) + "%";

function add(parent, name, text) {
  const made = document.createElement("div");
  made.className = name;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

export default function ({ parentElement, data }) {
  parentElement.querySelector(".tokens")?.remove();
  const root = add(parentElement, "tokens");
  const card = document.createElement("div");
  card.className = "card";
  card.popover = "manual"; // in the browser's top layer: nothing below moves, and nothing cuts it off
  let held = null;

  function show(token, span) {
    card.replaceChildren();
    const listed = token.top.some(([, p]) => p === token.p);
    const rows = listed ? token.top : [...token.top, [token.text, token.p]];
    let marked = false;
    for (const [text, p] of rows) {
      const row = add(card, "row");
      if (!marked && p === token.p) { row.classList.add("chosen"); marked = true; }
      add(row, "word", visible(text));
      add(row, "track").append(add(row, "bar"));
      row.querySelector(".bar").style.width = 100 * p + "%";
      add(row, "share", percent(p));
    }
    card.showPopover();
    const box = span.getBoundingClientRect();
    const below = box.bottom + 4 + card.offsetHeight <= innerHeight;
    card.style.left = Math.max(4, Math.min(box.left, innerWidth - card.offsetWidth - 4)) + "px";
    card.style.top = (below ? box.bottom + 4 : Math.max(4, box.top - card.offsetHeight - 4)) + "px";
  }
  const hide = () => card.hidePopover();

  for (const token of data.tokens) {
    const span = document.createElement("span");
    span.className = "token";
    span.tabIndex = 0;
    span.textContent = token.text;
    const doubt = Math.round(70 * Math.min(1, -Math.log10(token.p) / 4)); // per cent: full at one in ten thousand
    span.style.background = `color-mix(in srgb, var(--st-primary-color) ${doubt}%, transparent)`;
    span.onmouseenter = () => held || show(token, span);
    span.onmouseleave = () => held || hide();
    span.onclick = () => {
      held?.classList.remove("held");
      held = held === span ? null : span;
      held?.classList.add("held");
      held ? show(token, span) : hide();
    };
    span.onkeydown = (event) => event.key === "Enter" && span.onclick();
    root.append(span);
  }
  root.append(card);
}

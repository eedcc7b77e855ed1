// The tokens of an answer: the less likely, the stronger the colour. Hovering or clicking one shows the alternatives.
// Texts arrive as data and are written by textContent only.
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(p < 0.001 ? 2 : 1)) + "%";

function add(parent, name, text) {
  const element = document.createElement("div");
  element.className = name;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export default function ({ parentElement, data }) {
  parentElement.querySelector(".tokens")?.remove();
  const root = add(parentElement, "tokens");
  const card = document.createElement("div");
  card.className = "card";
  card.popover = "manual"; // the browser's top layer: it moves no element and is not clipped
  let pinned = null;

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
    const strength = Math.round(70 * Math.min(1, -Math.log10(token.p) / 4)); // percent; full at a probability of 1e-4
    span.style.background = `color-mix(in srgb, var(--st-primary-color) ${strength}%, transparent)`;
    span.onmouseenter = () => pinned || show(token, span);
    span.onmouseleave = () => pinned || hide();
    span.onclick = () => {
      pinned?.classList.remove("pinned");
      pinned = pinned === span ? null : span;
      pinned?.classList.add("pinned");
      pinned ? show(token, span) : hide();
    };
    span.onkeydown = (event) => event.key === "Enter" && span.onclick();
    root.append(span);
  }
  root.append(card);
}

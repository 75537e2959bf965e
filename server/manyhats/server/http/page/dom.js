// Making and finding elements. Text always becomes a text node: nothing that comes from the server is read as markup.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const { data = {}, ...plain } = properties;
  const made = Object.assign(document.createElement(tag), plain);
  Object.assign(made.dataset, data);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function show(element, isShown = true) {
  element.hidden = !isShown;
}

export function problem(element, error) {
  element.textContent = error ? error.message : "";
  show(element, Boolean(error));
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
export const short = (number) => compact.format(number);

// A rate, to about three digits.
export const rounded = (rate) => (rate && rate < 10 ? rate.toFixed(1) : String(Math.round(rate)));

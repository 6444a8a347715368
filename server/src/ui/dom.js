/* Elements without a framework. Text is set as text: nothing that a model or a file says becomes markup. */

export const $ = id => document.getElementById(id);

/* el('b', 'text'), el('button', {onclick}, 'text', child): an element with its properties and children. */
export function el(tag, ...parts) {
  const node = document.createElement(tag);
  for (const part of parts.flat()) {
    if (part === null || part === undefined || part === false) continue;
    if (typeof part === 'object' && !(part instanceof Node)) {
      const { data = {}, aria = {}, ...properties } = part;
      Object.assign(node, properties);
      Object.assign(node.dataset, data);
      for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
    } else {
      node.append(part);
    }
  }
  return node;
}

/* A button whose first press asks and whose second, within three seconds, does. */
export function sure(label, act) {
  let asked = null;
  const button = el('button', { className: 'plain', onclick: event => {
    event.stopPropagation();
    clearTimeout(asked);
    if (asked) { asked = null; button.textContent = label; act(); return; }
    button.textContent = `${label}: sure?`;
    asked = setTimeout(() => { asked = null; button.textContent = label; }, 3000);
  } }, label);
  return button;
}

/* Says something at a place, as an error or not. What was said stays until something else is. */
export function say(place, text, isError = false) {
  place.textContent = text;
  place.classList.toggle('error', isError);
  place.hidden = !text;
}

export const when = seconds => new Date(seconds * 1000).toLocaleString();

/* 75 -> 1 min 15 s */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole % 3600 / 60)} min`;
}

export const bytes = n => n < 1 << 20 ? `${(n / 1024).toFixed(1)} KiB` : n < 2 ** 30 ? `${(n / 2 ** 20).toFixed(1)} MiB` : `${(n / 2 ** 30).toFixed(1)} GiB`;

/* Markdown as models write it, into elements: headings, lists, quotes, tables, code, emphasis, links. What is not understood
   stays as it was written. */

import { el } from './dom.js';

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/, HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/, RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, QUOTE = /^ {0,3}>\s?(.*)$/, DASHES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = /(`+)([^]*?[^`])\1(?!`)|\*\*([^]+?)\*\*|__([^_]+?)__|\*([^*\s][^*]*?)\*|~~([^]+?)~~|\[([^\]]+)\]\(([^)\s]+)\)|(https?:\/\/[^\s<>)]+)/;

export function markdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.split('\n')));
  return fragment;
}

function blocks(lines) {
  const made = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const fence = line.match(FENCE), heading = line.match(HEADING);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      const code = [];
      for (i++; i < lines.length && !lines[i].trim().startsWith(fence[1]); i++) code.push(lines[i]);
      i++;
      made.push(el('pre', el('code', { className: fence[2] }, code.join('\n'))));
    } else if (heading) {
      made.push(el(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])));
      i++;
    } else if (RULE.test(line)) {
      made.push(el('hr'));
      i++;
    } else if (QUOTE.test(line)) {
      const quoted = [];
      for (; i < lines.length && QUOTE.test(lines[i]); i++) quoted.push(lines[i].match(QUOTE)[1]);
      made.push(el('blockquote', blocks(quoted)));
    } else if (ITEM.test(line)) {
      i = list(lines, i, made);
    } else if (line.includes('|') && i + 1 < lines.length && lines[i + 1].includes('-') && DASHES.test(lines[i + 1])) {
      i = table(lines, i, made);
    } else {
      const paragraph = [];
      for (; i < lines.length && lines[i].trim() && !begins(lines[i]); i++) paragraph.push(lines[i]);
      made.push(el('p', inline(paragraph.join('\n'))));
    }
  }
  return made;
}

const begins = line => [FENCE, HEADING, RULE, QUOTE, ITEM].some(block => block.test(line));

/* Items of one list; what is indented under one is inside it. */
function list(lines, start, made) {
  const [, indent, mark] = lines[start].match(ITEM);
  const ordered = /\d/.test(mark), items = [];
  let i = start;
  while (i < lines.length) {
    const item = lines[i].match(ITEM);
    if (!item || item[1].length > indent.length || /\d/.test(item[2]) !== ordered) break;
    if (item[1].length < indent.length && i > start) break;
    const inside = [item[3]];
    for (i++; i < lines.length; i++) {
      const deeper = lines[i].match(/^(\s*)/)[1].length > indent.length;
      if (lines[i].trim() ? !deeper : !(lines[i + 1] || '').match(/^\s+\S/)) break;
      inside.push(lines[i].slice(Math.min(indent.length + 2, lines[i].match(/^(\s*)/)[1].length)));
    }
    items.push(el('li', single(blocks(inside))));
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] || '')) i++;
  }
  made.push(el(ordered ? 'ol' : 'ul', ordered ? { start: parseInt(mark, 10) } : null, items));
  return i;
}

/* An item of one line is not a paragraph. */
const single = made => made[0] && made[0].tagName === 'P' ? [...made[0].childNodes, ...made.slice(1)] : made;

function table(lines, start, made) {
  const cells = line => line.trim().replace(/^\||\|$/g, '').split(/(?<!\\)\|/).map(cell => cell.trim().replace(/\\\|/g, '|'));
  const head = cells(lines[start]), rows = [];
  let i = start + 2;
  for (; i < lines.length && lines[i].includes('|'); i++) rows.push(cells(lines[i]));
  made.push(el('table', el('thead', el('tr', head.map(cell => el('th', inline(cell))))),
    el('tbody', rows.map(row => el('tr', row.map(cell => el('td', inline(cell))))))));
  return i;
}

function inline(text) {
  const made = [];
  for (let rest = text; rest;) {
    const found = rest.match(INLINE);
    if (!found) { made.push(rest); break; }
    made.push(rest.slice(0, found.index));
    const [whole, , code, strong, strong2, soft, struck, label, target, bare] = found;
    rest = rest.slice(found.index + whole.length);
    if (code !== undefined) made.push(el('code', code.trim()));
    else if (strong || strong2) made.push(el('strong', inline(strong || strong2)));
    else if (soft) made.push(el('em', inline(soft)));
    else if (struck) made.push(el('s', inline(struck)));
    else made.push(link(label ? inline(label) : bare, target || bare, whole));
  }
  return made;
}

/* Only to the web: a model's link must not run anything. */
function link(label, target, whole) {
  if (!/^(https?:|mailto:)/i.test(target)) return whole;
  return el('a', { href: target, target: '_blank', rel: 'noopener noreferrer' }, label);
}

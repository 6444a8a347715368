/* The playground: conversations, kept in this browser; one model, or two side by side. */

import { ask, events, json, models } from './api.js';
import { $, el, say } from './dom.js';
import { markdown } from './markdown.js';

const KEPT = 'tandem-talks', MOST_KEPT = 50;

/* A turn of the user, and for each lane what its model said. A turn that failed was never said: it is not kept, and not
   sent again with the next one. */
let talk = fresh(), reading = null, kept = load();

function fresh() {
  return { id: crypto.randomUUID ? crypto.randomUUID() : String(Math.random()), system: '', turns: [], when: 0 };
}

function load() {
  try { return JSON.parse(localStorage.getItem(KEPT)) || []; } catch { return []; }
}

function keep() {
  talk.when = Date.now();
  talk.system = $('system').value;
  kept = [talk, ...kept.filter(other => other.id !== talk.id)].slice(0, MOST_KEPT);
  try { localStorage.setItem(KEPT, JSON.stringify(kept)); } catch { kept.pop(); }
  drawHistory();
}

const lanes = () => $('compare').checked ? ['model', 'model2'] : ['model'];
const isChat = () => $('mode').value === 'chat';
const number = id => $(id).value === '' ? undefined : +$(id).value;

function history(lane) {
  const said = talk.turns.filter(turn => turn.answers[lane]);
  const messages = said.flatMap(turn => [{ role: 'user', content: turn.text }, { role: 'assistant', content: turn.answers[lane].text }]);
  return $('system').value.trim() ? [{ role: 'system', content: $('system').value }, ...messages] : messages;
}

function request(lane, text) {
  const body = {
    model: $(lane).value, stream: true, stream_options: { include_usage: true }, temperature: number('temperature'), top_p: number('top_p'),
    max_tokens: number('tokens'), seed: number('seed'),
  };
  return isChat()
    ? ['v1/chat/completions', { ...body, messages: [...history(lane), { role: 'user', content: text }] }]
    : ['v1/completions', { ...body, prompt: text }];
}

async function send() {
  const text = $('prompt').value;
  if (!text.trim() || reading) return;
  $('prompt').value = '';
  await exchange(text);
}

/* Says it to each lane at once. */
async function exchange(text) {
  const turn = { text, answers: {} }, asked = lanes();
  talk.turns.push(turn);
  reading = new AbortController();
  draw();
  busy(true);
  const failures = await Promise.all(asked.map(lane => answer(lane, turn, text).then(() => null, error => error)));
  reading = null;
  busy(false);
  const failed = failures.find(error => error && error.name !== 'AbortError');
  if (!Object.keys(turn.answers).length) {
    talk.turns.pop();
    if (!$('prompt').value) $('prompt').value = text;
  } else {
    keep();
  }
  draw();
  say($('talk-error'), failed ? failed.message : '', true);
}

async function answer(lane, turn, text) {
  const place = $(`lane-${lane}`).lastElementChild, body = place.querySelector('.text'), thought = place.querySelector('.thought');
  const [path, asked] = request(lane, text), start = performance.now();
  const said = { text: '', reasoning: '', model: asked.model, note: '' };
  let usage = null, first = null, due = false;
  const show = () => {
    due = false;
    body.replaceChildren(isChat() ? markdown(said.text) : said.text);
    if (thought) { thought.hidden = !said.reasoning; thought.lastElementChild.textContent = said.reasoning; }
    follow(lane);
  };
  try {
    const response = await ask(path, json('POST', asked, { signal: reading.signal }));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const choice = event.choices[0];
      if (!choice) continue;
      first ??= performance.now();
      said.text += (isChat() ? choice.delta.content : choice.text) || '';
      said.reasoning += (choice.delta && choice.delta.reasoning_content) || '';
      if (!due) { due = true; requestAnimationFrame(show); }
    }
    turn.answers[lane] = said;
  } finally {
    const seconds = (performance.now() - start) / 1000;
    if (usage) said.note = `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second, the first after ${Math.round((first ?? performance.now()) - start)} ms`;
    if (said.text || said.reasoning) turn.answers[lane] = said;
    show();
  }
}

/* Keeps the end in sight, unless somebody reads further up. */
function follow(lane) {
  const place = $(`lane-${lane}`);
  if (place.scrollHeight - place.scrollTop - place.clientHeight < 80) place.scrollTop = place.scrollHeight;
}

function busy(is) {
  $('stop').hidden = !is;
  $('send').disabled = is;
}

function draw() {
  for (const lane of ['model', 'model2']) {
    const place = $(`lane-${lane}`), isShown = lanes().includes(lane);
    place.hidden = !isShown;
    if (!isShown) continue;
    // Turns from before the second model came belong to the first alone.
    const said = (turn, index) => turn.answers[lane] || (reading && index === talk.turns.length - 1);
    place.replaceChildren(...talk.turns.flatMap((turn, index) => said(turn, index) ? [drawUser(turn, index), drawAnswer(turn, lane, index)] : []));
    place.scrollTop = place.scrollHeight;
  }
  $('lanes').classList.toggle('two', lanes().length === 2);
}

function drawUser(turn, index) {
  const edit = el('button', { className: 'plain', onclick: () => rewrite(index), title: 'Back to this turn, to say it otherwise' }, 'Edit');
  return el('div', { className: 'turn user' }, el('b', 'You'), el('div', { className: 'text' }, turn.text), el('div', { className: 'tools' }, edit));
}

function drawAnswer(turn, lane, index) {
  const said = turn.answers[lane], isLast = index === talk.turns.length - 1;
  const thought = el('details', { className: 'thought', hidden: !said || !said.reasoning }, el('summary', 'Reasoning'), el('div', said ? said.reasoning : ''));
  const text = el('div', { className: 'text' }, said ? (isChat() ? markdown(said.text) : said.text) : '');
  const tools = said && el('div', { className: 'tools' }, el('small', said.note),
    el('button', { className: 'plain', onclick: () => navigator.clipboard && navigator.clipboard.writeText(said.text) }, 'Copy'),
    isLast && lane === 'model' && el('button', { className: 'plain', id: 'again', onclick: again }, 'Regenerate'));
  return el('div', { className: 'turn assistant' }, el('b', said ? said.model : $(lane).value), thought, text, tools);
}

/* The turn and all after it are taken back. */
function rewrite(index) {
  if (reading) return;
  $('prompt').value = talk.turns[index].text;
  talk.turns.length = index;
  draw();
  $('prompt').focus();
}

function again() {
  if (reading || !talk.turns.length) return;
  const { text } = talk.turns.pop();
  return exchange(text);
}

function open(other) {
  if (reading) reading.abort();
  talk = other;
  $('system').value = talk.system;
  say($('talk-error'), '');
  draw();
  drawHistory();
}

function drawHistory() {
  const name = other => other.turns[0] ? other.turns[0].text.slice(0, 60) : 'empty';
  $('history').replaceChildren(...kept.map(other => el('li', { className: other.id === talk.id ? 'picked' : '' },
    el('button', { className: 'plain name', onclick: () => open(other), title: new Date(other.when).toLocaleString() }, name(other)),
    el('button', { className: 'plain', title: 'Forget it', aria: { label: 'Forget this conversation' }, onclick: () => forget(other) }, '×'))));
  $('history-none').hidden = kept.length > 0;
}

function forget(other) {
  kept = kept.filter(one => one.id !== other.id);
  localStorage.setItem(KEPT, JSON.stringify(kept));
  if (other.id === talk.id) open(fresh());
  drawHistory();
}

function choices() {
  for (const id of ['model', 'model2']) {
    const before = $(id).value;
    $(id).replaceChildren(...models.data.map(model => new Option(model.id, model.id, false, model.id === before)));
  }
}

/* From another part of the page: this model, please. */
export function talkTo(id) {
  $('model').value = id;
  location.hash = 'talk';
  $('prompt').focus();
}

export function start() {
  models.listeners.add(choices);
  $('send').onclick = send;
  $('stop').onclick = () => reading && reading.abort();
  $('new').onclick = () => { open(fresh()); $('prompt').focus(); };
  $('compare').onchange = () => { $('second').hidden = !$('compare').checked; draw(); };
  $('mode').onchange = draw;
  $('prompt').onkeydown = event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === 'Escape' && reading) reading.abort();
    if (event.key === 'ArrowUp' && !$('prompt').value && talk.turns.length) { event.preventDefault(); rewrite(talk.turns.length - 1); }
  };
  draw();
  drawHistory();
}

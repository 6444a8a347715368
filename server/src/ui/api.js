/* What the page asks the server, and the key it asks with. The key lives as long as the tab, for this page and the API's. */

import { $ } from './dom.js';

const KEY = 'tandem-key';
const changed = new Set();

export function startKey() {
  $('key').value = sessionStorage.getItem(KEY) || '';
  $('key').onchange = () => {
    sessionStorage.setItem(KEY, $('key').value.trim());
    models.data = [];
    changed.forEach(act => act());
  };
}

export const onKey = act => changed.add(act);

function headers(extra) {
  const key = $('key').value.trim();
  return key ? { ...extra, Authorization: 'Bearer ' + key } : extra;
}

export async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers || {}) });
  const refused = response.status === 401;
  $('asked').hidden = !refused;
  $('key').classList.toggle('wanted', refused);
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `${response.status} ${response.statusText}`);
  }
  return response;
}

export const api = async (path, options) => (await ask(path, options)).json();

export const json = (method, body, more = {}) =>
  ({ method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), ...more });

export const post = (path, body = {}) => api(path, json('POST', body));

export async function upload(file, purpose) {
  const form = new FormData();
  form.append('purpose', purpose);
  form.append('file', file);
  return (await api('v1/files', { method: 'POST', body: form })).id;
}

/* Saves what a route answers as a file, which a link could not: it would not show the key. */
export async function download(path, name) {
  const blob = await (await ask(path)).blob();
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/* The objects of an event stream. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ''; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(':')) continue; // the server is only still here
      const data = part.replace(/^data: /, '');
      if (data === '[DONE]') return;
      yield JSON.parse(data);
    }
  }
}

/* All models, checkpoints among them, as they were last heard of; `refresh` hears again and tells who listens. */
export const models = {
  data: [],
  listeners: new Set(),
  get base() { return this.data.find(model => !model.parent); },
  async refresh() {
    const { data } = await api('v1/models?include_checkpoints=true');
    const ids = list => list.map(model => model.id).join('\n');
    const isNew = ids(data) !== ids(this.data);
    this.data = data;
    if (isNew) this.listeners.forEach(hear => hear());
  },
};

/* Adapters: what each is, download, delete, and one more from a folder or the hub. */

import { ask, download, json, models } from './api.js';
import { $, el, say, sure, when } from './dom.js';
import { talkTo } from './talk.js';

export function draw() {
  const shown = models.data.filter(model => model.parent && ($('with-checkpoints').checked || model.step_number === undefined));
  $('adapters-none').hidden = shown.length > 0;
  $('adapters').closest('table').hidden = !shown.length;
  $('adapters').replaceChildren(...shown.map(model => el('tr',
    el('td', el('code', model.id), el('small', `on ${model.parent}`)),
    el('td', String(model.lora_rank ?? '')),
    el('td', model.fine_tuning_job_id ? el('small', model.fine_tuning_job_id) : 'loaded'),
    el('td', el('small', when(model.created))),
    el('td', { className: 'tools' },
      el('button', { className: 'plain', onclick: () => talkTo(model.id) }, 'Talk'),
      el('button', { className: 'plain', onclick: () => download(`v1/adapters/${encodeURIComponent(model.id)}/download`, `${model.id}.tar`).catch(stumble) }, 'Download'),
      sure('Delete', () => ask(`v1/models/${encodeURIComponent(model.id)}`, json('DELETE')).then(() => models.refresh()).catch(stumble))))));
}

async function load() {
  try {
    await ask('v1/load_lora_adapter', json('POST', { lora_name: $('lora-name').value, lora_path: $('lora-path').value }));
    say($('adapters-said'), `${$('lora-name').value} is loaded.`);
    await models.refresh();
  } catch (error) {
    stumble(error);
  }
}

const stumble = error => say($('adapters-said'), error.message, true);

export function start() {
  models.listeners.add(draw);
  $('with-checkpoints').onchange = draw;
  $('load').onclick = load;
}

/* A new fine-tuning job: its files, what they look like to the model, its settings. */

import { api, models, onKey, post, upload } from './api.js';
import { $, bytes, el, say } from './dom.js';
import { pick } from './jobs.js';

/* In the form by name; the rest is under "All settings". */
const SHOWN = { epochs: 'n_epochs', batch: 'batch_size', rate: 'learning_rate', rank: 'lora_r', length: 'max_seq_length', steps: 'max_steps' };
const LINES_CHECKED = 200000, ERRORS_SHOWN = 5;

const chosen = { training: null, validation: null };
/* File -> the id under which the server has it. */
const uploaded = new Map();

function zone(kind) {
  const place = $(`drop-${kind}`), input = $(`file-${kind}`);
  const take = file => { if (file) choose(kind, file).catch(stumble); };
  input.onchange = () => take(input.files[0]);
  place.ondragover = event => { event.preventDefault(); place.classList.add('over'); };
  place.ondragleave = () => place.classList.remove('over');
  place.ondrop = event => {
    event.preventDefault();
    place.classList.remove('over');
    take(event.dataTransfer.files[0]);
  };
}

async function choose(kind, file) {
  chosen[kind] = file;
  $(`drop-${kind}`).querySelector('.name').textContent = `${file.name}, ${bytes(file.size)}`;
  const { rows, errors } = /\.jsonl?$/.test(file.name) ? check(await file.text()) : { rows: null, errors: [] };
  const more = errors.length > ERRORS_SHOWN ? [`and ${errors.length - ERRORS_SHOWN} more`] : [];
  const place = $(`about-${kind}`);
  say(place, errors.length ? [...errors.slice(0, ERRORS_SHOWN), ...more].join('\n') : rows === null ? '' : `${rows} rows`, errors.length > 0);
  if (kind === 'training') $('preview').replaceChildren();
}

/* What can be said of lines before they are sent; what their fields mean is the server's to say. */
function check(text) {
  if (text.trimStart().startsWith('[')) {
    try { return { rows: JSON.parse(text).length, errors: [] }; } catch (error) { return { rows: 0, errors: [error.message] }; }
  }
  const errors = [];
  let rows = 0;
  text.split('\n').slice(0, LINES_CHECKED).forEach((line, index) => {
    if (!line.trim()) return;
    rows++;
    try {
      if (typeof JSON.parse(line) !== 'object') errors.push(`Line ${index + 1}: not an object`);
    } catch (error) {
      errors.push(`Line ${index + 1}: ${error.message}`);
    }
  });
  return { rows, errors };
}

async function idOf(file) {
  if (!file) return undefined;
  if (!uploaded.has(file)) uploaded.set(file, await upload(file, 'fine-tune'));
  return uploaded.get(file);
}

/* The job as it is asked for. */
async function body() {
  if (!chosen.training) throw new Error('Choose a training file first.');
  const settings = {};
  for (const [id, name] of Object.entries(SHOWN)) if ($(id).value) settings[name] = +$(id).value;
  for (const input of $('settings').querySelectorAll('[data-name]')) {
    const value = input.value.trim();
    const { name, kind } = input.dataset, isText = kind === 'text' || kind === 'names' && !value.startsWith('[');
    if (value) settings[name] = isText ? value : JSON.parse(value);
  }
  say($('said'), `Uploading ${chosen.training.name} ...`);
  return {
    model: $('start').value, training_file: await idOf(chosen.training), validation_file: await idOf(chosen.validation),
    suffix: $('suffix').value || undefined, ...settings,
  };
}

/* What the model would read of the first rows, with what it would learn marked; and what there is of all. */
async function preview() {
  $('look').disabled = true;
  try {
    const { statistics: s, format, data, hyperparameters } = await post('v1/fine_tuning/preview?rows=3', await body());
    const part = s.whole_file ? '' : 'of the first rows: ';
    say($('said'), `${format}: ${part}${s.rows} rows, ${s.tokens} tokens, ${s.trained_tokens} of them learned, the longest row ${s.longest}` +
      `${s.cut ? `; ${s.cut} are cut` : ''}${s.dropped ? `; ${s.dropped} have nothing to learn and are left out` : ''}` +
      (s.merged ? `; of ${s.merged} the prompt ends within a token` : ''));
    const piece = ({ text, weight }) => weight ? el('mark', { title: `weight ${weight}` }, text) : text;
    $('preview').replaceChildren(...data.flatMap(row => row.examples.map(example => el('pre', example.pieces.map(piece)))),
      el('small', `${hyperparameters.n_epochs} epochs of batches of ${hyperparameters.batch_size}, learning rate ${hyperparameters.learning_rate.toPrecision(3)}`));
  } catch (error) {
    stumble(error);
  }
  $('look').disabled = false;
}

async function train() {
  $('train').disabled = true;
  try {
    const job = await post('v1/fine_tuning/jobs', await body());
    say($('said'), `${chosen.training.name} is uploaded, the job is ${job.id}.`);
    pick(job.id);
  } catch (error) {
    stumble(error);
  }
  $('train').disabled = false;
}

const stumble = error => say($('said'), error.message, true);

/* All settings of a job, out of the API's own document. */
async function drawSettings() {
  if ($('settings').children.length || !$('more').open) return;
  const document = await api('openapi.json');
  const { properties } = document.components.schemas.TrainingSettings, shown = new Set(Object.values(SHOWN));
  $('settings').replaceChildren(...Object.entries(properties).filter(([name]) => !shown.has(name)).map(([name, schema]) => {
    // What one value may be. (A list of values makes a sweep: that is asked over HTTP.)
    const one = (schema.oneOf || [schema]).filter(form => form.type !== 'null' && !form.enum?.includes('auto'));
    const form = one.find(form => form.type !== 'array') || one[0] || schema, types = [form.type].flat();
    const options = types.includes('boolean') ? ['true', 'false'] : (form.enum || []).filter(word => word !== null);
    const names = types.includes('string') && one.some(form => form.items?.type === 'string') && !options.length;
    const kind = names ? 'names' : types.includes('string') ? 'text' : 'json';
    const input = options.length
      ? el('select', new Option('as the server chooses', ''), options.map(word => new Option(word, word)))
      : el('input', { placeholder: names ? '["q_proj", "v_proj"]' : '' });
    input.dataset.name = name;
    input.dataset.kind = kind;
    return el('label', { title: schema.description || '' }, name, input, el('small', (schema.description || '').split('\n')[0]));
  }));
}

function choices() {
  const before = $('start').value;
  $('start').replaceChildren(...models.data.map(model => new Option(model.id, model.id, false, model.id === before)));
}

export function start() {
  models.listeners.add(choices);
  zone('training');
  zone('validation');
  $('train').onclick = train;
  $('look').onclick = preview;
  $('more').ontoggle = () => drawSettings().catch(stumble);
  // What one key uploaded is not another's.
  onKey(() => uploaded.clear());
}

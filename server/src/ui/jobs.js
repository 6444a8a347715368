/* Jobs: how far they are, their loss, events and checkpoints; pause, resume, cancel. */

import { api, models, post } from './api.js';
import { chart } from './chart.js';
import { $, duration, el, say, sure, when } from './dom.js';
import { talkTo } from './talk.js';

const EVENTS_SHOWN = 200;

let picked = null, jobs = [];

/* What is known of each job's events: points of the curve and messages, oldest first; and whether there can be more. */
const logs = new Map();
export const logOf = id => logs.get(id) || logs.set(id, { points: [], events: [], checkpoints: [], newest: null, done: false, reading: null }).get(id);
const ended = status => ['succeeded', 'failed', 'cancelled'].includes(status);

export function pick(id) {
  picked = id;
  drawJobs();
  draw();
  look().catch(stumble);
}

/* Reads what is new: pages come newest first, so they are gathered back to what is known. An ended job is not asked again. */
function follow(job) {
  const log = logOf(job.id);
  if (!log.done) log.reading ??= read(job, log).finally(() => { log.reading = null; });
  return log.reading;
}

async function read(job, log) {
  const fresh = [];
  for (let after = '', more = true; more;) {
    const page = await api(`v1/fine_tuning/jobs/${job.id}/events?limit=${log.newest ? 50 : 1000}${after}`);
    const known = page.data.findIndex(event => event.id === log.newest);
    fresh.push(...(known < 0 ? page.data : page.data.slice(0, known)));
    more = page.has_more && known < 0;
    after = page.data.length ? '&after=' + page.data[page.data.length - 1].id : '';
  }
  if (fresh.length) {
    log.newest = fresh[0].id;
    fresh.reverse();
    log.points.push(...fresh.map(event => event.data).filter(data => data && data.step));
    log.events = [...log.events, ...fresh.filter(event => event.type !== 'metrics')].slice(-EVENTS_SHOWN);
  }
  const known = log.checkpoints.length;
  log.checkpoints = (await api(`v1/fine_tuning/jobs/${job.id}/checkpoints?limit=100`)).data;
  log.done = ended(job.status);
  if (log.done || log.checkpoints.length !== known) await models.refresh();
}

/* Says in how many milliseconds to look again. */
export async function look() {
  jobs = (await api('v1/fine_tuning/jobs?limit=20')).data;
  picked = picked || (jobs[0] && jobs[0].id);
  drawJobs();
  const job = jobs.find(job => job.id === picked);
  if (job) {
    await Promise.all([job, ...(job.trials || []).map(trial => ({ id: trial.job, status: job.status }))].map(follow));
    draw();
  }
  return jobs.every(job => ended(job.status) || job.status === 'paused') ? 5000 : 1500;
}

/* Of a sweep, each trial's; names grow short, so that many stand in one line. */
function curves(job) {
  const of = (id, key) => logOf(id).points.map(point => [point.step, point[key]]);
  const trials = job.trials || [];
  return trials.length
    ? trials.map((trial, i) => [`${trial.number}:`, `hsl(${360 * i / trials.length} 65% 45%)`, of(trial.job, 'train_loss')])
    : [['train loss', '--warm', of(job.id, 'train_loss')], ['valid loss', '--cool', of(job.id, 'valid_loss')]];
}

/* Of a job's steps, as far as its events were read. */
function part(job) {
  if (job.status === 'succeeded') return 1;
  const last = logOf(job.id).points.findLast(point => point.total_steps);
  return last ? last.step / last.total_steps : 0;
}

/* The elements of each job, made anew only when it is another kind of row: a button that is being pressed stays. */
const rows = new Map();

function row(job) {
  const key = [job.status, job.fine_tuned_model, job.id === picked].join();
  if (rows.get(job.id)?.key !== key) rows.set(job.id, { key, ...make(job) });
  const { node, line, bar, percent, left } = rows.get(job.id), share = part(job);
  line.hidden = ended(job.status) || !share;
  bar.value = share;
  percent.textContent = `${Math.floor(share * 100)} %`;
  left.textContent = job.estimated_finish ? `${duration(job.estimated_finish - Date.now() / 1000)} left` : '';
  return node;
}

function make(job) {
  const tell = route => post(`v1/fine_tuning/jobs/${job.id}/${route}`).then(look).catch(stumble);
  const act = (label, route) => el('button', { className: 'plain', onclick: event => { event.stopPropagation(); tell(route); } }, label);
  const bar = el('progress'), percent = el('small'), left = el('small'), line = el('div', { className: 'line' }, bar, percent, left);
  const name = [el('code', job.fine_tuned_model || job.id), el('span', { className: 'status ' + job.status }, job.status)];
  const buttons = !ended(job.status) && [job.status === 'paused' ? act('Resume', 'resume') : act('Pause', 'pause'), sure('Cancel', () => tell('cancel'))];
  const node = el('div', {
    className: 'job' + (job.id === picked ? ' picked' : ''), tabIndex: 0, onclick: () => pick(job.id),
    onkeydown: event => event.key === 'Enter' && event.target === node && pick(job.id),
  }, el('div', { className: 'line' }, name, buttons || []), line);
  return { node, line, bar, percent, left };
}

function drawJobs() {
  $('jobs-none').hidden = jobs.length > 0;
  const wanted = jobs.map(row);
  // What stands where it belongs keeps the focus.
  if (wanted.some((node, i) => $('jobs').children[i] !== node) || wanted.length !== $('jobs').children.length) $('jobs').replaceChildren(...wanted);
}

function draw() {
  const job = jobs.find(job => job.id === picked), log = picked && logOf(picked);
  $('about-job').hidden = !job;
  chart($('curve'), job ? curves(job) : [], 'The loss appears here while a job trains.');
  if (!job) return;
  const newest = log.events[log.events.length - 1];
  say($('news'), job.error ? job.error.message : newest ? newest.message : '', !!job.error);
  const last = log.points.findLast(point => point.train_loss);
  say($('numbers'), last ? `step ${last.step} of ${last.total_steps}, epoch ${last.epoch}, learning rate ${last.learning_rate.toPrecision(3)}, ` +
    `${Math.round(last.tokens_per_second)} tokens a second, ${last.trained_tokens} tokens in all` : '');
  const tried = [...(job.fine_tuned_model ? [['result', job.fine_tuned_model, null]] : []),
    ...log.checkpoints.map(one => [`step ${one.step_number}`, one.fine_tuned_model_checkpoint, one.metrics])];
  const shown = n => Number.isFinite(n) ? n.toFixed(3) : '';
  $('checkpoints').replaceChildren(...tried.map(([what, model, metrics]) => el('tr', el('td', what), el('td', metrics ? shown(metrics.train_loss) : ''),
    el('td', metrics ? shown(metrics.valid_loss) : ''), el('td', el('button', { className: 'plain', onclick: () => talkTo(model) }, 'Try')))));
  $('checkpoints').closest('table').hidden = !tried.length;
  $('log').replaceChildren(...log.events.slice().reverse().map(event => el('li', { className: event.level },
    el('small', when(event.created_at)), ' ', event.message)));
  $('hyper').replaceChildren(...Object.entries(job.hyperparameters || {}).filter(([, value]) => value !== null)
    .flatMap(([name, value]) => [el('dt', name), el('dd', Array.isArray(value) ? value.join(', ') : String(value))]));
}

const stumble = error => say($('said'), error.message, true);

export function start() {
  new ResizeObserver(draw).observe($('curve'));
  matchMedia('(prefers-color-scheme: dark)').onchange = draw;
}

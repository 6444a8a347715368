/* The server, live: what its metrics say now, and what changed since the look before. */

import { api, ask } from './api.js';
import { $, bytes, el, say } from './dom.js';

const SHOWN = 120;
const series = new Map();
let before = null;

/* name -> [{labels, value}] of the text that Prometheus reads. */
function parse(text) {
  const found = new Map();
  for (const line of text.split('\n')) {
    const match = line.match(/^([\w:]+)(?:\{(.*)\})? (\S+)$/);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] || '').matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    found.set(match[1], [...(found.get(match[1]) || []), { labels, value: +match[3] }]);
  }
  return found;
}

const sum = (metrics, name) => (metrics.get(name) || []).reduce((all, { value }) => all + value, 0);

/* The value below which a share of a histogram's entries lie: the bound of its bucket. `since` is taken off. */
function quantile(metrics, since, name, share) {
  const counts = from => {
    const by = new Map();
    for (const { labels, value } of from.get(`${name}_bucket`) || []) by.set(labels.le, (by.get(labels.le) || 0) + value);
    return by;
  };
  const now = counts(metrics), then = since ? counts(since) : new Map();
  const bounds = [...now].map(([bound, count]) => [bound === '+Inf' ? Infinity : +bound, count - (then.get(bound) || 0)]).sort(([a], [b]) => a - b);
  const all = bounds.length ? bounds[bounds.length - 1][1] : 0;
  if (!all) return null;
  const found = bounds.find(([, count]) => count >= share * all);
  return found ? found[0] : null;
}

const ms = seconds => seconds === null ? 'none yet' : seconds === Infinity ? 'beyond all bounds' : seconds >= 1 ? `${seconds.toFixed(2)} s` : `${Math.round(seconds * 1000)} ms`;

function tiles(metrics, at) {
  const seconds = before ? (at - before.at) / 1000 : 0;
  const rate = name => before ? Math.max(0, sum(metrics, name) - sum(before.metrics, name)) / seconds : 0;
  const both = (name, share) => ms(quantile(metrics, null, name, share));
  const queries = sum(metrics, 'vllm:prefix_cache_queries_total'), hits = sum(metrics, 'vllm:prefix_cache_hits_total');
  const served = rate('tandem:engine_step_seconds_total'), trained = rate('tandem:train_seconds_total');
  return [
    ['Generated tokens a second', rate('vllm:generation_tokens_total').toFixed(0), true],
    ['Prompt tokens a second', rate('vllm:prompt_tokens_total').toFixed(0), true],
    ['Trained tokens a second', rate('tandem:train_tokens_total').toFixed(0), true],
    ['Requests: running, waiting', `${sum(metrics, 'vllm:num_requests_running')}, ${sum(metrics, 'vllm:num_requests_waiting')}`, true],
    ['Time to first token: half, 99 %', `${both('vllm:time_to_first_token_seconds', 0.5)}, ${both('vllm:time_to_first_token_seconds', 0.99)}`],
    ['Between two tokens: half, 99 %', `${both('vllm:inter_token_latency_seconds', 0.5)}, ${both('vllm:inter_token_latency_seconds', 0.99)}`],
    ['KV cache in use', `${(100 * sum(metrics, 'vllm:kv_cache_usage_perc')).toFixed(1)} %`, true],
    ['Prompts found in the prefix cache', queries ? `${(100 * hits / queries).toFixed(0)} %` : 'none yet'],
    ['Adapters in memory', `${sum(metrics, 'tandem:adapters_resident')}, ${bytes(sum(metrics, 'tandem:adapter_bytes'))}`],
    ['Time: serving, training', `${(100 * served).toFixed(0)} %, ${(100 * trained).toFixed(0)} %`, true],
    ['Jobs that train', String(sum(metrics, 'tandem:job_running'))],
    ['Preemptions, failed steps', `${sum(metrics, 'vllm:num_preemptions_total')}, ${sum(metrics, 'tandem:engine_failed_steps_total')}`],
  ];
}

function spark(values) {
  const high = values.reduce((a, b) => Math.max(a, b), 0) || 1, ns = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(ns, 'svg'), line = document.createElementNS(ns, 'polyline');
  svg.setAttribute('viewBox', `0 0 ${SHOWN} 24`);
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  line.setAttribute('points', values.map((value, i) => `${SHOWN - values.length + i},${23 - 22 * value / high}`).join(' '));
  svg.append(line);
  return svg;
}

export async function look() {
  try {
    const metrics = parse(await (await ask('metrics')).text()), at = performance.now();
    $('tiles').replaceChildren(...tiles(metrics, at).map(([name, value, isLine]) => {
      const past = [...(series.get(name) || []), parseFloat(value) || 0].slice(-SHOWN);
      series.set(name, past);
      return el('div', { className: 'tile' }, el('small', name), el('b', value), isLine && spark(past));
    }));
    const up = (name, label) => (metrics.get(name) || []).map(({ labels, value }) => el('li', { className: value ? 'ok' : 'error' },
      `${labels[label]}: ${value ? 'answers' : 'away'}`));
    $('parts').replaceChildren(...up('tandem:replica_up', 'replica'), ...up('tandem:store_up', 'part'));
    before = { metrics, at };
    if (!$('version').textContent) $('version').textContent = `Tandem ${(await api('version')).version}`;
    say($('server-said'), '');
  } catch (error) {
    say($('server-said'), error.message, true);
  }
}

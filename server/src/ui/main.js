/* What is seen, and when to look again. */

import * as adapters from './adapters.js';
import { models, onKey, startKey } from './api.js';
import { $ } from './dom.js';
import * as jobs from './jobs.js';
import * as server from './server.js';
import * as talk from './talk.js';
import * as tune from './tune.js';

const PLACES = ['talk', 'tune', 'adapters', 'server'];
const place = () => PLACES.find(name => location.hash === '#' + name) || 'talk';

function show() {
  for (const name of PLACES) {
    $(`at-${name}`).hidden = name !== place();
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === place()) link.setAttribute('aria-current', 'page'); else link.removeAttribute('aria-current');
  }
  watch();
}

/* Without the key that is wanted there is nothing to look for. Nobody looks at what is not shown. */
let next = null, turn = 0;
async function watch() {
  clearTimeout(next);
  const mine = ++turn;
  let pause = 5000;
  try {
    if (!models.data.length || place() === 'adapters') await models.refresh();
    if (place() === 'tune') pause = await jobs.look();
    if (place() === 'server') { await server.look(); pause = 2000; }
  } catch (error) {
    if (!$('asked').hidden) return;
    $('about').textContent = error.message;
    models.data = [];
  }
  if (mine === turn) next = setTimeout(watch, pause);
}

models.listeners.add(() => {
  const adapters = models.data.filter(model => model.parent && model.step_number === undefined).length;
  $('about').textContent = models.base ? `${models.base.id}, context of ${models.base.max_model_len} tokens, ${adapters} ${adapters === 1 ? 'adapter' : 'adapters'}` : '';
});
startKey();
onKey(watch);
[talk, tune, jobs, adapters].forEach(part => part.start());
addEventListener('hashchange', show);
show();

/* Losses over steps, however long: what falls on one pixel is drawn as its range. `curves` are [name, color, [step, loss]...]. */

const MARGIN = { left: 52, right: 12, top: 12, bottom: 30 };

export function chart(canvas, curves, empty) {
  const { clientWidth: width, clientHeight: height } = canvas, ratio = devicePixelRatio || 1;
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const c = canvas.getContext('2d'), style = getComputedStyle(document.body), color = name => style.getPropertyValue(name);
  c.scale(ratio, ratio);
  c.font = '12px system-ui, sans-serif';
  c.fillStyle = color('--soft');
  const lines = curves.map(([name, tint, points]) => [name, tint, points.filter(([, loss]) => Number.isFinite(loss))]).filter(([, , points]) => points.length);
  const points = lines.flatMap(([, , points]) => points), values = points.map(([, loss]) => loss);
  if (!values.length) { c.fillText(empty, 20, height / 2); return; }
  const most = (a, b) => Math.max(a, b), least = (a, b) => Math.min(a, b);
  const high = values.reduce(most), low = values.reduce(least), room = (high - low || 1) * 0.05, steps = points.map(([step]) => step).reduce(most, 2);
  const x = step => MARGIN.left + (width - MARGIN.left - MARGIN.right) * (step - 1) / (steps - 1);
  const y = loss => MARGIN.top + (height - MARGIN.top - MARGIN.bottom) * (high + room - loss) / (high - low + 2 * room || 1);
  c.strokeStyle = color('--line');
  for (let i = 0; i <= 4; i++) {
    const loss = low + (high - low) * i / 4;
    c.beginPath(); c.moveTo(MARGIN.left, y(loss)); c.lineTo(width - MARGIN.right, y(loss)); c.stroke();
    c.fillText(loss.toPrecision(3), 8, y(loss) + 4);
  }
  c.fillText(`step ${steps}`, width - 80, height - 10);
  let at = MARGIN.left;
  for (const [name, tint, points] of lines) {
    const line = points.map(([step, loss]) => [x(step), loss]);
    c.strokeStyle = c.fillStyle = tint.startsWith('--') ? color(tint) : tint;
    c.lineWidth = 1.5;
    c.beginPath();
    thinned(line).forEach(([x, loss], i) => i ? c.lineTo(x, y(loss)) : c.moveTo(x, y(loss)));
    c.stroke();
    const text = `${name} ${line[line.length - 1][1].toFixed(3)}`;
    c.fillText(text, at, height - 10);
    at += c.measureText(text).width + 20;
  }
}

/* Of points on one pixel the first, the extremes in their order, and the last. */
export function thinned(line) {
  const made = [];
  for (let i = 0; i < line.length;) {
    const pixel = Math.round(line[i][0]);
    let end = i, low = i, high = i;
    for (; end < line.length && Math.round(line[end][0]) === pixel; end++) {
      if (line[end][1] < line[low][1]) low = end;
      if (line[end][1] > line[high][1]) high = end;
    }
    [...new Set([i, Math.min(low, high), Math.max(low, high), end - 1])].forEach(index => made.push(line[index]));
    i = end;
  }
  return made;
}

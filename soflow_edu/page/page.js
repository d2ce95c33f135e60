// The page: a point to drag, what the network answers for it, and what is exact. `ort` is onnxruntime-web.

const content = JSON.parse(document.getElementById('content').textContent)
const at = (id) => document.getElementById(id)
const canvas = at('plane'), pen = canvas.getContext('2d')
const state = { x: content.start, t: 1, s: 0, n: 4, y: null, w: 1, own: null, drawing: false }
const frames = []                     // milliseconds of work, of the last frames
let sessions = null, failure = '', busy = false, again = false, ends = null

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0))
const unzipped = async (text) => new Uint8Array(await new Response(new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer())

async function open() {
  const packed = JSON.parse(at('runtime').textContent)
  const source = URL.createObjectURL(new Blob([await unzipped(packed.script)], { type: 'text/javascript' }))
  const ort = await import(source)
  ort.env.wasm.numThreads = 1
  ort.env.wasm.wasmBinary = await unzipped(packed.wasm)
  const make = (model) => ort.InferenceSession.create(bytes(model), { executionProviders: ['wasm'] })
  sessions = { ort, map: await make(content.map), velocity: await make(content.velocity) }
}

// ------------------------------------------------------------------------------------------- what the network answers
function tensors(points, t, s) {
  const { ort } = sessions, count = points.length, f = (value) => new ort.Tensor('float32', new Float32Array(count).fill(value), [count])
  const given = { x: new ort.Tensor('float32', Float32Array.from(points.flat()), [count, 2]), t: f(t) }
  if (s !== undefined) given.s = f(s)
  return given
}
const labelled = (given, count, y) => content.classes ? { ...given, y: new sessions.ort.Tensor('int64', new BigInt64Array(count).fill(BigInt(y === null ? content.classes : y)), [count]) } : given
async function ask(session, points, t, s, y) {
  const out = (await session.run(labelled(tensors(points, t, s), points.length, y))).out.data
  return points.map((_, i) => [out[2 * i], out[2 * i + 1]])
}
const mixed = (with_, without, w) => with_.map((v, i) => [w * v[0] + (1 - w) * without[i][0], w * v[1] + (1 - w) * without[i][1]])
async function guided(name, points, t, s) {           // of a class with scale w: both answers, mixed
  const { y, w } = state, own = await ask(sessions[name], points, t, s, y)
  return y === null || w === 1 ? own : mixed(own, await ask(sessions[name], points, t, s, null), w)
}
async function euler(x, t, s, n) {
  const states = [x]
  for (let k = 0; k < n; k++) {
    const time = t + (s - t) * k / n, [v] = await guided('velocity', [states[k]], time)
    states.push([0, 1].map((d) => states[k][d] + (s - t) / n * v[d]))
  }
  return states
}

// ------------------------------------------------------------------------------------------- one frame
const law = () => state.own ?? content.law
async function compute() {
  const { x, t, s, n, y, w } = state, found = { exact: exact(law(), x, t, s, y, w) }
  if (!state.own && sessions) {
    found.map = (await guided('map', [x], t, s))[0]
    found.euler = await euler(x, t, s, n)
  } else if (state.own) found.euler = Array.from({ length: n }).reduce((states, _, k) => {
    const z = states[k], v = velocity(law(), z, Math.max(t + (s - t) * k / n, EARLY))
    return [...states, [0, 1].map((d) => z[d] + (s - t) / n * v[d])]
  }, [x])
  return found
}

async function frame() {
  if (!sessions && !failure) return
  if (busy) { again = true; return }
  busy = true
  try {
    const start = performance.now()
    ends = (state.own && !state.own.length) ? null : await compute()
    paint(); say()
    frames.push(performance.now() - start)
    if (frames.length > 500) frames.shift()
  } catch (error) { at('words').textContent = `No answer for this point: ${error.message}.` } finally { busy = false }
  if (again) { again = false; requestAnimationFrame(frame) }
}
const refresh = () => requestAnimationFrame(frame)

// ------------------------------------------------------------------------------------------- drawing
let size = 0
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()
const place = ([x, y]) => [size / 2 * (1 + x / content.reach), size / 2 * (1 - y / content.reach)]
const point = (event) => { const box = canvas.getBoundingClientRect(); return [((event.clientX - box.left) / box.width * 2 - 1) * content.reach, (1 - (event.clientY - box.top) / box.height * 2) * content.reach] }

function line(points, ink, width = 2, dash = []) {
  pen.strokeStyle = ink; pen.lineWidth = width; pen.setLineDash(dash)
  pen.beginPath(); points.forEach((p, i) => i ? pen.lineTo(...place(p)) : pen.moveTo(...place(p))); pen.stroke(); pen.setLineDash([])
}
function arrow(from, to, ink, width = 2.5, head = 9) {
  const [a, b] = place(from), [c, d] = place(to), length = Math.hypot(c - a, d - b)
  if (length < 1) return
  const [u, v] = [(c - a) / length, (d - b) / length], h = Math.min(head, length)
  line([from, to], ink, width)
  pen.fillStyle = ink; pen.beginPath(); pen.moveTo(c, d)
  pen.lineTo(c - h * u + h / 2 * v, d - h * v - h / 2 * u); pen.lineTo(c - h * u - h / 2 * v, d - h * v + h / 2 * u); pen.fill()
}
function mark(p, shape, ink, radius = 6) {
  const [a, b] = place(p)
  pen.fillStyle = ink; pen.strokeStyle = colour('ground'); pen.lineWidth = 1.5; pen.beginPath()
  if (shape === 'disc') pen.arc(a, b, radius, 0, 7)
  if (shape === 'square') pen.rect(a - radius, b - radius, 2 * radius, 2 * radius)
  if (shape === 'diamond') { pen.moveTo(a, b - 1.4 * radius); pen.lineTo(a + 1.4 * radius, b); pen.lineTo(a, b + 1.4 * radius); pen.lineTo(a - 1.4 * radius, b); pen.closePath() }
  pen.fill(); pen.stroke()
}

let backdrop = null, backdropOf = ''      // points of the law at time s, and the velocity at time t: redrawn only when they change
function background() {
  const key = JSON.stringify([size, devicePixelRatio, state.t, state.s, state.y, state.w, state.own, colour('ground')])
  if (key === backdropOf) return backdrop
  backdropOf = key
  backdrop ??= document.createElement('canvas')
  backdrop.width = canvas.width; backdrop.height = canvas.height
  const on = backdrop.getContext('2d'), scale = canvas.width / size
  on.setTransform(scale, 0, 0, scale, 0, 0)
  on.fillStyle = colour('ground'); on.fillRect(0, 0, size, size)
  if (!law().length) return backdrop
  on.fillStyle = colour('data'); on.globalAlpha = 0.55
  for (const [k, [u, v, e, f, g, h]] of content.draws.entries()) {           // the same uniform and normal numbers for every law
    const parts = state.y === null ? law() : law().filter((c) => c.label === state.y)
    let rest = u * parts.reduce((sum, c) => sum + c.weight, 0), c = parts[parts.length - 1]
    for (const part of parts) { if (rest < part.weight) { c = part; break } rest -= part.weight }
    const p = [c.mean[0] + c.std * e, c.mean[1] + c.std * f].map((x0, d) => (1 - state.s) * x0 + state.s * [g, h][d])
    on.beginPath(); on.arc(...place(p), 1.6, 0, 7); on.fill()
  }
  on.globalAlpha = 1; on.strokeStyle = colour('field'); on.lineWidth = 1.2; on.lineCap = 'round'
  const step = 2 * content.reach / 17, time = Math.max(state.t, 0.02)
  for (let i = 0; i < 17; i++) for (let j = 0; j < 17; j++) {
    const p = [(i + 0.5) * step - content.reach, (j + 0.5) * step - content.reach], v = velocity(law(), p, time, state.y, state.w)
    const long = Math.hypot(...v), share = 0.42 * step * Math.tanh(long / 3) / (long + 1e-9), to = [p[0] - share * v[0], p[1] - share * v[1]]   // towards data, as the point goes
    on.beginPath(); on.moveTo(...place(p)); on.lineTo(...place(to)); on.stroke()
    on.beginPath(); on.arc(...place(p), 1.1, 0, 7); on.fillStyle = colour('field'); on.fill()
  }
  return backdrop
}

function paint() {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1
  size = box.width
  if (!size) return
  const pixels = Math.round(size * ratio)
  if (canvas.width !== pixels || canvas.height !== pixels) canvas.width = canvas.height = pixels
  pen.setTransform(1, 0, 0, 1, 0, 0)
  pen.drawImage(background(), 0, 0)
  pen.setTransform(canvas.width / size, 0, 0, canvas.width / size, 0, 0)
  if (state.own) for (const c of state.own) mark(c.mean, 'disc', colour('ink'), 4)
  if (ends) {
    line(ends.exact, colour('exact'), 3)
    if (ends.euler) line(ends.euler, colour('euler'), 1.8, [6, 4])
    for (const p of ends.euler?.slice(1) ?? []) mark(p, 'square', colour('euler'), 3.5)
    mark(ends.exact.at(-1), 'disc', colour('exact'), 7)
    if (ends.map) { arrow(state.x, ends.map, colour('learned')); mark(ends.map, 'diamond', colour('learned'), 5) }
  }
  mark(state.x, 'disc', colour('ink'), 8)
}

// ------------------------------------------------------------------------------------------- words
const shown = (p) => `(${p.map((v) => v.toFixed(2).replace('-', '−')).join(', ')})`
const distance = (p, q) => Math.hypot(p[0] - q[0], p[1] - q[1]).toFixed(3)
let saying = 0
function say() {
  const plural = state.n === 1 ? 'step' : 'steps'
  if (!ends) at('words').textContent = `There are no points yet. ${state.drawing ? 'Click in the plane to add some.' : 'Press “Draw your own points” and click in the plane.'}`
  else {
    const end = ends.exact.at(-1), mixture = state.y !== null && state.w !== 1
    at('words').textContent = [`Point ${shown(state.x)} at time ${state.t.toFixed(2)}`, `exact at time ${state.s.toFixed(2)}: ${shown(end)}`,
      ends.map ? `${mixture ? 'two learned maps, mixed' : 'learned map, one evaluation'}: ${shown(ends.map)}, ${distance(ends.map, end)} away` : state.own ? 'the network does not know your points' : failure,
      ends.euler && `Euler, ${state.n} ${plural}: ${shown(ends.euler.at(-1))}, ${distance(ends.euler.at(-1), end)} away`].filter(Boolean).join('\n')
  }
  for (const id of ['t', 's', 'w']) { at(id).value = state[id]; at(`${id}-value`).textContent = state[id].toFixed(id === 'w' ? 1 : 2) }
  at('n').value = state.n; at('n-value').textContent = state.n
  at('w').disabled = state.y === null
  at('w-why').textContent = state.y === null ? ' (choose a class first)' : ''
  clearTimeout(saying)
  saying = setTimeout(() => { at('said').textContent = at('words').textContent }, 700)      // once the point rests: a reader aloud cannot follow a drag
  at('guidance').hidden = !content.classes || state.own !== null
  at('draw').setAttribute('aria-pressed', state.drawing)
  at('clear').disabled = !state.own?.length
  at('back').disabled = state.own === null
  at('hint').textContent = state.drawing ? 'Click in the plane to add a point, on a point to remove it; Enter does the same where the noise is. Press the button again to drag.' : state.own ? 'The map of this finite set is exact: at s = 0 all noise is on one of your points.' : state.y !== null && state.w !== 1 ? 'Two finished maps, mixed with w, are not the map of the mixed velocities: guidance belongs into training.' : ''
  const kinds = [['exact', 'disc', 'exact trajectory and end'], ...(ends?.map ? [['learned', 'arrow', state.y !== null && state.w !== 1 ? 'two learned maps, mixed' : 'learned map, one evaluation']] : []), ...(ends?.euler ? [['euler', 'square', `Euler, ${state.n} ${plural} along the ${state.own ? 'exact' : 'learned'} velocity`]] : []), ['field', 'tick', `exact velocity at time t, towards data`], ['data', 'dots', `data at time s`]]
  at('legend').innerHTML = kinds.map(([ink, kind, text]) => `<svg viewBox="0 0 38 16" aria-hidden="true">${sign(kind, `var(--${ink})`)}</svg><span>${text}</span>`).join('')
}
function sign(kind, ink) {
  if (kind === 'disc') return `<path d="M2 8H30" stroke="${ink}" stroke-width="3"/><circle cx="30" cy="8" r="6" fill="${ink}"/>`
  if (kind === 'arrow') return `<path d="M2 8H28" stroke="${ink}" stroke-width="2.5"/><path d="M36 8L27 3.5V12.5Z" fill="${ink}"/>`
  if (kind === 'square') return `<path d="M2 8H30" stroke="${ink}" stroke-width="1.8" stroke-dasharray="6 4"/><rect x="26" y="4.5" width="7" height="7" fill="${ink}"/>`
  if (kind === 'tick') return `<path d="M10 8H26" stroke="${ink}" stroke-width="2"/><circle cx="10" cy="8" r="2.5" fill="${ink}"/>`
  return [8, 17, 26].map((x) => `<circle cx="${x}" cy="8" r="2.2" fill="${ink}"/>`).join('')
}

// ------------------------------------------------------------------------------------------- hands
const inside = (v) => Math.min(content.reach, Math.max(-content.reach, v))
function move(x) { state.x = x.map(inside); refresh() }
const NEAR = 0.2      // a click as close as this means the point that is there
function toggle(p) {
  const own = state.own ?? [], others = own.filter(({ mean }) => Math.hypot(mean[0] - p[0], mean[1] - p[1]) > NEAR)
  state.own = others.length < own.length ? others : [...own, { mean: p, std: 0, weight: 1, label: 0 }]
  refresh()
}
let held = false
canvas.addEventListener('pointerdown', (event) => {
  if (!event.isPrimary || event.button) return
  canvas.focus(); event.preventDefault()
  if (state.drawing) { toggle(point(event)); return }
  held = true; canvas.setPointerCapture(event.pointerId); move(point(event))
})
canvas.addEventListener('pointermove', (event) => { if (held) move(point(event)) })
for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { held = false })
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }
canvas.addEventListener('keydown', (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return
  if (KEYS[event.key]) { event.preventDefault(); const far = event.shiftKey ? 0.25 : 0.05; move(state.x.map((v, d) => v + far * KEYS[event.key][d])) }
  if (event.key === 'Enter' && state.drawing && !event.repeat) toggle([...state.x])
})
at('t').addEventListener('input', () => { state.t = +at('t').value; state.s = Math.min(state.s, state.t); refresh() })
at('s').addEventListener('input', () => { state.s = +at('s').value; state.t = Math.max(state.s, state.t); refresh() })
for (const id of ['n', 'w']) at(id).addEventListener('input', () => { state[id] = +at(id).value; refresh() })
at('y').addEventListener('change', () => { state.y = at('y').value === '' ? null : +at('y').value; refresh() })
at('draw').addEventListener('click', () => { state.drawing = !state.drawing; if (state.drawing) { state.own ??= []; state.y = null; at('y').value = '' } refresh() })
at('clear').addEventListener('click', () => { state.own = []; canvas.focus(); refresh() })       // the button is disabled now, and would lose the focus
at('back').addEventListener('click', () => { state.own = null; state.drawing = false; canvas.focus(); refresh() })
new ResizeObserver(refresh).observe(canvas)
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', refresh)

at('y').innerHTML = '<option value="">none</option>' + (content.classes ? [...new Set(content.law.map((c) => c.label))] : []).map((k) => `<option value="${k}">${k}</option>`).join('')
at('words').textContent = 'Loading the network …'
try { await open() } catch (error) { failure = `the network could not be started in this browser: ${error.message}` }
await frame()
window.play = { state, frames, ends: () => ends, refresh: frame }        // for tests, and for the curious

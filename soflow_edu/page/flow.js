// The exact side of the page: marginal velocities in closed form and their flow, on the linear path. Points are [x, y].

// A law is a list of components {mean, std, weight, label}; a finite set has std 0. `y` is a label, or null for all.
export function posterior(law, [x1, x2], t, y = null) {   // -> {data, noise}: the means of x0 and of x1, given that the point is here
  const a = 1 - t, part = []
  let top = -Infinity
  for (const c of law) {
    if (y !== null && c.label !== y) continue
    const S = (a * c.std) ** 2 + t * t, g1 = x1 - a * c.mean[0], g2 = x2 - a * c.mean[1]
    const logit = Math.log(c.weight) - Math.log(S) - (g1 * g1 + g2 * g2) / (2 * S)
    if (logit > top) top = logit
    part.push([logit, c, S, g1, g2])
  }
  const data = [0, 0], noise = [0, 0]
  let total = 0
  for (const [logit, c, S, g1, g2] of part) {
    const w = Math.exp(logit - top), k = a * c.std * c.std / S, n = t / S
    total += w
    data[0] += w * (c.mean[0] + k * g1); data[1] += w * (c.mean[1] + k * g2)
    noise[0] += w * n * g1; noise[1] += w * n * g2
  }
  return { data: [data[0] / total, data[1] / total], noise: [noise[0] / total, noise[1] / total] }
}

export function velocity(law, x, t, y = null, w = 1) {    // w v(x, t, y) + (1 - w) v(x, t)
  const one = (label) => { const p = posterior(law, x, t, label); return [p.noise[0] - p.data[0], p.noise[1] - p.data[1]] }
  const v = one(y)
  if (y === null || w === 1) return v
  const u = one(null)
  return [w * v[0] + (1 - w) * u[0], w * v[1] + (1 - w) * u[1]]
}

// Dormand and Prince's method of order 5, with steps that keep the error of each below `tolerance`.
const NODES = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
const ROWS = [[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9], [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
  [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656], [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]]
const ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]

export function follow(field, x, t, s, tolerance = 1e-6) {   // -> states [[x, y], ...] from time t to s < t
  const states = [x]
  let h = Math.min(0.05, t - s), k1 = field(x, t)
  while (t - s > 1e-12) {
    h = Math.min(h, t - s)
    const k = [k1]
    let end = x
    for (let i = 1; i < 7; i++) {
      end = [0, 1].map((d) => x[d] - h * ROWS[i].reduce((sum, c, j) => sum + c * k[j][d], 0))
      k.push(field(end, t - h * NODES[i]))
    }
    const wrong = [0, 1].map((d) => h * ERROR.reduce((sum, c, j) => sum + c * k[j][d], 0))
    const error = Math.hypot(...wrong) / tolerance
    if (!Number.isFinite(error)) throw new Error('the velocity is not finite here')
    if (error <= 1) { t -= h; x = end; k1 = k[6]; states.push(x) }
    h *= Math.min(5, Math.max(0.2, 0.9 * (error + 1e-12) ** -0.2))
    if (h < 1e-10) throw new Error('the steps of the solver became too small')
  }
  return states
}

// Where the exact map takes x from time t to s. A finite set has no velocity at 0: there the mean of what is left of the set is the end.
export const EARLY = 1e-3
export function exact(law, x, t, s, y = null, w = 1) {
  if (t <= s) return [x]
  const points = law.every((c) => c.std === 0), last = points && s < EARLY ? Math.min(EARLY, t) : s
  const states = follow((z, time) => velocity(law, z, time, y, w), x, t, last)
  if (last > s) {
    const end = states[states.length - 1], v = velocity(law, end, last, y, w)
    states.push([0, 1].map((d) => end[d] + (s - last) * v[d]))
  }
  return states
}

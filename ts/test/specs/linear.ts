/** Matrix products and what is made of them. */
import * as ops from '../../src/core/ops.js'
import { activations, last, product, type Spec, sigmoid, size } from './reference.js'

export const gemmShapes: [number, number, number][] = [
  [1, 1, 1],
  [2, 3, 4],
  [5, 7, 3],
  [0, 3, 2],
  [17, 33, 29],
  [40, 70, 130],
  [3, 80, 65],
]
export const matrix: Spec[] = [
  ...[false, true].flatMap((ta) =>
    [false, true].map(
      (tb): Spec => ({
        name: `matmul${ta ? 'T' : 'N'}${tb ? 'T' : 'N'}`,
        covers: ['matmul'],
        cases: [...gemmShapes, [70, 300, 400] as [number, number, number]].map(([m, n, k]) => ({
          inputs: [ta ? [k, m] : [m, k], tb ? [n, k] : [k, n]],
          o: { m, n, k },
        })),
        depth: (c) => (c.o as { k: number }).k,
        run: ([a, b]) => ops.matmul(a, b, ta, tb),
        ref: ([a, b], _, o) => product(a, b, o.m, o.n, o.k, ta, tb),
      }),
    ),
  ),
  ...[true, false].map(
    (bias): Spec => ({
      name: `siluMulLinear${bias ? ' bias' : ''}`,
      covers: ['siluMulLinear'],
      cases: gemmShapes.map(([m, n, k]) => ({
        inputs: bias
          ? [[m, k], [m, k], [n, k], [n]]
          : [
              [m, k],
              [m, k],
              [n, k],
            ],
      })),
      depth: (c) => last(c.inputs[0]),
      run: ([g, u, w, b]) => ops.siluMulLinear(g, u, w, b),
      ref: ([g, u, w, b], [sg, , sw]) => {
        const h = g.map((v, i) => v * sigmoid(v) * u[i])
        return product(h, w, sg[0], sw[0], sw[1], false, true).map((v, i) => v + (b ? b[i % sw[0]] : 0))
      },
    }),
  ),
  ...(['none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'] as const).flatMap((act) =>
    [true, false].map(
      (bias): Spec => ({
        name: `linear ${act}${bias ? ' bias' : ''}`,
        covers: ['linear'],
        cases: gemmShapes.map(([m, n, k]) => ({
          inputs: bias
            ? [[m, k], [n, k], [n]]
            : [
                [m, k],
                [n, k],
              ],
        })),
        depth: (c) => last(c.inputs[0]),
        run: ([x, w, b]) => ops.linear(x, w, b, act),
        ref: ([x, w, b], [sx, sw]) =>
          product(x, w, sx[0], sw[0], sw[1], false, true).map((v, i) => activations[act](v + (b ? b[i % sw[0]] : 0))),
      }),
    ),
  ),
  {
    // op-checks.ts packs the inputs of every other row too
    name: 'linear with a packed weight',
    covers: ['pack', 'unpack'],
    cases: [...gemmShapes, [70, 300, 400] as const].map(([m, n, k]) => ({
      inputs: [
        [m, k],
        [n, k],
      ],
    })),
    depth: (c) => last(c.inputs[0]),
    run: ([x, w]) => {
      const frozen = w.detach()
      for (const transB of [true, false]) ops.pack(frozen, transB)
      return ops.linear(x, frozen)
    },
    ref: ([x, w], [sx, sw]) => product(x, w, sx[0], sw[0], sw[1], false, true),
  },
  {
    name: 'patchEmbedding',
    covers: ['patchEmbedding'],
    cases: [
      [1, 3, 4, 2, 5],
      [2, 3, 8, 4, 7],
      [3, 1, 6, 3, 2],
      [1, 1, 1, 1, 1],
      [2, 3, 32, 8, 33],
      [0, 3, 4, 2, 3],
    ].map(([m, c, s, p, d]) => ({
      inputs: [[m, c, s, s], [d, c, p, p], [d], [(s / p) ** 2 + 1, d]],
    })),
    depth: (c) => size(c.inputs[1].slice(1)),
    run: ([x, w, cls, pos]) => ops.patchEmbedding(x.detach(), w, cls, pos),
    ref: ([x, w, cls, pos], [[m, ch, s], [d, , p]]) => {
      const n = s / p
      const y = new Float64Array(m * (n * n + 1) * d)
      for (let i = 0; i < m; i++)
        for (let r = 0; r <= n * n; r++)
          for (let o = 0; o < d; o++) {
            let v = r === 0 ? cls[o] : 0
            if (r > 0)
              for (let c = 0; c < ch; c++)
                for (let a = 0; a < p; a++)
                  for (let b = 0; b < p; b++)
                    v +=
                      x[((i * ch + c) * s + Math.floor((r - 1) / n) * p + a) * s + ((r - 1) % n) * p + b] *
                      w[((o * ch + c) * p + a) * p + b]
            y[(i * (n * n + 1) + r) * d + o] = v + pos[r * d + o]
          }
      return y
    },
  },
]

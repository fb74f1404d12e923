/**
 * Runs every row of specs.ts on a device (the argument, default cpu at the CPU level of this process) and prints one JSON line
 * per row: {name, checks, failures}. Started by 12.ops.test.ts once per level and device.
 */
import { resolveDevice } from '../src/core/device.js'
import { native } from '../src/core/native.js'
import { mul, pack, sum } from '../src/core/ops.js'
import { backward, type Dtype, memory, noGrad, scope, type Tensor, tensor } from '../src/core/tensor.js'
import { type Case, type Spec, specs } from './specs/index.js'

const device = resolveDevice((process.argv[2] ?? 'cpu') as 'cpu' | 'cuda')
const dtypes: readonly Dtype[] = device === 'cpu' ? ['f32', 'bf16', 'f64'] : ['f32', 'bf16']

/** Deterministic values in [-range, range]. */
function values(n: number, seed: number, range: number): Float64Array {
  let s = (seed * 2654435761 + 12345) >>> 0
  return Float64Array.from({ length: n }, () => {
    s = (Math.imul(s, 1664525) + 1013904223) >>> 0
    return (s / 2147483648 - 1) * range
  })
}
const size = (s: number[]): number => s.reduce((n, d) => n * d, 1)
const inputsOf = (spec: Spec, c: Case): Float64Array[] =>
  c.inputs.map((s, i) => values(size(s), i + 7, spec.range ?? 1))
const make = (spec: Spec, c: Case, dtype: Dtype): Tensor[] =>
  inputsOf(spec, c).map((x, i) => tensor(x, c.inputs[i], dtype, device))

/**
 * Value and gradients of sum(out * w) with fixed w, as plain arrays.
 * @param frozen inputs behind the first want no gradient; 'packed': and its matrices are packed for both kinds of product
 */
function valueAndGrads(spec: Spec, c: Case, dtype: Dtype, frozen?: 'plain' | 'packed'): number[][] {
  return scope(() => {
    const x = make(spec, c, dtype).map((t, i) => (frozen && i ? t : t.requiresGrad()))
    if (frozen === 'packed')
      for (const t of x.slice(1)) if (t.shape.length === 2) for (const transB of [true, false]) pack(t, transB)
    const out = spec.run(x, c.o)
    const result = [Array.from(out.toFloats())]
    if (spec.gradient === false || size([...out.shape]) === 0 || (frozen && !native.wantsGrad(out.h))) return result
    backward(sum(mul(out, tensor(values(size([...out.shape]), 99, 1), out.shape, out.dtype, device))))
    for (const t of x) result.push(Array.from(t.grad()?.toFloats() ?? []))
    return result
  })
}

const same = (a: number[][], b: number[][]): boolean =>
  a.length === b.length && a.every((x, i) => x.length === b[i].length && x.every((v, j) => Object.is(v, b[i][j])))

function forward(spec: Spec, c: Case, dtype: Dtype, fail: (why: string) => void): void {
  scope(() =>
    noGrad(() => {
      // the reference sees the rounded inputs, so only the op's own arithmetic is judged
      const x = make(spec, c, dtype)
      const plain = x.map((t) => Float64Array.from(t.toFloats()))
      const got = spec.run(x, c.o).toFloats()
      const want = spec.ref(plain, c.inputs, c.o)
      if (got.length !== want.length)
        return fail(`${dtype} ${JSON.stringify(c.inputs)}: ${got.length} values: expected ${want.length}`)
      const top = want.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
      const depth = Math.sqrt(Math.max(1, spec.depth?.(c) ?? 1))
      const limit =
        dtype === 'f64'
          ? 1e-11 * Math.max(1, top) * depth
          : dtype === 'f32'
            ? Math.max(1.3e-6, 4e-7 * depth) * top + 1e-6
            : 1.6e-2 * top + 1e-5
      let worst = 0
      for (let i = 0; i < want.length; i++)
        worst = Math.max(worst, Number.isNaN(got[i]) ? Number.POSITIVE_INFINITY : Math.abs(got[i] - want[i]))
      if (worst > limit)
        fail(
          `${dtype} ${JSON.stringify(c.inputs)}: off by ${worst.toExponential(2)}, allowed ${limit.toExponential(2)}`,
        )
    }),
  )
}

/** Central differences in f64 (eps 1e-6, atol 1e-5, rtol 1e-3) on up to 40 elements of each input. */
function gradcheck(spec: Spec, c: Case, fail: (why: string) => void): void {
  const [, ...grads] = valueAndGrads(spec, c, 'f64')
  const inputs = inputsOf(spec, c)
  const probe = (xs: Float64Array[]): number =>
    scope(() =>
      noGrad(() => {
        const out = spec
          .run(
            xs.map((x, i) => tensor(x, c.inputs[i], 'f64')),
            c.o,
          )
          .toFloats()
        const w = values(out.length, 99, 1)
        return Array.from(out).reduce((s, v, i) => s + v * w[i], 0)
      }),
    )
  for (const [i, x] of inputs.entries()) {
    if (!grads[i]?.length) continue
    for (let j = 0; j < x.length; j += Math.max(1, Math.floor(x.length / 40))) {
      const at = x[j]
      x[j] = at + 1e-6
      const up = probe(inputs)
      x[j] = at - 1e-6
      const down = probe(inputs)
      x[j] = at
      const want = (up - down) / 2e-6
      const got = grads[i][j]
      if (!(Math.abs(got - want) <= 1e-5 + 1e-3 * Math.abs(want))) {
        fail(`gradient of input ${i}[${j}] ${JSON.stringify(c.inputs)}: got ${got}, differences give ${want}`)
        return
      }
    }
  }
}

for (const spec of specs) {
  const failures: string[] = []
  let checks = 0
  const before = [memory('cpu'), memory(device)]
  for (const c of spec.cases) {
    const fail = (why: string): void => void failures.push(why)
    try {
      for (const dtype of dtypes) {
        forward(spec, c, dtype, fail)
        native.setThreads(1)
        const one = valueAndGrads(spec, c, dtype)
        native.setThreads(2)
        const two = valueAndGrads(spec, c, dtype)
        if (!same(one, two)) fail(`${dtype} ${JSON.stringify(c.inputs)}: 1 and 2 threads differ`)
        if (!same(two, valueAndGrads(spec, c, dtype))) fail(`${dtype} ${JSON.stringify(c.inputs)}: two runs differ`)
        if (!same(valueAndGrads(spec, c, dtype, 'plain'), valueAndGrads(spec, c, dtype, 'packed')))
          fail(`${dtype} ${JSON.stringify(c.inputs)}: packed and plain inputs differ`)
        checks += 4
      }
      if (dtypes.includes('f64') && native.capabilities().level === 'portable' && spec.gradient !== false) {
        gradcheck(spec, c, fail)
        checks++
      }
    } catch (e) {
      fail(`${JSON.stringify(c.inputs)}: ${(e as Error).message}`)
    }
  }
  for (const [i, after] of [memory('cpu'), memory(device)].entries())
    if (after.inUse !== before[i].inUse || after.handles !== before[i].handles)
      failures.push(`leak: ${after.inUse - before[i].inUse} bytes, ${after.handles - before[i].handles} handles`)
  console.log(JSON.stringify({ name: spec.name, checks: checks + 1, failures: failures.slice(0, 5) }))
}

/**
 * What a case folder expects and how far a result may be from it: tensors at the tolerances of the case's own rules, lists exactly or
 * within its scalars. Called by goldens.ts; reads the case folder and computes nothing of the model.
 */
import path from 'node:path'
import { openSafetensors, readEntry } from '../../ts/src/formats/safetensors.js'

interface Recipe {
  lr: number
  total_steps: number
  warmup_ratio: number
  weight_decay: number
  clip_grad_norm: number | null
}
export interface PhaseExpected {
  batch_ids: string[]
  recipe: Recipe
  loss: number[]
  loss_after: number
  lr: number[]
  grad_norm_before_clipping: number[]
  lr_schedule: number[]
  samples: { id: string; text: string; input_ids: number[]; labels: number[] }[]
}
export interface Expected {
  phase1: PhaseExpected
  phase2: PhaseExpected
  infer: { id: string; text: string; input_ids: number[]; max_new_tokens: number; generated_ids: number[] }[]
  clip: { ids: string[]; cosine: number[]; clip_score: number[]; cosine_if_square_padded: number[]; levels: number[] }
  tokenizer_probes: { text: string; [key: string]: unknown }[]
}
interface Rule {
  group: string
  pattern: string
  rtol: number
  atol: number
  outlier_fraction?: number
  outlier_atol?: number
}
export interface Tolerances {
  tensors: Rule[]
  scalars: { loss_abs: number; grad_norm_rel: number; cosine_abs: number; lr_rel: number }
}

/** What a run gave, by name. */
export type Values = Float32Array | Int32Array | Uint8Array
export type Tensors = ReadonlyMap<string, { shape: number[]; data: Values }>

/** Largest error as a share of what is allowed; above 1 is a miss. */
export function excess(rule: Rule, got: ArrayLike<number>, want: ArrayLike<number>): number {
  if (got.length !== want.length) return Number.POSITIVE_INFINITY
  const errors = Float64Array.from({ length: want.length }, (_, i) => Math.abs(got[i] - want[i]))
  if (errors.some((e) => !Number.isFinite(e))) return Number.POSITIVE_INFINITY
  if (errors.length === 0) return 0
  errors.sort().reverse()
  let top = 0
  for (let i = 0; i < want.length; i++) top = Math.max(top, Math.abs(want[i]))
  const share = (e: number, limit: number): number => (limit > 0 ? e / limit : e === 0 ? 0 : Number.POSITIVE_INFINITY)
  const allowed = rule.atol + rule.rtol * top
  if (rule.outlier_atol === undefined) return share(errors[0], allowed)
  const skip = Math.max(2, Math.floor((rule.outlier_fraction ?? 0) * errors.length))
  return Math.max(share(errors[0], rule.outlier_atol), errors.length > skip ? share(errors[skip], allowed) : 0)
}

function readValues(file: string): Tensors {
  const out = new Map<string, { shape: number[]; data: Values }>()
  for (const [name, e] of openSafetensors(file).entries) {
    const b = readEntry(e)
    const bytes = b.buffer.slice(b.byteOffset, b.byteOffset + b.length)
    const data =
      e.dtype === 'F32' ? new Float32Array(bytes) : e.dtype === 'I32' ? new Int32Array(bytes) : new Uint8Array(bytes)
    out.set(name, { shape: e.shape, data })
  }
  return out
}

/** One comparison. */
export interface Row {
  name: string
  used: number
  note: string
}

/** Every tensor of expected.safetensors in `dir`. */
export function compareTensors(dir: string, found: Tensors, rules: Rule[]): Row[] {
  return [...readValues(path.join(dir, 'expected.safetensors'))].map(([name, want]): Row => {
    const got = found.get(name)
    if (!got) return { name, used: Number.POSITIVE_INFINITY, note: 'missing' }
    if (got.shape.join() !== want.shape.join())
      return { name, used: Number.POSITIVE_INFINITY, note: `shape [${got.shape}]: expected [${want.shape}]` }
    const rule = rules.find((r) => new RegExp(r.pattern).test(name)) as Rule
    return { name, used: excess(rule, got.data, want.data), note: '' }
  })
}

/** Samples, losses, rates, answers, scores and token ids. */
export function compareLists(want: Expected, got: Expected, t: Tolerances['scalars']): Row[] {
  const rows: Row[] = []
  const exact = (name: string, a: unknown, b: unknown): void => {
    const same = JSON.stringify(a) === JSON.stringify(b)
    rows.push({
      name,
      used: same ? 0 : Number.POSITIVE_INFINITY,
      note: same ? '' : `${JSON.stringify(a)} instead of ${JSON.stringify(b)}`.slice(0, 200),
    })
  }
  const close = (name: string, a: number[], b: number[], atol: number, rtol: number): void => {
    const bad = a.length !== b.length
    const used = bad
      ? Number.POSITIVE_INFINITY
      : Math.max(0, ...b.map((v, i) => (a[i] === v ? 0 : Math.abs(a[i] - v) / (atol + rtol * Math.abs(v)))))
    rows.push({
      name,
      used: Number.isNaN(used) ? Number.POSITIVE_INFINITY : used,
      note: bad ? `${a.length} values: expected ${b.length}` : '',
    })
  }
  for (const p of ['phase1', 'phase2'] as const) {
    exact(`${p}.samples`, got[p].samples, want[p].samples)
    close(`${p}.loss`, [...got[p].loss, got[p].loss_after], [...want[p].loss, want[p].loss_after], t.loss_abs, 0)
    close(`${p}.lr`, got[p].lr, want[p].lr, 0, t.lr_rel)
    close(`${p}.lr_schedule`, got[p].lr_schedule, want[p].lr_schedule, 0, t.lr_rel)
    close(`${p}.grad_norm`, got[p].grad_norm_before_clipping, want[p].grad_norm_before_clipping, 0, t.grad_norm_rel)
  }
  const infer = (list: Expected['infer']) =>
    list.map(({ id, text, input_ids, generated_ids }) => ({ id, text, input_ids, generated_ids }))
  exact('infer', infer(got.infer), infer(want.infer))
  exact('clip.levels', got.clip.levels, want.clip.levels)
  close('clip.cosine', got.clip.cosine, want.clip.cosine, t.cosine_abs, 0)
  close(
    'clip.cosine_if_square_padded',
    got.clip.cosine_if_square_padded,
    want.clip.cosine_if_square_padded,
    t.cosine_abs,
    0,
  )
  close('clip.clip_score', got.clip.clip_score, want.clip.clip_score, 100 * t.cosine_abs, 0)
  for (const [i, probe] of want.tokenizer_probes.entries())
    for (const key of Object.keys(got.tokenizer_probes[i] ?? { text: '' }))
      exact(`tokenizer_probes[${i}].${key}`, got.tokenizer_probes[i]?.[key], probe[key])
  return rows
}

/** Whole training steps and decoding against PyTorch's best variant. */

import { AlignGPT } from '../../ts/src/aligngpt.js'
import { Decoding } from '../../ts/src/inference/engine.js'
import { packBatch } from '../../ts/src/models/packed-batch.js'
import { IGNORE, type Sample } from '../../ts/src/processing/sample.js'
import { assertSame, type Digest, digest, integers, TOLERANCE } from './data.js'
import { UNEVEN } from './kernels.js'
import {
  type Comparison,
  type Context,
  compare,
  type Group,
  geomean,
  meanRow,
  milli,
  quiet,
  type Result,
} from './measure.js'
import { EVEN, RATE, STEP_SIZE, TrainStep, writeModel } from './model.js'
import type { PeerCase } from './peer.js'

type Float = 'f32' | 'bf16'

/** A way to run the step in PyTorch; the arguments of `Step` in peer_model.py. */
export interface Variant {
  dtype: 'f32' | 'autocast' | 'bf16'
  compiled: boolean
  logits: 'all' | 'text'
}
/** Logits on all rows are tried where they could be no slower than anywhere else: compiled, they only add work. */
export const VARIANTS: Record<Float, Variant[]> = {
  f32: [
    { dtype: 'f32', compiled: false, logits: 'all' },
    { dtype: 'f32', compiled: false, logits: 'text' },
    { dtype: 'f32', compiled: true, logits: 'text' },
  ],
  bf16: [
    { dtype: 'autocast', compiled: false, logits: 'text' },
    { dtype: 'bf16', compiled: false, logits: 'text' },
    { dtype: 'autocast', compiled: true, logits: 'text' },
    { dtype: 'bf16', compiled: true, logits: 'text' },
  ],
}
export const nameOf = (v: Variant): string =>
  `${v.dtype} ${v.compiled ? 'compiled' : 'eager'}, logits on ${v.logits} rows`

/** Losses must agree: the first one up to rounding, those after it up to what rounding does to the updates. */
const LOSS_TOLERANCE = { f32: { first: 1e-4, later: 1e-2 }, bf16: { first: 1e-2, later: 1e-1 } } as const
const COMPARED_STEPS = 4

function assertLosses(what: string, ours: readonly number[], peer: readonly number[], dtype: Float): void {
  const { first, later } = LOSS_TOLERANCE[dtype]
  for (let i = 0; i < COMPARED_STEPS; i++) {
    const off = Math.abs(ours[i] - peer[i]) / Math.abs(peer[i])
    if (!(off <= (i ? later : first)))
      throw new Error(`${what}: loss of step ${i} differs from PyTorch: ${ours[i]} against ${peer[i]}`)
  }
}

/** The quickest of the variants after warm-up, still loaded. */
async function quickest(
  c: Context,
  what: string,
  variants: readonly Variant[],
  args: object,
): Promise<{ variant: Variant; peer: PeerCase }> {
  let best: { variant: Variant; peer: PeerCase; seconds: number } | undefined
  let reason = ''
  for (const variant of variants) {
    const peer = await c.peer.make('step', { ...args, ...variant })
    try {
      await peer.time(2)
      await quiet(c)
      const seconds = await peer.time(1)
      c.log(`${what}: PyTorch ${nameOf(variant)}: ${milli(seconds)}`)
      if (best && best.seconds <= seconds) {
        await peer.drop()
        continue
      }
      await best?.peer.drop()
      best = { variant, peer, seconds }
    } catch (e) {
      reason = (e as Error).message // a variant this PyTorch cannot run is not its best
      c.log(`${what}: PyTorch ${nameOf(variant)}: ${reason}`)
      await peer.drop()
    }
  }
  if (!best) throw new Error(`${what}: no variant runs: ${reason}`)
  return best
}

async function step(c: Context, name: string, phase: 1 | 2, dtype: Float, lengths: readonly number[]): Promise<Result> {
  const folder = await writeModel(c.temp)
  // nobody who looks for the quickest way computes logits on the padding too
  const variants = VARIANTS[dtype].filter((v) => lengths !== UNEVEN || v.logits === 'text')
  const { variant, peer } = await quickest(c, name, variants, { folder, phase, lengths, lr: RATE })
  const ours = await TrainStep.load(folder, phase, dtype, lengths)
  try {
    const found = await compare(c, name, () => ours.run(), peer, { sample: 0, warmup: 2, warmPeer: true })
    const { losses } = await peer.values<{ losses: number[] }>()
    assertLosses(name, ours.losses, losses, dtype)
    const rows = ours.batch.tokens.length
    const speed = `${(rows / found.ours).toFixed(0)} against ${(rows / found.peer).toFixed(0)} rows/s`
    return meanRow(name, [found], `PyTorch: ${nameOf(variant)}; ${speed}; first loss ${ours.losses[0].toFixed(5)}`)
  } finally {
    ours.dispose()
    await peer.drop()
  }
}

const stepGroup = (name: string, target: number, phase: 1 | 2, dtype: Float, lengths: readonly number[]): Group => ({
  rows: { [name]: target },
  run: async (c) => [await step(c, name, phase, dtype, lengths)],
})

// ---- decoding ---------------------------------------------------------------------------------------------
/** Rows of the prompt, the first being BOS: few, so that the time is that of the new tokens. */
const PROMPT = 8
const NEW_TOKENS = 128

/** Greedy continuation of the prompt, what `generate` runs on; `look` sees the state before the first token. */
function continuation(model: AlignGPT): (look?: (d: Decoding) => void) => number[] {
  const ids = Int32Array.from([1, ...integers(PROMPT - 1, 31, 3, STEP_SIZE.vocab)])
  const sample: Sample = {
    id: 'prompt',
    text: '',
    ids,
    labels: new Int32Array(PROMPT).fill(IGNORE),
    gateIds: ids.subarray(1),
    gateAnswer: new Uint8Array(PROMPT - 1),
    image: null,
    level: null,
    length: PROMPT,
    fullLength: PROMPT,
    skip: null,
  }
  const batch = packBatch([sample], model.patches, { size: model.imageSize })
  return (look) => {
    const decoding = new Decoding(model, batch, { mode: 'gate' }, NEW_TOKENS)
    look?.(decoding)
    const found: number[] = []
    while (found.length < NEW_TOKENS) {
      if (found.length) decoding.push([found.at(-1) as number])
      found.push(decoding.sample({}, [0])[0])
    }
    decoding.dispose()
    return found
  }
}

/**
 * The scores after the prompt agree, and in f32 all tokens do. With random weights many scores lie within one rounding of
 * bf16, so that there the tokens say nothing.
 */
async function assertDecoding(run: ReturnType<typeof continuation>, peer: PeerCase, dtype: Float): Promise<void> {
  await peer.time(1)
  const theirs = await peer.values<{ ids: number[]; logits: Digest }>()
  const logits: Digest[] = []
  const ids = run((d) => logits.push(digest(d.logits)))
  assertSame(`decode ${dtype}`, { logits: logits[0] }, { logits: theirs.logits }, TOLERANCE[dtype])
  const wrong = ids.findIndex((id, i) => id !== theirs.ids[i])
  if (dtype === 'f32' && wrong >= 0)
    throw new Error(`decode f32: token ${wrong} differs from PyTorch: ${ids[wrong]} against ${theirs.ids[wrong]}`)
}

const decode: Group = {
  rows: { decode: 3 },
  async run(c) {
    const folder = await writeModel(c.temp)
    const found: Comparison[] = []
    for (const dtype of ['f32', 'bf16'] as const) {
      const model = await AlignGPT.load(folder, { dtype })
      const peer = await c.peer.make('decode', { folder, dtype, prompt: PROMPT, tokens: NEW_TOKENS })
      try {
        const run = continuation(model)
        await assertDecoding(run, peer, dtype)
        found.push(await compare(c, `decode ${dtype}`, () => void run(), peer, { sample: 0, warmup: 1 }))
      } finally {
        model.dispose()
        await peer.drop()
      }
    }
    const [ours, peer] = (['ours', 'peer'] as const).map((side) => geomean(found.map((f) => NEW_TOKENS / f[side])))
    const note = `batch 1, ${NEW_TOKENS} tokens after ${PROMPT}, f32 and bf16; PyTorch: transformers generate, static cache`
    return [{ ...meanRow('decode', found, note), ours, peer, unit: 'tokens/s' }]
  },
}

export const stepGroups: Group[] = [
  stepGroup('step.f32.phase1', 1.2, 1, 'f32', EVEN),
  stepGroup('step.f32.phase2', 1.2, 2, 'f32', EVEN),
  stepGroup('step.bf16.phase1', 1.5, 1, 'bf16', EVEN),
  stepGroup('step.bf16.phase2', 1.5, 2, 'bf16', EVEN),
  stepGroup('step.uneven.f32', 1.6, 2, 'f32', UNEVEN),
  stepGroup('step.uneven.bf16', 2, 2, 'bf16', UNEVEN),
  decode,
]

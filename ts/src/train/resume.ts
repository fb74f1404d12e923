/** When a run saves, and how one goes on from what another saved. */

import fs from 'node:fs'
import path from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { type Device, native, nativeFile } from '../core/native.js'
import type { Tensor } from '../core/tensor.js'
import type { AdamW, StateTensor } from '../nn/adamw.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { digestFile } from '../util/files.js'
import { version } from '../util/package.js'
import { findCheckpoint, type Maker, type Manifest } from './checkpoint.js'
import { intervalOf } from './run-settings.js'

/** Steps, or milliseconds. @throws AlignGPTError ERR_ARGUMENT */
export function parseInterval(value: number | string): { steps: number } | { ms: number } {
  const found = intervalOf(value)
  if (found) return found
  throw mismatch('ERR_ARGUMENT', 'train', 'saveEvery', "a number of steps or a time such as '10m'", show(value))
}

/** When to save. */
export class Schedule {
  readonly #saveEvery: number | string | null
  readonly #steps: number
  readonly #refuse: boolean
  readonly #every: ReturnType<typeof parseInterval> | null
  #from = performance.now()

  /**
   * @param saveEvery null: never
   * @param steps of the whole run
   * @param refuse an interval that the run ends before
   * @throws AlignGPTError ERR_ARGUMENT
   */
  constructor(saveEvery: number | string | null, steps: number, refuse: boolean) {
    this.#saveEvery = saveEvery
    this.#steps = steps
    this.#refuse = refuse
    this.#every = saveEvery === null ? null : parseInterval(saveEvery)
    if (this.#every && 'steps' in this.#every && this.#every.steps > steps) this.#tooLong(`one of ${steps} steps`)
  }

  /** The time of one step, as soon as it is known. @throws AlignGPTError ERR_ARGUMENT */
  measured(seconds: number): void {
    if (!this.#every || !('ms' in this.#every)) return
    const whole = seconds * this.#steps
    if (whole * 1000 < this.#every.ms) this.#tooLong(`one of about ${whole.toFixed(0)} s`)
  }

  #tooLong(run: string): void {
    if (!this.#refuse) return
    const got = `${this.#saveEvery}: nothing would be saved before the end (allowLongInterval: true if that is meant)`
    throw mismatch('ERR_ARGUMENT', 'train', 'saveEvery', `an interval within the run, ${run}`, got)
  }

  /** @param done steps so far */
  due(done: number): boolean {
    if (!this.#every) return false
    if ('steps' in this.#every) return done % this.#every.steps === 0
    if (performance.now() - this.#from < this.#every.ms) return false
    this.#from = performance.now()
    return true
  }
}

let build: string | undefined

/** What computes on a device now. */
export function maker(device: Device): Maker {
  build ??= digestFile(nativeFile).sha256
  const cuda = device === 'cuda' ? native.probeCuda() : null
  const { name, level } = cuda && typeof cuda !== 'string' ? cuda : native.capabilities()
  return { version: version(), build, level: `${name} ${level}` }
}

/** The tensors of a checkpoint: weights, and what the optimizer needs besides. */
export const checkpointTensors = (
  weights: readonly { name: string; tensor: Tensor }[],
  optimizer: AdamW,
): StateTensor[] => [
  ...weights.map(({ name, tensor }): StateTensor => ({ file: 'weights', name, tensor })),
  ...optimizer.state(),
]

/** Where the checkpoints of a run are. */
export const checkpointFolder = (out: string): string => path.join(out, 'checkpoints')

/** The gradient of a step is the same within rounding whatever its micro-batches are, unless they weigh the loss. */
const free = (config: Record<string, unknown>, key: string): boolean =>
  key === 'microBatch' && config.lossNorm === 'batch'

function checkConfig(m: Manifest, now: Record<string, unknown>, where: string, tell: (text: string) => void): void {
  const plain = JSON.parse(JSON.stringify(now)) as Record<string, unknown>
  const keys = [...new Set([...Object.keys(m.config), ...Object.keys(plain)])]
  const changed = keys.filter((k) => !isDeepStrictEqual(m.config[k], plain[k]))
  for (const k of changed.filter((k) => free(plain, k)))
    tell(`${k} ${show(m.config[k])} -> ${show(plain[k])}: the numbers agree within rounding, not bit for bit`)
  const different = changed.filter((k) => !free(plain, k))
  if (different.length === 0) return
  const said = (c: Record<string, unknown>): string => different.map((k) => `${k} ${show(c[k])}`).join(', ')
  throw mismatch('ERR_CHECKPOINT', 'train', `${where}: settings of the run to continue`, said(m.config), said(plain))
}

function checkMaker(m: Maker, now: Maker, tell: (text: string) => void): void {
  const different = (['version', 'level', 'build'] as const).filter((k) => m[k] !== now[k])
  const say = (k: keyof Maker): string => `${k} ${m[k].slice(0, 16)} -> ${now[k].slice(0, 16)}`
  if (different.length)
    tell(
      `the checkpoint was made elsewhere (${different.map(say).join(', ')}): the numbers may not be those of one run`,
    )
}

export interface ResumeOptions {
  out?: string
  /** true: of `out`, if there is one */
  resume?: boolean | string
}

/**
 * The checkpoint a run goes on from, or null for a fresh one. Damaged ones in the run's own folder are moved aside.
 * @throws AlignGPTError ERR_CHECKPOINT: none, only damaged ones, of a run with other settings; ERR_ARGUMENT: a fresh run would
 *   mix its checkpoints with those of another
 */
export function findResume(
  o: ResumeOptions,
  { config, maker: now }: Pick<Manifest, 'config' | 'maker'>,
  tell: (text: string) => void,
): { folder: string; manifest: Manifest } | null {
  if (!o.resume) {
    const own = o.out && checkpointFolder(o.out)
    if (own && fs.existsSync(own) && fs.readdirSync(own).some((n) => n.startsWith('step-') && !n.endsWith('.tmp')))
      throw mismatch(
        'ERR_ARGUMENT',
        'train',
        `out ${o.out}`,
        'a folder without checkpoints, or resume',
        'those of a run',
      )
    return null
  }
  const from = o.resume === true ? o.out : o.resume
  if (!from) throw new AlignGPTError('ERR_ARGUMENT', '[train] resume: true: expected out, got none')
  const damaged: string[] = []
  const found = findCheckpoint(checkpointFolder(from), (text, checkpoint) => {
    tell(text)
    damaged.push(checkpoint)
  })
  if (!found) {
    if (o.resume !== true) throw mismatch('ERR_CHECKPOINT', 'train', 'resume', `checkpoints in ${from}`, 'none')
    tell(`${from} has no checkpoint yet: starting from the beginning`)
    return null
  }
  checkConfig(found.manifest, config, found.folder, tell)
  checkMaker(found.manifest.maker, now, tell)
  if (o.out && path.resolve(from) === path.resolve(o.out))
    for (const checkpoint of damaged) {
      fs.rmSync(`${checkpoint}.damaged`, { recursive: true, force: true })
      fs.renameSync(checkpoint, `${checkpoint}.damaged`)
    }
  tell(`continuing from ${found.folder}`)
  return found
}

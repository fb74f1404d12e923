/** How likely a model finds answers: the one loss per sample that everything here is made of, and its mean over a data set. */
import { setImmediate as turn } from 'node:timers/promises'
import { noGrad, scope } from '../core/tensor.js'
import type { Dataset } from '../data/dataset.js'
import { loadPixels, packWithPixels } from '../inference/request.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { PackedBatch } from '../models/packed-batch.js'
import type { Style } from '../processing/conversation/styles.js'
import { readPicture } from '../processing/image/source.js'
import { buildSample, type Sample } from '../processing/sample.js'

/** What the model makes of one sample. */
export interface SampleLoss {
  /** sum of the negative log-likelihoods of its labelled tokens */
  nll: number
  /** labelled ones */
  tokens: number
  /** [N] weights of its alignment vectors, [] without a picture */
  coefficients: number[]
}

/** Each sample of a batch by itself, without gradients: the loss before it is averaged. */
export function sampleLosses(model: AlignGPTNetwork, b: PackedBatch, mix: Mix): SampleLoss[] {
  const { nll, coefficients } = scope(() =>
    noGrad(() => {
      const { nll, embedded } = model.loss(b, mix)
      return { nll: nll.toFloats(), coefficients: Array.from(embedded.coefficients.toFloats()) }
    }),
  )
  const samples = b.ids.map((): SampleLoss => ({ nll: 0, tokens: 0, coefficients: [] }))
  let s = 0
  for (const [i, row] of b.lossRows.entries()) {
    while (row >= b.offsets[s + 1]) s++
    samples[s].nll += nll[i]
    samples[s].tokens++
  }
  for (const [m, sample] of b.imageSamples.entries())
    samples[sample].coefficients = coefficients.slice(m * model.levels, (m + 1) * model.levels)
  return samples
}

/** What was not looked at, and why. */
export interface LeftOut {
  id: string
  reason: string
}

/** What is too long for the model, treated as training does. */
export interface TooLong {
  /** ids of those whose end was cut */
  cut: string[]
  /** of which nothing usable fits */
  leftOut: LeftOut[]
}

/** Sorts out what is too long. @returns the samples that can be used */
function usable(samples: readonly Sample[], { cut, leftOut }: TooLong): Sample[] {
  for (const { id, skip, length, fullLength } of samples) {
    if (skip) leftOut.push({ id, reason: skip })
    else if (length < fullLength) cut.push(id)
  }
  return samples.filter((s) => !s.skip)
}

export interface LossOptions {
  /** records that go through the model at once, default 16 */
  batch?: number
  /** default the model's own (`conversation`) */
  style?: Style
  /** default the model's way */
  mix?: Mix
  /** asked between batches; true ends it with the loss of the records so far */
  stop?: () => boolean
}

/** Mean loss over labelled tokens. */
export interface DatasetLoss extends TooLong {
  /** NaN without any token */
  loss: number
  tokens: number
  /** records that it is made of */
  records: number
}

/**
 * Mean next-token loss over the labelled tokens of a dataset, in the format of instruction tuning. Records that are too long are
 * treated as in training: their end is cut at `tokenizer_model_max_length`, and those whose picture or answers do not fit are left out.
 */
export async function evaluateLoss(
  model: AlignGPTNetwork,
  data: Pick<Dataset, 'length' | 'record' | 'picture'>,
  o: LossOptions = {},
): Promise<DatasetLoss> {
  const found: DatasetLoss = { loss: Number.NaN, tokens: 0, records: 0, cut: [], leftOut: [] }
  const { batch: size = 16, style = model.conversation, mix = model.mix } = o
  const options = { style, patches: model.patches, maxLength: model.config.tokenizer_model_max_length }
  const load = (name: string | null): Promise<Float32Array | null> =>
    name === null ? Promise.resolve(null) : loadPixels(model, readPicture(data.picture(name)))
  let sum = 0
  for (let at = 0; at < data.length && !o.stop?.(); at += size) {
    const records = Array.from({ length: Math.min(size, data.length - at) }, (_, i) => data.record(at + i))
    const samples = usable(
      records.map((r) => buildSample(r, model.tokenizer, options)),
      found,
    )
    if (samples.length) {
      const pixels = await Promise.all(samples.map((s) => load(s.image)))
      const packed = packWithPixels(model, samples, pixels, mix, model.config.mm_gate_text)
      for (const { nll, tokens } of sampleLosses(model, packed, mix)) {
        sum += nll
        found.tokens += tokens
      }
    }
    found.records += samples.length
    await turn()
  }
  return { ...found, loss: found.tokens ? sum / found.tokens : Number.NaN }
}

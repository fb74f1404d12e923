/** How likely a model finds answers: the one loss per sample that everything here is made of, and its mean over a data set. */
import { setImmediate as turn } from 'node:timers/promises'
import { noGrad, scope } from '../core/tensor.js'
import type { Dataset } from '../data/dataset.js'
import { type RecordNeeds, sayBad, unmet } from '../data/record-check.js'
import type { DataRecord } from '../formats/record-file.js'
import { loadPixels, packWithPixels } from '../inference/request.js'
import type { Mix } from '../models/align.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import type { PackedBatch } from '../models/packed-batch.js'
import type { Style } from '../processing/conversation/styles.js'
import { readImage } from '../processing/image/source.js'
import { buildSample, type Sample } from '../processing/sample.js'
import { AlignGPTError } from '../util/errors.js'

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

/** What is too long for the model, treated as training does; and what could not be used at all. */
export interface TooLong {
  /** ids of those whose end was cut */
  cut: string[]
  /** bad records, those of which nothing usable fits, and those whose picture cannot be read */
  leftOut: LeftOut[]
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

/** A sample with the pixels of its picture. */
interface Looked {
  sample: Sample
  pixels: Float32Array | null
}

/** The sample of a record with its picture, or why it is left out. */
async function look(
  model: AlignGPTNetwork,
  data: Pick<Dataset, 'picture'>,
  record: DataRecord,
  needs: RecordNeeds,
): Promise<Looked | LeftOut> {
  const { id, image } = record
  const fault = unmet(record, needs)
  if (fault) return { id, reason: fault.reason }
  const { patches, tokenizer, config } = model
  const options = { style: needs.style, patches, maxLength: config.tokenizer_model_max_length }
  const sample = buildSample(record, tokenizer, options)
  if (sample.skip) return { id, reason: sample.skip }
  try {
    const pixels = image === null ? null : await loadPixels(model, readImage(data.picture(image)))
    return { sample, pixels }
  } catch (e) {
    if (!(e instanceof AlignGPTError) || e.code !== 'ERR_IMAGE') throw e
    return { id, reason: e.message }
  }
}

/**
 * Mean next-token loss over the labelled tokens of a dataset, in the format of instruction tuning. Records that are too long are
 * treated as in training: their end is cut at `tokenizer_model_max_length`, and those whose picture or answers do not fit are left out.
 * So are bad records and pictures that cannot be read: `leftOut` says which and why.
 */
export async function evaluateLoss(
  model: AlignGPTNetwork,
  data: Pick<Dataset, 'length' | 'record' | 'picture'> & Partial<Pick<Dataset, 'bad'>>,
  o: LossOptions = {},
): Promise<DatasetLoss> {
  const leftOut = (data.bad ?? []).map((b) => ({ id: b.id ?? `${b.index}`, reason: sayBad(b) }))
  const found: DatasetLoss = { loss: Number.NaN, tokens: 0, records: 0, cut: [], leftOut }
  const { batch: size = 16, style = model.conversation, mix = model.mix } = o
  const levelled = mix.mode === 'level' && mix.level === undefined
  const needs = { style, levelled, levels: model.levels }
  let sum = 0
  for (let at = 0; at < data.length && !o.stop?.(); at += size) {
    const records = Array.from({ length: Math.min(size, data.length - at) }, (_, i) => data.record(at + i))
    const looked: Looked[] = []
    for (const one of await Promise.all(records.map((r) => look(model, data, r, needs)))) {
      if ('reason' in one) leftOut.push(one)
      else looked.push(one)
    }
    const samples = looked.map((l) => l.sample)
    found.cut.push(...samples.filter((s) => s.length < s.fullLength).map((s) => s.id))
    if (looked.length) {
      const pixels = looked.map((l) => l.pixels)
      const packed = packWithPixels(model, samples, pixels, mix, model.config.mm_gate_text)
      for (const { nll, tokens } of sampleLosses(model, packed, mix)) {
        sum += nll
        found.tokens += tokens
      }
    }
    found.records += looked.length
    await turn()
  }
  return { ...found, loss: found.tokens ? sum / found.tokens : Number.NaN }
}

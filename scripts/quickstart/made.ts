/**
 * The four towers of the quickstart: a CLIP, two CLIPs that judge each other's half of the pairs, a LLaMA. The
 * repository ships them; here is how each is made again, and whether what was made is what is shipped. main.ts and
 * check.ts call it.
 */
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { loadDataset } from 'aligngpt'
import { cpuInfo, resolveDevice } from 'aligngpt/core'
import { readPreprocessor, saveTokenizer, trainBpe, trainClipBpe } from 'aligngpt/models'
import { type QuickstartData, readHalves, readText, tokenizerTexts } from './data.js'
import { imageName, TRAINING_STYLES } from './emoji.js'
import {
  type Budget,
  type ClipPair,
  type ClipSize,
  type Curve,
  clipCaptions,
  TrainingImages,
  trainClip,
  trainLlama,
  writeClipConfig,
  writeLlamaConfig,
} from './towers.js'

export const TOWERS = ['clip-half-0', 'clip-half-1', 'clip', 'llm'] as const
export type Tower = (typeof TOWERS)[number]

export interface TowerSteps {
  clip: number
  half: number
  llama: number
  /** pairs of a CLIP's step */
  batch: number
  /** augmented versions of each image */
  versions: number
}
export const FULL: TowerSteps = { clip: 2000, half: 400, llama: 3000, batch: 128, versions: 16 }
/** Shows the way: these towers know nothing. */
export const FAST: TowerSteps = { clip: 60, half: 40, llama: 60, batch: 64, versions: 2 }

// The scoring CLIPs are smaller: each learns half of the pairs, and all four towers together are less than 8 MB.
const SIZES: Record<'clip' | 'half', Omit<ClipSize, 'vocab'>> = {
  clip: { layers: 4, textLayers: 2 },
  half: { layers: 2, textLayers: 1 },
}
const VOCABULARY = { clip: 2048, half: 1024, llm: 2048 }

/** The shipped towers, each in a folder of its own. */
export const SHIPPED = fileURLToPath(new URL('towers/', import.meta.url))

/** What is known of how towers were made. */
export interface Making {
  date: string
  /** CPU code path: towers made on another one differ in rounding */
  isa: string
  device: string
  steps: TowerSteps
  /** SHA-256 of each file below the folder of the towers */
  files: Record<string, string>
}

const digest = (file: string): string => createHash('sha256').update(fs.readFileSync(file)).digest('hex')
/** Files of the towers below a folder. */
function filesOf(folder: string, towers: readonly Tower[] = TOWERS): Record<string, string> {
  const there = towers.filter((t) => fs.existsSync(path.join(folder, t)))
  const names = there.flatMap((t) => fs.readdirSync(path.join(folder, t)).map((f) => `${t}/${f}`))
  return Object.fromEntries(names.sort().map((f) => [f, digest(path.join(folder, f))]))
}

/** How the shipped towers were made. */
export const shippedMaking = (): Making => JSON.parse(fs.readFileSync(path.join(SHIPPED, 'made.json'), 'utf8'))

/** Puts the shipped towers into `folder`. */
export function takeShipped(folder: string): void {
  for (const t of TOWERS) fs.cpSync(path.join(SHIPPED, t), path.join(folder, t), { recursive: true })
}

/** Writes down how the towers in `folder` were made, so that they can be shipped. */
export function ship(folder: string, steps: TowerSteps): void {
  for (const t of TOWERS) fs.cpSync(path.join(folder, t), path.join(SHIPPED, t), { recursive: true })
  const made: Making = {
    date: new Date().toISOString().slice(0, 10),
    isa: cpuInfo().isa,
    device: resolveDevice(),
    steps,
    files: filesOf(folder),
  }
  fs.writeFileSync(path.join(SHIPPED, 'made.json'), `${JSON.stringify(made, null, 2)}\n`)
}

/** Files of the towers in `folder` that are not, byte for byte, those that are shipped. */
export function different(folder: string, towers: readonly Tower[] = TOWERS): string[] {
  const [here, there] = [filesOf(folder, towers), filesOf(SHIPPED, towers)]
  return [...new Set([...Object.keys(here), ...Object.keys(there)])].filter((f) => here[f] !== there[f])
}

/** Makes towers in `folder`, one by one. */
export class TowerMaker {
  readonly #data: QuickstartData
  readonly #folder: string
  readonly steps: TowerSteps
  readonly #meter: (steps: number) => Budget
  #images: TrainingImages | null = null

  constructor(data: QuickstartData, folder: string, steps: TowerSteps, meter: (steps: number) => Budget) {
    this.#data = data
    this.#folder = folder
    this.steps = steps
    this.#meter = meter
  }

  #at(tower: Tower): string {
    const folder = path.join(this.#folder, tower)
    fs.mkdirSync(folder, { recursive: true })
    return folder
  }

  /** Tokenizer and settings of a CLIP, and the images that all of them train on. */
  async #clip(tower: Tower, size: 'clip' | 'half'): Promise<{ folder: string; images: TrainingImages }> {
    const folder = this.#at(tower)
    const tokenizer = trainClipBpe(tokenizerTexts(this.#data).clip, { vocabSize: VOCABULARY[size] })
    saveTokenizer(tokenizer, folder)
    writeClipConfig(folder, { ...SIZES[size], vocab: tokenizer.vocabSize })
    const names = this.#data.emoji.flatMap((e) => TRAINING_STYLES.map((style) => imageName(style, e)))
    this.#images ??= await TrainingImages.load(
      this.#data.images,
      names,
      this.steps.versions,
      readPreprocessor(folder),
      5,
    )
    return { folder, images: this.#images }
  }

  /** A CLIP that knows one half of the pairs. */
  async half(half: 0 | 1): Promise<Curve> {
    const { folder, images } = await this.#clip(`clip-half-${half}`, 'half')
    const data = await loadDataset(this.#data.pairs, { images: this.#data.images })
    const halves = readHalves(this.#data)
    const seen: ClipPair[] = [...data]
      .filter((r) => halves[r.id] === half)
      .map((r) => ({ image: r.image as string, captions: [r.conversations[1].value] }))
    data.close()
    const { half: steps, batch } = this.steps
    return trainClip(folder, images, seen, { ...this.#meter(steps), batch, lr: 1e-3, seed: 11 + half })
  }

  /** The CLIP whose vision tower the model gets. */
  async clip(): Promise<Curve> {
    const { folder, images } = await this.#clip('clip', 'clip')
    const pairs = this.#data.emoji.flatMap((e) =>
      TRAINING_STYLES.map((style) => ({
        image: imageName(style, e),
        captions: clipCaptions(e),
        category: e.category,
      })),
    )
    const { clip: steps, batch } = this.steps
    return trainClip(folder, images, pairs, { ...this.#meter(steps), batch, lr: 1.5e-3, seed: 7 })
  }

  async llm(): Promise<Curve> {
    const folder = this.#at('llm')
    const tokenizer = trainBpe(tokenizerTexts(this.#data).llm, { vocabSize: VOCABULARY.llm })
    saveTokenizer(tokenizer, folder)
    writeLlamaConfig(folder, tokenizer.vocabSize)
    const conversations = await loadDataset(this.#data.conversations)
    const budget = { ...this.#meter(this.steps.llama), batch: 32, lr: 2e-3, seed: 3 }
    const curve = await trainLlama(folder, readText(this.#data), [...conversations], budget)
    conversations.close()
    return curve
  }

  /** Trains one tower. @returns its loss, step by step */
  make(tower: Tower): Promise<Curve> {
    if (tower === 'clip') return this.clip()
    return tower === 'llm' ? this.llm() : this.half(tower === 'clip-half-0' ? 0 : 1)
  }
}

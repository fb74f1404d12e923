/** AlignGPT models from files: new ones of a language model and a vision tower, and folders in the official layout. */

import { resolveDevice } from '../core/device.js'
import type { Device } from '../core/native.js'
import type { Dtype } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { loadConfig } from '../formats/zod-check.js'
import type { ParameterSource } from '../nn/module.js'
import type { ChatStyle } from '../processing/conversation/styles.js'
import { type PreprocessorConfig, readPreprocessor } from '../processing/preprocessor-config.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError, mismatch, show } from '../util/errors.js'
import { AlignGPTNetwork, type Parts, partOf, type Sources } from './aligngpt.js'
import { CLIPModel } from './clip.js'
import { type AlignGPTConfig, visionTowerFolder } from './config/aligngpt.js'
import { type ClipConfig, readClipConfig } from './config/clip.js'
import { readGenerationConfig } from './config/generation.js'
import { MODEL_DEFAULTS } from './config/variants.js'
import type { LanguageModel } from './language-model.js'
import { TABLE, VISION } from './names.js'
import { checkpointSource, initSource, type Placement, pretrainedSource } from './parameter-sources.js'
import { familyInAlignGPT, languageFamily, readVisionConfig, visionFamily } from './registry.js'
import { type ModelOptions, type NewModelOptions, newSettings, storedConfig } from './settings.js'
import { refuseUnread, TEXT_TOWER } from './unread.js'

export interface LoadOptions {
  /** default auto: ALIGNGPT_DEVICE where it is set, else the GPU where there is one, else the CPU */
  device?: 'auto' | Device
  /** of the weights and activations; default f32 */
  dtype?: Dtype
  /** of new parts */
  seed?: number
}
export interface CreateOptions extends NewModelOptions {
  /** folder of a LLaMA in Hugging Face layout */
  llm: string
  /** folder of a CLIP in Hugging Face layout */
  clip: string
  /** file with the projector and the alignment table of an earlier pre-training (mm_projector_align.bin or .safetensors) */
  pretrained?: string
}

/** What the constructor of AlignGPTNetwork takes. */
export type Opened = [Sources, Parts, Required<Placement>]

function checkOptions(o: LoadOptions): Required<Placement> & { seed: number } {
  const dtype = o.dtype ?? 'f32'
  if (dtype !== 'f32' && dtype !== 'bf16' && dtype !== 'f64')
    throw new AlignGPTError('ERR_DTYPE', `[AlignGPT] dtype: expected f32, bf16 or f64, got ${dtype}`)
  return { dtype, device: resolveDevice(o.device, dtype), seed: o.seed ?? 0 }
}

/** The folder of the scoring model that a vision tower is part of, and how the tower wants its images. */
const processorOf = (clip: ClipConfig, clipDir: string): Pick<Parts, 'preprocessor' | 'clipDir'> => ({
  preprocessor: visionFamily(clip.raw, clipDir).processor(clipDir, clip),
  clipDir,
})

/** Names in an AlignGPT checkpoint -> in the vision tower's own, and back. */
const toClip = (name: string): string => name.replace(VISION, 'vision_model.')
const fromClip = (name: string): string => name.replace(/^vision_model\./, VISION)

/** The vision tower's parameters from a CLIP folder. @throws ERR_WEIGHTS naming a tensor of it that is none of them */
function towerSource(dir: string, known: ReadonlyMap<string, unknown>, place: Placement): ParameterSource {
  const entries = openCheckpoint(dir)
  refuseUnread(entries, (name) => known.has(fromClip(name)), TEXT_TOWER)
  return checkpointSource(entries, dir, place, toClip)
}

/** A folder's tokenizer. @throws ERR_CONFIG when it has ids that the embeddings have no row for */
export function loadTokenizer(dir: string, rows: number): Tokenizer {
  const tokenizer = Tokenizer.load(dir)
  if (tokenizer.vocabSize > rows)
    throw mismatch(
      'ERR_CONFIG',
      'tokenizer',
      `${dir}: tokens`,
      `at most ${rows}, the rows of the embeddings (vocab_size)`,
      `${tokenizer.vocabSize}, the last of them ${show(tokenizer.idToToken(tokenizer.vocabSize - 1))}`,
    )
  return tokenizer
}

/** The style of a model that says nothing of it. */
const conversationOf = ({ llm }: AlignGPTConfig, tokenizer: Tokenizer): ChatStyle =>
  familyInAlignGPT(llm.raw, 'config.json').conversation(tokenizer)

/** A new AlignGPT; projector, alignment vectors and gate come from the seed or from an earlier pre-training. */
export function openParts(o: CreateOptions, load: LoadOptions = {}): Opened {
  const { seed, ...place } = checkOptions(load)
  const settings = newSettings(o)
  const { config, clip } = settings
  const tokenizer = loadTokenizer(o.llm, config.llm.vocab_size)
  const conversation = config.conversation ?? conversationOf(config, tokenizer)
  const generation = readGenerationConfig(o.llm)
  const shared = { ...settings, ...processorOf(clip, o.clip) }
  const parts: Parts = { ...shared, tokenizer, conversation, generation, llmDir: o.llm }
  const fresh = o.pretrained ? pretrainedSource(o.pretrained, seed, place) : initSource(seed, place)
  const words = openCheckpoint(o.llm)
  const known = AlignGPTNetwork.parameters(settings, (name) => words.has(name))
  refuseUnread(words, (name) => known.has(name) && partOf(name) === 'language')
  const vision = towerSource(o.clip, known, place)
  const language = checkpointSource(words, o.llm, place)
  return [{ language, vision, projector: fresh, table: fresh, gate: fresh }, parts, place]
}

/** An AlignGPT folder in the official layout, or a LLaVA's, whose alignment starts fresh. */
export function openFolder(dir: string, o: LoadOptions & ModelOptions & { clip?: string } = {}): Opened {
  const { seed, ...place } = checkOptions(o)
  const { stored, config } = storedConfig(dir, o)
  const clipDir = visionTowerFolder(dir, config, o.clip)
  const clip = readVisionConfig(clipDir)
  const entries = openCheckpoint(dir)
  const table = entries.get(TABLE)
  const levels = table?.shape[0] ?? config.n_indicators ?? MODEL_DEFAULTS.levels
  const source = checkpointSource(entries, dir, place)
  const tokenizer = loadTokenizer(dir, config.llm.vocab_size)
  const conversation = config.conversation ?? conversationOf(config, tokenizer)
  const generation = readGenerationConfig(dir)
  const shared = { config, clip, levels, ...processorOf(clip, clipDir) }
  const parts: Parts = { ...shared, tokenizer, conversation, generation, llmDir: dir }
  const ownVision = [...entries.keys()].some((name) => name.startsWith(VISION))
  const known = AlignGPTNetwork.parameters(shared, (name) => entries.has(name))
  const vision = ownVision ? source : towerSource(clipDir, known, place)
  // a LLaVA has a projector but no table: alignment starts fresh there, as does what an option asks for in another form
  const fresh = initSource(seed, place)
  const redrawn = config.mm_alignment === 'random' && stored.mm_alignment !== 'random'
  const from = {
    table: table && !redrawn ? source : fresh,
    gate: table && config.mm_gate_type === stored.mm_gate_type ? source : fresh,
  }
  // a gate of another form than the file's is asked for, so that the file's is left
  refuseUnread(entries, (name) => known.has(name), from.gate === fresh ? /^gated_weight_layer\./ : undefined)
  return [{ language: source, vision, projector: source, ...from }, parts, place]
}

/** A new CLIP after the config.json of a folder; its weights come from the seed. @throws AlignGPTError ERR_CONFIG */
export function createClip(dir: string, o: LoadOptions = {}): CLIPModel {
  const { seed, ...place } = checkOptions(o)
  return new CLIPModel(initSource(seed, place), readClipConfig(dir), place.dtype)
}

/**
 * A new language model after the config.json of a folder; its weights come from the seed. @throws AlignGPTError
 * ERR_CONFIG
 */
export function createLanguageModel(dir: string, o: LoadOptions = {}): LanguageModel {
  const { seed, ...place } = checkOptions(o)
  const { raw, file } = loadConfig(dir, 'config.json')
  const family = languageFamily(raw, file)
  return family.build(initSource(seed, place), family.parse(raw, file), place)
}

/** A CLIP with what its folder says of texts and images. */
export class LoadedClip extends CLIPModel {
  readonly tokenizer: Tokenizer
  readonly preprocessor: PreprocessorConfig
  constructor(dir: string, place: Required<Placement>) {
    const config = readClipConfig(dir)
    const entries = openCheckpoint(dir)
    const tokenizer = loadTokenizer(dir, config.text.vocab_size)
    const preprocessor = readPreprocessor(dir, config.vision.image_size)
    super(checkpointSource(entries, dir, place), config, place.dtype)
    this.tokenizer = tokenizer
    this.preprocessor = preprocessor
    try {
      const known = new Map(this.namedParameters())
      refuseUnread(entries, (name) => known.has(name))
    } catch (e) {
      this.dispose()
      throw e
    }
  }
}

/**
 * Loads both towers of a CLIP folder, its tokenizer and how it wants its images. The caller disposes it.
 * @throws ERR_FORMAT, ERR_CONFIG, ERR_WEIGHTS naming the file
 */
export function loadClip(dir: string, o: LoadOptions = {}): LoadedClip {
  return new LoadedClip(dir, checkOptions(o))
}

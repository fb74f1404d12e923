/** AlignGPT models from files: new ones of a language model and a vision tower, and folders in the official layout. */

import { resolveDevice } from '../core/device.js'
import type { Device } from '../core/native.js'
import type { Dtype } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { loadConfig } from '../formats/zod-check.js'
import type { ChatStyle } from '../processing/conversation/styles.js'
import { type PreprocessorConfig, readPreprocessor } from '../processing/preprocessor-config.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError } from '../util/errors.js'
import type { Parts, Sources } from './aligngpt.js'
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

/** Names in an AlignGPT checkpoint -> in the vision tower's own. */
const toClip = (name: string): string => name.replace(VISION, 'vision_model.')

/** The style of a model that says nothing of it. */
const conversationOf = ({ llm }: AlignGPTConfig, tokenizer: Tokenizer): ChatStyle =>
  familyInAlignGPT(llm.raw, 'config.json').conversation(tokenizer)

/** A new AlignGPT; projector, alignment vectors and gate come from the seed or from an earlier pre-training. */
export function openParts(o: CreateOptions, load: LoadOptions = {}): Opened {
  const { seed, ...place } = checkOptions(load)
  const settings = newSettings(o)
  const { config, clip } = settings
  const tokenizer = Tokenizer.load(o.llm)
  const conversation = config.conversation ?? conversationOf(config, tokenizer)
  const generation = readGenerationConfig(o.llm)
  const shared = { ...settings, ...processorOf(clip, o.clip) }
  const parts: Parts = { ...shared, tokenizer, conversation, generation, llmDir: o.llm }
  const fresh = o.pretrained ? pretrainedSource(o.pretrained, seed, place) : initSource(seed, place)
  const vision = checkpointSource(o.clip, place, toClip)
  const language = checkpointSource(o.llm, place)
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
  const source = checkpointSource(dir, place)
  const tokenizer = Tokenizer.load(dir)
  const conversation = config.conversation ?? conversationOf(config, tokenizer)
  const generation = readGenerationConfig(dir)
  const shared = { config, clip, levels, ...processorOf(clip, clipDir) }
  const parts: Parts = { ...shared, tokenizer, conversation, generation, llmDir: dir }
  const ownVision = [...entries.keys()].some((name) => name.startsWith(VISION))
  const vision = ownVision ? source : checkpointSource(clipDir, place, toClip)
  // a LLaVA has a projector but no table: alignment starts fresh there, as does what an option asks for in another form
  const fresh = initSource(seed, place)
  const redrawn = config.mm_alignment === 'random' && stored.mm_alignment !== 'random'
  const from = {
    table: table && !redrawn ? source : fresh,
    gate: table && config.mm_gate_type === stored.mm_gate_type ? source : fresh,
  }
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
    super(checkpointSource(dir, place), config, place.dtype)
    this.tokenizer = Tokenizer.load(dir)
    this.preprocessor = readPreprocessor(dir, config.vision.image_size)
  }
}

/**
 * Loads both towers of a CLIP folder, its tokenizer and how it wants its images. The caller disposes it.
 * @throws ERR_FORMAT, ERR_CONFIG, ERR_WEIGHTS naming the file
 */
export function loadClip(dir: string, o: LoadOptions = {}): LoadedClip {
  return new LoadedClip(dir, checkOptions(o))
}

/** AlignGPT models from files: new ones of a language model and a vision tower, and folders in the official layout. */

import path from 'node:path'
import { resolveDevice } from '../core/device.js'
import type { Device } from '../core/native.js'
import type { Dtype } from '../core/tensor.js'
import { openCheckpoint } from '../formats/checkpoint-files.js'
import { loadConfig } from '../formats/zod-check.js'
import type { ChatStyle } from '../processing/conversation/styles.js'
import { Tokenizer } from '../processing/tokenizer.js'
import { AlignGPTError } from '../util/errors.js'
import type { Parts, Sources } from './aligngpt.js'
import { CLIPModel } from './clip.js'
import {
  type AlignGPTFields,
  alignGPTConfigJson,
  parseAlignGPTConfig,
  readAlignGPTConfig,
  visionTowerFolder,
} from './config/aligngpt.js'
import { readClipConfig } from './config/clip.js'
import { readGenerationConfig } from './config/generation.js'
import { type Alignment, type Gate, type GateText, MODEL_DEFAULTS, type SelectFeature } from './config/variants.js'
import type { LanguageModel } from './language-model.js'
import { TABLE, VISION } from './names.js'
import { checkpointSource, initSource, type Placement, pretrainedSource } from './parameter-sources.js'
import { familyInAlignGPT, languageFamily, readVisionConfig, visionFamily } from './registry.js'

export interface LoadOptions {
  /** default auto: ALIGNGPT_DEVICE where it is set, else the GPU where there is one, else the CPU */
  device?: 'auto' | Device
  /** of the weights and activations; default f32 */
  dtype?: Dtype
  /** of new parts */
  seed?: number
}
/**
 * Which variant of the alignment vector; what a checkpoint's config says, else the official code's (adaptive, mlp,
 * all).
 */
export interface AlignmentOptions {
  alignment?: Alignment
  /** linear: the paper's single matrix in place of the official code's two layers */
  gate?: Gate
  /** instruction: the gate does not see answers in training, as it will not at inference */
  gateText?: GateText
}
/** What a model's config.json may say and an argument may say otherwise. */
export interface ModelOptions extends AlignmentOptions {
  /**
   * style of instruction tuning and of answers; what config.json says, else recognised by architecture and
   * tokenizer
   */
  conversation?: ChatStyle
}
export interface CreateOptions extends ModelOptions {
  /** folder of a LLaMA in Hugging Face layout */
  llm: string
  /** folder of a CLIP in Hugging Face layout */
  clip: string
  /** number of alignment levels N, the paper's 8 by default */
  levels?: number
  projector?: string
  /** index of the vision tower's hidden state, LLaVA's -2 by default */
  selectLayer?: number
  /** which rows of it: patch (LLaVA's, default) or cls_patch, the class row too */
  selectFeature?: SelectFeature
  /**
   * file with the projector and the alignment table of an earlier pre-training (mm_projector_align.bin or
   * .safetensors)
   */
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

/** Fields of config.json for what was asked for. */
function fieldsOf({ alignment, gate, gateText, conversation }: ModelOptions): Partial<AlignGPTFields> {
  return {
    ...(alignment !== undefined && { mm_alignment: alignment }),
    ...(gate !== undefined && { mm_gate_type: gate }),
    ...(gateText !== undefined && { mm_gate_text: gateText }),
    ...(conversation !== undefined && { conversation }),
  }
}

/** The folder of the scoring model that a vision tower is part of, its config and how it wants its images. */
function openTower(dir: string): Pick<Parts, 'clip' | 'preprocessor' | 'clipDir'> {
  const clip = readVisionConfig(dir)
  return { clip, preprocessor: visionFamily(clip.raw, dir).processor(dir, clip), clipDir: dir }
}

/** Names in an AlignGPT checkpoint -> in the vision tower's own. */
const toClip = (name: string): string => name.replace(VISION, 'vision_model.')

/** A new AlignGPT; projector, alignment vectors and gate come from the seed or from an earlier pre-training. */
export function openParts(o: CreateOptions, load: LoadOptions = {}): Opened {
  const { seed, ...place } = checkOptions(load)
  const tower = openTower(o.clip)
  const levels = o.levels ?? MODEL_DEFAULTS.levels
  if (!Number.isInteger(levels) || levels < 2)
    throw new AlignGPTError('ERR_ARGUMENT', `[AlignGPT] levels: expected an integer >= 2, got ${levels}`)
  const { raw: own, file } = loadConfig(o.llm, 'config.json')
  const family = languageFamily(own, file)
  family.parse(own, file) // what is wrong in it is said of the file itself
  const features = visionFamily(tower.clip.raw, o.clip).tower(tower.clip)
  const raw = alignGPTConfigJson(own, {
    mm_hidden_size: features.hidden_size,
    mm_projector_type: o.projector ?? MODEL_DEFAULTS.projector,
    mm_vision_select_layer: o.selectLayer ?? MODEL_DEFAULTS.selectLayer,
    mm_vision_select_feature: o.selectFeature ?? MODEL_DEFAULTS.selectFeature,
    mm_vision_tower: path.resolve(o.clip),
    n_indicators: levels,
    ...fieldsOf(o),
  })
  const config = parseAlignGPTConfig(raw, file)
  const tokenizer = Tokenizer.load(o.llm)
  const conversation = config.conversation ?? family.conversation(tokenizer)
  const generation = readGenerationConfig(o.llm)
  const parts: Parts = { config, ...tower, tokenizer, conversation, generation, llmDir: o.llm, levels }
  const fresh = o.pretrained ? pretrainedSource(o.pretrained, seed, place) : initSource(seed, place)
  const vision = checkpointSource(o.clip, place, toClip)
  const language = checkpointSource(o.llm, place)
  return [{ language, vision, projector: fresh, table: fresh, gate: fresh }, parts, place]
}

/** An AlignGPT folder in the official layout, or a LLaVA's, whose alignment starts fresh. */
export function openFolder(dir: string, o: LoadOptions & ModelOptions & { clip?: string } = {}): Opened {
  const { seed, ...place } = checkOptions(o)
  const file = path.join(dir, 'config.json')
  const stored = readAlignGPTConfig(dir)
  const config = parseAlignGPTConfig({ ...stored.llm.raw, ...fieldsOf(o) }, file)
  const tower = openTower(visionTowerFolder(dir, config, o.clip))
  const entries = openCheckpoint(dir)
  const table = entries.get(TABLE)
  const levels = table?.shape[0] ?? config.n_indicators ?? MODEL_DEFAULTS.levels
  const source = checkpointSource(dir, place)
  const tokenizer = Tokenizer.load(dir)
  const conversation = config.conversation ?? familyInAlignGPT(config.llm.raw, file).conversation(tokenizer)
  const generation = readGenerationConfig(dir)
  const parts: Parts = { config, ...tower, tokenizer, conversation, generation, llmDir: dir, levels }
  const ownVision = [...entries.keys()].some((name) => name.startsWith(VISION))
  const vision = ownVision ? source : checkpointSource(tower.clipDir, place, toClip)
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

/** Loads both towers of a CLIP folder. */
export function loadClip(dir: string, o: LoadOptions = {}): CLIPModel {
  const place = checkOptions(o)
  return new CLIPModel(checkpointSource(dir, place), readClipConfig(dir), place.dtype)
}

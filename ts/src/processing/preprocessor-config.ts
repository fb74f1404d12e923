/** preprocessor_config.json, or the part of processor_config.json that newer versions of transformers write: how a vision tower wants its images. */
import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { checkConfig, or, positive, type RawConfig, readJsonObject, refuse, size } from '../formats/zod-check.js'

/** CLIP image preprocessing. */
export interface PreprocessorConfig {
  /** length of the shortest edge after resizing, pixels */
  size: number
  /** side of the centre crop, pixels; at most `size` */
  crop: number
  /** per channel, of values scaled to 0..1 */
  mean: [number, number, number]
  std: [number, number, number]
  raw: RawConfig
}

const CLIP_MEAN: [number, number, number] = [0.48145466, 0.4578275, 0.40821073]
const CLIP_STD: [number, number, number] = [0.26862954, 0.26130258, 0.27577711]
const triple = z.tuple([z.number(), z.number(), z.number()])
const preprocessorSchema = z.object({
  size: or(
    z.union(
      [size, z.strictObject({ shortest_edge: size }).transform((s) => s.shortest_edge)],
      'N or {"shortest_edge": N}',
    ),
    224,
  ),
  crop_size: or(
    z.union(
      [
        size,
        z
          .strictObject({ height: size, width: size })
          .refine((s) => s.height === s.width)
          .transform((s) => s.height),
      ],
      'N or {"height": N, "width": N}',
    ),
    224,
  ),
  image_mean: or(triple, CLIP_MEAN),
  image_std: or(z.tuple([positive, positive, positive]), CLIP_STD),
  resample: or(z.literal(3, 'bicubic (3)'), 3),
  rescale_factor: or(
    z.number().refine((x) => Math.abs(x * 255 - 1) < 1e-6, '1/255'),
    1 / 255,
  ),
  ...Object.fromEntries(
    ['do_resize', 'do_center_crop', 'do_normalize', 'do_rescale', 'do_convert_rgb'].map((k) => [
      k,
      or(z.literal(true), true),
    ]),
  ),
})

const PROCESSORS = /^CLIP(ImageProcessor(Fast|Pil)?|FeatureExtractor)$/
/** Steps and settings of other processors; none of them may be on. */
const OTHER_STEPS =
  /^(do_(?!resize$|center_crop$|normalize$|rescale$|convert_rgb$).*|crop_pct|size_divisor|rescale_offset|max_image_size)$/

/** Refuses what CLIP's processor has not. */
function checkKind(raw: RawConfig, file: string): void {
  for (const key of ['image_processor_type', 'feature_extractor_type'])
    if (typeof raw[key] === 'string' && !PROCESSORS.test(raw[key])) refuse(file, key, "'CLIPImageProcessor'", raw[key])
  for (const [key, value] of Object.entries(raw))
    if (OTHER_STEPS.test(key) && value !== null && value !== false)
      refuse(file, key, 'nothing, CLIP has no such step', value)
}

/** Validates the content of a preprocessor_config.json (CLIP's). @throws AlignGPTError ERR_CONFIG */
export function parsePreprocessorConfig(raw: RawConfig, file = 'preprocessor_config.json'): PreprocessorConfig {
  checkKind(raw, file)
  const c = checkConfig(preprocessorSchema, raw, file)
  if (c.crop_size > c.size) refuse(file, 'crop_size', `at most size ${c.size}`, c.crop_size)
  return { size: c.size, crop: c.crop_size, mean: c.image_mean, std: c.image_std, raw }
}

/**
 * What a folder says of its images: `image_processor` in processor_config.json, else preprocessor_config.json, the order of
 * transformers 5. Null where it has neither.
 * @throws AlignGPTError ERR_CONFIG
 */
export function preprocessorJson(folder: string): { raw: RawConfig; file: string } | null {
  const [whole, own] = ['processor_config.json', 'preprocessor_config.json'].map((name) => path.join(folder, name))
  const inner = fs.existsSync(whole) ? readJsonObject(whole).image_processor : undefined
  if (inner !== undefined && inner !== null) {
    if (typeof inner !== 'object' || Array.isArray(inner)) refuse(whole, 'image_processor', 'an object', inner)
    return { raw: inner as RawConfig, file: whole }
  }
  return fs.existsSync(own) ? { raw: readJsonObject(own), file: own } : null
}

/**
 * Reads how a folder wants its images; without either file, CLIP's defaults.
 * @param imageSize the vision tower's picture side; when given, the crop must have it
 * @throws AlignGPTError ERR_CONFIG
 */
export function readPreprocessor(folder: string, imageSize?: number): PreprocessorConfig {
  const own = path.join(folder, 'preprocessor_config.json')
  const missing = (): RawConfig =>
    imageSize === undefined ? readJsonObject(own) : { size: imageSize, crop_size: imageSize }
  const { raw, file } = preprocessorJson(folder) ?? { raw: missing(), file: own }
  const c = parsePreprocessorConfig(raw, file)
  if (imageSize !== undefined && c.crop !== imageSize)
    refuse(file, 'crop_size', `the vision tower's image_size ${imageSize}`, c.crop)
  return c
}

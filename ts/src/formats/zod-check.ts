/** Checked reading and writing of the configuration files of Hugging Face folders; what a file may hold is a zod schema. */

import fs from 'node:fs'
import path from 'node:path'
import { z } from 'zod'
import { mismatch, show } from '../util/errors.js'
import { writeAtomicText } from '../util/files.js'
import { readJsonFile } from '../util/json.js'

/** A configuration file's own content. */
export type RawConfig = Record<string, unknown>

/** Absent and null both mean the default, as in transformers. */
export const or = <T extends z.ZodType>(schema: T, value: z.output<T>) =>
  schema.nullish().transform((x) => (x === null || x === undefined ? value : x)) as z.ZodType<z.output<T>>
export const size = z.int().positive()
export const count = z.int().nonnegative()
export const positive = z.number().positive()
export const id = z.int().nonnegative()
export const ids = z.union([id.transform((x) => [x]), z.array(id)], 'a token id or a list of them')
export const maybe = <T extends z.ZodType>(schema: T) => schema.nullish().transform((x) => x ?? null)

/** Validates what a file holds. @throws AlignGPTError ERR_CONFIG naming the key, what was expected and what is there */
export function checkConfig<T>(schema: z.ZodType<T>, raw: unknown, file: string, prefix = ''): T {
  const result = schema.safeParse(raw)
  if (result.success) return result.data
  const issue = result.error.issues[0]
  let got: unknown = raw
  for (const key of issue.path) got = (got as Record<PropertyKey, unknown> | undefined)?.[key]
  const key = [prefix, ...issue.path.map(String)].filter(Boolean).join('.') || '(the whole file)'
  const expected = issue.message
    .replace(/^(Invalid input|Invalid option|Too small|Too big): expected /, '')
    .replace(/, received .*$/, '')
  throw mismatch('ERR_CONFIG', 'config', `${file}: ${key}`, expected, got === undefined ? 'nothing' : show(got))
}

/** @throws AlignGPTError ERR_CONFIG naming the file, the key, what was expected and what is there */
export function refuse(file: string, key: string, expected: string, got: unknown): never {
  throw mismatch('ERR_CONFIG', 'config', `${file}: ${key}`, expected, show(got))
}

/** Reads a JSON file that holds an object. @throws AlignGPTError ERR_CONFIG */
export function readJsonObject(file: string): RawConfig {
  const raw = readJsonFile(file, 'ERR_CONFIG')
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) refuse(file, '(the whole file)', 'an object', raw)
  return raw as RawConfig
}

/** A config file or the one in a folder. @throws AlignGPTError ERR_CONFIG */
export function loadConfig(fileOrFolder: string, name: string): { raw: RawConfig; file: string } {
  const isFolder = fs.statSync(fileOrFolder, { throwIfNoEntry: false })?.isDirectory()
  const file = isFolder ? path.join(fileOrFolder, name) : fileOrFolder
  if (isFolder && !fs.existsSync(file) && fs.existsSync(path.join(fileOrFolder, 'adapter_config.json'))) {
    const got = 'an adapter alone (give its base model, and this folder to import --adapter or loadAdapter)'
    throw mismatch('ERR_CONFIG', 'config', fileOrFolder, `the ${name} of a model`, got)
  }
  return { raw: readJsonObject(file), file }
}

// Python tells 8 from 8.0, JavaScript does not, and versions of transformers refuse an integer for some of these.
const FLOAT_KEYS = [
  ...['initializer_range', 'initializer_factor', 'rms_norm_eps', 'layer_norm_eps', 'attention_dropout', 'dropout'],
  ...['rope_theta', '(?:\\w+_)?factor', 'logit_scale_init_value'],
]
const FLOATS = new RegExp(`"(${FLOAT_KEYS.join('|')})": (-?\\d+)(?=,?\\n)`, 'g')

/** Writes a config file atomically, with whole numbers as floats where Python expects floats. */
export function writeConfigFile(file: string, raw: RawConfig): void {
  writeAtomicText(file, `${JSON.stringify(raw, null, 2)}\n`.replace(FLOATS, '"$1": $2.0'))
}

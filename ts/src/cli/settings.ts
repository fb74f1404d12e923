/**
 * Where the settings of a run (train/run-settings.ts) come from on the command line: flags, --set, a config file, a preset. What is
 * given in several places counts in this order; the library knows the defaults of the rest.
 */
import { type Command, InvalidArgumentError, Option } from 'commander'
import {
  defaultOf,
  flat,
  type PhaseName,
  PRESETS,
  type Preset,
  problemIn,
  SETTINGS,
  type Setting,
  settingsOf,
  type Values,
} from '../train/run-settings.js'
import { mismatch, show } from '../util/errors.js'
import { foundIn } from '../util/file-kind.js'
import { readText } from '../util/json.js'
import { hint } from './words.js'

/** saveEvery -> --save-every, lora.rank -> --lora-rank */
export const flagOf = ({ key }: Pick<Setting, 'key'>): string =>
  `--${key.replace('.', '-').replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`)}`
/** As commander names it. */
const attributeOf = ({ key }: Setting): string => key.replace(/\.(.)/, (_, c) => c.toUpperCase())

/** The value of a flag's text: a number where it is one and the setting takes it. */
function parsed({ kind }: Setting, text: string): unknown {
  const n = text.trim() === '' ? Number.NaN : Number(text)
  const found = [n, text === 'null' ? null : text].find((v) => kind.accepts(v))
  if (found === undefined) throw new InvalidArgumentError(`expected ${kind.expected}`)
  return found
}

function optionOf(s: Setting, phase: PhaseName): Option {
  const usual = defaultOf(s, phase)
  const help = usual === undefined || usual === false ? s.help : `${s.help} (default: ${usual})`
  const option = (value: string): Option => new Option(`${flagOf(s)}${value}`, help)
  const { flag, value = 'n', choices } = s.kind
  if (flag === 'switch') return option('')
  if (flag === 'optional') return option(` [${value}]`)
  if (flag === 'list') return option(` <${value}...>`)
  const made = option(` <${value}>`)
  return choices ? made.choices(choices as string[]) : made.argParser((text) => parsed(s, text))
}

/** Flags of a training command. */
export function settingsOptions(command: Command, phase: PhaseName): Command {
  for (const s of settingsOf(phase)) {
    command.addOption(optionOf(s, phase))
    if (s.kind.flag === 'switch') command.addOption(new Option(flagOf(s).replace('--', '--no-')).hideHelp())
  }
  return configOptions(command)
}

/** Where settings come from besides their flags. */
function configOptions(command: Command): Command {
  const collect = (text: string, before: string[] = []): string[] => [...before, text]
  return command
    .option('--config <file>', 'settings as YAML or JSON; flags count more')
    .addOption(
      new Option('--preset <name>', 'ready settings; config and flags count more').choices(Object.keys(PRESETS)),
    )
    .option('--set <key=value>', 'a setting as the config file has it, such as lora.rank=64; repeatable', collect)
}

/** The rows of docs/config.md. */
export function settingsTable(): string {
  const usual = (s: Setting): string => {
    const [first, second] = [defaultOf(s, 'pretrain'), defaultOf(s, 'finetune')]
    return first === second ? `${first ?? ''}` : `${first} (pretrain), ${second} (finetune)`
  }
  const rows = SETTINGS.map((s) => {
    const phase = s.phase ? ` (${s.phase})` : ''
    return `| \`${s.key}\`${phase} | \`${flagOf(s)}\` | ${s.kind.expected} | ${usual(s)} | ${s.help} |`
  })
  return ['| key | flag | value | default | meaning |', '|---|---|---|---|---|', ...rows].join('\n')
}

/** Where given settings are; `flags` as commander parsed them. */
export interface Given {
  config?: string
  preset?: string
  set?: string[]
  flags?: Values
}

const isSection = (v: unknown): v is Values => typeof v === 'object' && v !== null && !Array.isArray(v)

function put(values: Values, key: string, v: unknown): void {
  const [section, ...names] = key.split('.')
  if (names.length) values[section] = { ...(values[section] as Values), [names.join('.')]: v }
  else values[key] = v
}

/** @throws ERR_CONFIG naming the place, the key, and the one that may be meant, or what its value should be */
function checked(where: string, values: Values, phase: PhaseName): [string, unknown][] {
  const known = settingsOf(phase).map((s) => s.key)
  const given = [...flat(values)]
  for (const [key, v] of given) {
    if (!known.includes(key)) throw unknownKey(where, key, phase, known)
    const problem = problemIn(phase, { [key]: v })
    if (problem) throw mismatch('ERR_CONFIG', 'config', `${where}: ${key}`, problem.expected, problem.got)
  }
  return given
}

function unknownKey(where: string, key: string, phase: PhaseName, known: string[]): Error {
  const fail = (expected: string): Error => mismatch('ERR_CONFIG', 'config', where, expected, show(key))
  const inside = known.filter((k) => k.startsWith(`${key}.`))
  if (inside.length) return fail(`values for ${inside.join(', ')}`)
  if (SETTINGS.some((s) => s.key === key)) return fail(`a key of ${phase}`)
  const meant = hint(key, [...known, 'preset', 'phase'], (k) => k) ?? 'docs/config.md has them'
  return fail(`a known key (${meant})`)
}

/** What a file or --set says: settings, a preset, the phase it is for. */
interface Said {
  phase?: PhaseName
  preset?: Preset
  values: Values
}

function said(where: string, content: Values, phase?: PhaseName): Said {
  const { preset, phase: own, ...values } = content
  if (own !== undefined && !(phase ? own === phase : own === 'pretrain' || own === 'finetune'))
    throw mismatch('ERR_CONFIG', 'config', `${where}: phase`, phase ?? 'pretrain or finetune', show(own))
  if (preset !== undefined && !Object.hasOwn(PRESETS, preset as string))
    throw mismatch('ERR_CONFIG', 'config', `${where}: preset`, Object.keys(PRESETS).join(', '), show(preset))
  return { phase: own as PhaseName | undefined, preset: preset as Preset | undefined, values }
}

/** JSON's text with spaces in place of its comments; YAML, as which it is parsed, has others, and takes commas at an end. */
const withoutComments = (text: string): string =>
  text.replace(/"(?:[^"\\]|\\.)*"|\/\/.*|\/\*[\s\S]*?\*\//g, (part) =>
    part.startsWith('"') ? part : part.replace(/[^\r\n]/g, ' '),
  )

/** What a file says; of this phase, if it names one. JSON may have comments. */
export async function readConfig(file: string, phase?: PhaseName): Promise<Said> {
  const { parseDocument } = await import('yaml')
  const text = readText(file, 'ERR_CONFIG', 'config', 'YAML or JSON')
  const isJson = /^\s*(\/\/|\/\*|\{)/.test(text)
  let content: unknown
  try {
    const document = parseDocument(isJson ? withoutComments(text) : text)
    const [problem] = [...document.errors, ...document.warnings]
    if (problem) throw problem
    content = document.toJS() ?? {}
  } catch (e) {
    const [problem] = (e as Error).message.split('\n')
    throw mismatch('ERR_CONFIG', 'config', file, 'readable YAML or JSON', problem.replace(/:$/, ''), e)
  }
  if (!isSection(content))
    throw mismatch('ERR_CONFIG', 'config', file, 'keys and values', othersName(file) ?? show(content))
  return said(file, content, phase)
}

/** What a text that YAML takes for one value is, where that can be told. */
const othersName = (file: string): string | null => {
  const found = foundIn(file)
  return found === 'other text' || found === 'JSON' ? null : found
}

async function readSet(list: readonly string[], phase: PhaseName): Promise<Said> {
  const { parse } = await import('yaml')
  const content: Values = {}
  for (const text of list) {
    const at = text.indexOf('=')
    if (at <= 0) throw mismatch('ERR_CONFIG', 'config', '--set', 'key=value', show(text))
    put(content, text.slice(0, at).trim(), parse(text.slice(at + 1)))
  }
  return said('--set', content, phase)
}

/** A setting takes the place of the other one from a place that counts less: a preset holds records out, a flag names a file. */
const instead = new Map(SETTINGS.map((s) => [s.key, s.instead]))

/**
 * The settings of a run from all places.
 * @throws AlignGPTError ERR_CONFIG
 */
export async function resolveSettings(phase: PhaseName, g: Given): Promise<Values> {
  const file: Said = g.config === undefined ? { values: {} } : await readConfig(g.config, phase)
  const set = await readSet(g.set ?? [], phase)
  const preset = g.preset ?? set.preset ?? file.preset
  const flags: Values = {}
  for (const s of settingsOf(phase)) {
    const v = g.flags?.[attributeOf(s)]
    if (v !== undefined) put(flags, s.key, v)
  }
  const layers: [string, Values][] = [
    [`preset ${preset}`, preset === undefined ? {} : PRESETS[preset as Preset][phase]],
    [g.config ?? '', file.values],
    ['--set', set.values],
    ['flags', flags],
  ]
  const values: Values = {}
  for (const [where, layer] of layers) {
    const given = checked(where, layer, phase)
    for (const [key] of given) delete values[instead.get(key) ?? '']
    for (const [key, v] of given) put(values, key, v)
  }
  return values
}

/** What the files of a folder say of its tokenizer, in the structure of tokenizer.json. */
import fs from 'node:fs'
import path from 'node:path'
import { fromSentencePiece } from '../formats/sentencepiece.js'
import { mismatch, show } from '../util/errors.js'
import { isObject, readJsonFile } from '../util/json.js'

export type Json = Record<string, unknown>

/** The content of a file that holds one JSON object. @throws AlignGPTError ERR_FORMAT */
function jsonObject(file: string): Json {
  const content = readJsonFile(file, 'ERR_FORMAT')
  if (!isObject(content)) throw mismatch('ERR_FORMAT', 'tokenizer', file, 'a JSON object', show(content))
  return content
}

/** The content of a file that need not be there. */
export function optionalJson(file: string): Json {
  return fs.existsSync(file) ? jsonObject(file) : {}
}

/** CLIP's vocab.json and merges.txt as a tokenizer.json, as transformers converts them. */
function fromClipFiles(folder: string): Json {
  const vocab = jsonObject(path.join(folder, 'vocab.json')) as Record<string, number>
  const lines = fs.readFileSync(path.join(folder, 'merges.txt'), 'utf8').split('\n')
  const merges = lines.filter((l) => l.trim() && !l.startsWith('#version')).map((l) => l.trimEnd().split(' '))
  const [bos, eos] = ['<|startoftext|>', '<|endoftext|>']
  for (const t of [bos, eos])
    if (!Object.hasOwn(vocab, t))
      throw mismatch('ERR_FORMAT', 'tokenizer', `${folder}/vocab.json`, `a token ${t}`, 'none')
  const words = "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"
  const added = (content: string): Json => ({ id: vocab[content], content, normalized: false, special: true })
  return {
    added_tokens: [added(bos), added(eos)],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFC' },
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Lowercase' },
      ],
    },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Split', pattern: { Regex: words }, behavior: 'Removed', invert: true },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: { type: 'RobertaProcessing', sep: [eos, vocab[eos]], cls: [bos, vocab[bos]] },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      unk_token: eos,
      continuing_subword_prefix: '',
      end_of_word_suffix: '</w>',
      fuse_unk: false,
      vocab,
      merges,
    },
  }
}

/** Tokens that other files add to those of the definition: id (null: the next free one) and what is known of them. */
function* tokensBeside(folder: string, config: Json): Generator<[id: number | null, token: Json]> {
  const plain = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }
  const beside = config.added_tokens_decoder
  for (const [id, token] of isObject(beside) ? Object.entries(beside) : [])
    yield [Number(id), { ...plain, special: false, ...(token as Json) }]
  for (const [content, id] of Object.entries(optionalJson(path.join(folder, 'added_tokens.json'))))
    yield [Number(id), { ...plain, special: false, normalized: true, content }]
  for (const key of ['additional_special_tokens', 'extra_special_tokens'])
    for (const t of Object.values((config[key] ?? {}) as Json))
      yield [null, { ...plain, ...(typeof t === 'object' ? (t as Json) : { content: t }), special: true }]
}

/**
 * The definition with the tokens that tokenizer_config.json and added_tokens.json have besides, as transformers adds them: one
 * that the vocabulary has keeps its id.
 */
function withAdded(definition: Json, folder: string, config: Json): Json {
  const own = definition.added_tokens ?? []
  const vocab = isObject(definition.model) ? (definition.model.vocab ?? {}) : {}
  // Who makes a tokenizer of it says what is wrong.
  if (!Array.isArray(own) || !own.every(isObject) || !isObject(vocab)) return definition
  const added = [...own]
  const pieces = Object.entries(vocab)
  const ids = new Map([...pieces, ...added.map((t): [string, unknown] => [String(t.content), t.id])])
  const known = new Set(added.map((t) => t.content))
  let next = 0
  for (const id of ids.values()) if (Number(id) >= next) next = Number(id) + 1
  for (const [given, token] of tokensBeside(folder, config)) {
    const { content } = token
    const id = ids.get(content as string) ?? given ?? next
    if (typeof content !== 'string' || !Number.isSafeInteger(id) || Number(id) < 0)
      throw mismatch('ERR_FORMAT', 'tokenizer', `${folder}: an added token`, 'its text and id', show({ id, content }))
    if (known.has(content)) continue
    known.add(content)
    added.push({ ...token, id })
    next = Math.max(next, Number(id) + 1)
  }
  return { ...definition, added_tokens: added }
}

/** tokenizer.json, or what the other files of the folder say, in its structure, with the tokens that are added beside it. */
export const definitionOf = (folder: string, config: Json): Json =>
  withAdded(ownDefinition(folder, config), folder, config)

function ownDefinition(folder: string, config: Json): Json {
  const has = (name: string): boolean => fs.existsSync(path.join(folder, name))
  if (has('tokenizer.json')) return jsonObject(path.join(folder, 'tokenizer.json'))
  if (has('tokenizer.model')) {
    const file = path.join(folder, 'tokenizer.model')
    return fromSentencePiece(fs.readFileSync(file), file, {
      // transformers treats a missing flag as legacy.
      legacy: config.legacy !== false,
      addBos: config.add_bos_token !== false,
      addEos: config.add_eos_token === true,
    })
  }
  if (has('vocab.json') && has('merges.txt')) return fromClipFiles(folder)
  const expected = 'tokenizer.json, tokenizer.model, or vocab.json and merges.txt'
  throw mismatch('ERR_FORMAT', 'tokenizer', folder, expected, 'none of them')
}

/** Which id a role (bos, eos, ...) has: tokenizer_config.json, special_tokens_map.json, then config.json. */
export function roleId(
  role: string,
  files: Json[],
  model: Json,
  idOf: (token: string) => number | undefined,
): number | null {
  for (const f of files) {
    const v = f[`${role}_token`]
    const text = typeof v === 'object' && v !== null ? (v as Json).content : v
    const id = typeof text === 'string' ? idOf(text) : undefined
    if (id !== undefined) return id
  }
  const v = model[`${role}_token_id`]
  const id = Array.isArray(v) ? v[0] : v
  return typeof id === 'number' && id >= 0 ? id : null
}

/** What the files of a folder say of its tokenizer, in the structure of tokenizer.json. */
import fs from 'node:fs'
import path from 'node:path'
import { fromSentencePiece } from '../formats/sentencepiece.js'
import { mismatch } from '../util/errors.js'
import { readJsonFile } from '../util/json.js'

export type Json = Record<string, unknown>

/** The content of a file that need not be there. */
export function optionalJson(file: string): Json {
  return fs.existsSync(file) ? (readJsonFile(file, 'ERR_FORMAT') as Json) : {}
}

/** CLIP's vocab.json and merges.txt as a tokenizer.json, as transformers converts them. */
function fromClipFiles(folder: string): Json {
  const vocab = readJsonFile(path.join(folder, 'vocab.json'), 'ERR_FORMAT') as Record<string, number>
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

/** tokenizer.json, or what the other files of the folder say, in its structure. */
export function definitionOf(folder: string, config: Json): Json {
  const has = (name: string): boolean => fs.existsSync(path.join(folder, name))
  if (has('tokenizer.json')) return readJsonFile(path.join(folder, 'tokenizer.json'), 'ERR_FORMAT') as Json
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

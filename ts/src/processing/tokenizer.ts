/**
 * Tokenizers of Hugging Face folders: tokenizer.json, tokenizer.model (sentencepiece BPE) or CLIP's vocab.json and
 * merges.txt. Ids, offsets and text are those of Hugging Face's Rust library (tokenizer/ has its parts); what is not, such as another
 * model than BPE, is refused by name. `truncation` and `padding` of a file are not looked at, as transformers does it.
 */
import path from 'node:path'
import { mismatch, show } from '../util/errors.js'
import { type AddedToken, AddedTokens, type Range } from './tokenizer/added-tokens.js'
import { AlignedText } from './tokenizer/aligned-text.js'
import { Bpe, type EncodedWord } from './tokenizer/bpe.js'
import { type Decoder, decoderOf } from './tokenizer/decoders.js'
import { type Normalizer, normalizerOf } from './tokenizer/normalizers.js'
import { Unsupported } from './tokenizer/pattern.js'
import { type PostProcessor, postProcessorOf } from './tokenizer/post-processors.js'
import { type PreTokenizer, preTokenizerOf } from './tokenizer/pre-tokenizers.js'
import { definitionOf, type Json, optionalJson, roleId } from './tokenizer-files.js'

export interface EncodedText {
  /** token ids, without special tokens of the template */
  ids: number[]
  /** UTF-16 offset of the first character of each token; a token of the prefix space starts where its text starts */
  starts: number[]
}

/** The parts of a tokenizer.json. */
interface Pipeline {
  normalize: Normalizer
  preTokenize: PreTokenizer
  bpe: Bpe
  addSpecial: PostProcessor
  decode: Decoder
}

/** @throws Unsupported naming the part */
function addedOf(tokens: unknown): AddedToken[] {
  const wrong = (at: string, expected: string, got: unknown): Unsupported => new Unsupported(at, expected, show(got))
  if (!Array.isArray(tokens ?? [])) throw wrong('added_tokens', 'an array', tokens)
  return ((tokens ?? []) as AddedToken[]).map((t, i) => {
    const { id, content, special } = t ?? {}
    if (!Number.isInteger(id) || id < 0) throw wrong(`added_tokens[${i}].id`, 'a whole number', id)
    if (typeof content !== 'string') throw wrong(`added_tokens[${i}].content`, 'a text', content)
    // A `normalized` special token can never match behind a normalizer that prepends, so an end token in the text would
    // silently become letters; transformers registers special tokens as not normalized for the same reason.
    return special ? { ...t, normalized: false } : t
  })
}

/** @throws Unsupported naming the part */
function pipelineOf(d: Json, where: string): Pipeline {
  return {
    normalize: normalizerOf(d.normalizer as Json),
    preTokenize: preTokenizerOf(d.pre_tokenizer as Json),
    bpe: new Bpe((d.model ?? {}) as Json, where),
    addSpecial: postProcessorOf(d.post_processor as Json),
    decode: decoderOf(d.decoder as Json),
  }
}

export class Tokenizer {
  /** one more than the largest id */
  readonly vocabSize: number
  readonly #parts: Pipeline
  readonly #raw: AddedTokens
  readonly #normalized: AddedTokens
  readonly #added: ReadonlyMap<string, number>
  readonly #addedTexts: ReadonlyMap<number, string>
  readonly #roles: Record<'bos' | 'eos' | 'pad' | 'unk', number | null>
  readonly #where: string
  readonly #specialIds: Set<number>
  /** special tokens but for the one that stands for everything unknown */
  readonly #notUnknown: Set<number>
  /** whether a text is merged word by word, for speed: the tokens are the same */
  readonly splitWords: boolean
  #anchor: { id: number; text: string } | undefined

  /**
   * @param definition structure of tokenizer.json
   * @param config tokenizer_config.json and special_tokens_map.json: names of bos, eos, pad, unk
   * @param model config.json: ids of bos, eos, pad when the names are not given
   * @param where name for messages
   */
  constructor(definition: Json, config: Json[] = [], model: Json = {}, where = 'tokenizer') {
    this.#where = where
    const d = definition
    let added: AddedToken[]
    try {
      added = addedOf(d.added_tokens)
      this.#parts = pipelineOf(d, where)
    } catch (e) {
      if (e instanceof Unsupported)
        throw mismatch('ERR_FORMAT', 'tokenizer', `${where}: ${e.where}`, e.expected, e.got, e)
      throw mismatch('ERR_FORMAT', 'tokenizer', where, 'a tokenizer.json that can be used', String(e), e)
    }
    const { bpe, normalize } = this.#parts
    this.#added = new Map(added.map((t) => [t.content, t.id]))
    this.#raw = new AddedTokens(added.filter((t) => !t.normalized))
    const normalized = (t: AddedToken): string => normalize(new AlignedText(t.content, 0)).text
    // Decoding gives what is looked for.
    this.#addedTexts = new Map(added.map((t) => [t.id, t.normalized ? normalized(t) : t.content]))
    this.#normalized = new AddedTokens(
      added.filter((t) => t.normalized),
      normalized,
    )
    let largest = -1
    for (const id of [...bpe.vocab.values(), ...this.#added.values()]) if (id > largest) largest = id
    this.vocabSize = largest + 1
    // A text without pre-tokenization is one huge word. Where no piece crosses from a letter to a ▁, merging word by word
    // gives the same result, and words repeat.
    const whole = d.pre_tokenizer == null || (d.pre_tokenizer as Json).type === 'Metaspace'
    this.splitWords = whole && bpe.splitsAtMarks
    const id = (role: string): number | null => roleId(role, config, model, (t) => this.tokenToId(t))
    this.#roles = { bos: id('bos'), eos: id('eos'), pad: id('pad'), unk: id('unk') }
    const special = added.filter((t) => t.special)
    this.#specialIds = new Set(special.map((t) => t.id))
    this.#notUnknown = new Set(special.filter((t) => t.content !== bpe.unkToken).map((t) => t.id))
  }

  /**
   * Loads the tokenizer of a model folder.
   * @throws AlignGPTError ERR_FORMAT when no tokenizer file is there or it cannot be used
   */
  static load(folder: string): Tokenizer {
    const config = optionalJson(path.join(folder, 'tokenizer_config.json'))
    const map = optionalJson(path.join(folder, 'special_tokens_map.json'))
    const model = optionalJson(path.join(folder, 'config.json'))
    return new Tokenizer(definitionOf(folder, config), [config, map], model, folder)
  }

  #role(name: 'bos' | 'eos'): number {
    const id = this.#roles[name]
    if (id === null) throw mismatch('ERR_CONFIG', 'tokenizer', `${this.#where}: ${name}_token`, 'a token', 'none')
    return id
  }
  /** @throws AlignGPTError ERR_CONFIG when the tokenizer has none */
  get bosId(): number {
    return this.#role('bos')
  }
  /** @throws AlignGPTError ERR_CONFIG when the tokenizer has none */
  get eosId(): number {
    return this.#role('eos')
  }
  /** Padding id; the unknown or end token where none is named. */
  get padId(): number {
    return this.#roles.pad ?? this.#roles.unk ?? this.eosId
  }
  /** Text of the end token, such as `</s>`. */
  get eosToken(): string {
    return this.idToToken(this.eosId) as string
  }
  tokenToId(token: string): number | undefined {
    return this.#added.get(token) ?? this.#parts.bpe.vocab.get(token)
  }
  idToToken(id: number): string | undefined {
    return this.#addedTexts.get(id) ?? this.#parts.bpe.tokens.get(id)
  }

  /** The tokens of one word; with `plain` a special token that merging has put together is taken apart again. */
  #word(word: string, plain: boolean): EncodedWord {
    const { bpe } = this.#parts
    const found = bpe.encode(word)
    if (!plain || found.bytes || !found.ids.some((id) => this.#notUnknown.has(id))) return found
    const apart = { ids: [] as number[], lengths: [] as number[], bytes: false }
    let at = 0
    for (const [k, id] of found.ids.entries()) {
      const text = word.slice(at, at + found.lengths[k])
      at += found.lengths[k]
      const parts = this.#notUnknown.has(id)
        ? Array.from(text, (c) => bpe.encode(c))
        : [{ ids: [id], lengths: [found.lengths[k]] }]
      for (const p of parts) {
        apart.ids.push(...p.ids)
        apart.lengths.push(...p.lengths)
      }
    }
    return apart
  }

  /** Appends the tokens of a word, and where each comes from. */
  #put(word: AlignedText, out: number[], starts: number[] | undefined, plain: boolean): void {
    const { ids, lengths, bytes } = this.#word(word.text, plain)
    for (const id of ids) out.push(id)
    if (!starts) return
    const units = bytes ? unitsOfBytes(word.text) : null
    let at = 0
    for (const length of lengths) {
      starts.push(word.at(units ? units[at] : at))
      at += length
    }
  }

  /** Ids of every section; with `starts` the UTF-16 offset of each. `literal` as encodeWithOffsets has it. */
  #ids(text: string, starts?: number[], literal: readonly Range[] = []): number[] {
    const { normalize, preTokenize } = this.#parts
    const out: number[] = []
    const one = (id: number, start: number): void => {
      out.push(id)
      starts?.push(start)
    }
    for (const section of this.#raw.split(text, literal)) {
      if (section.token) {
        one(section.token.id, section.from)
        continue
      }
      const target = normalize(new AlignedText(text.slice(section.from, section.to), section.from))
      for (const { from, to, token } of this.#normalized.split(target.text)) {
        if (token) {
          one(token.id, target.at(from))
          continue
        }
        for (const word of preTokenize([target.slice(from, to)]))
          for (const part of this.splitWords ? atMarks(word) : [word]) this.#put(part, out, starts, literal.length > 0)
      }
    }
    return out
  }

  /**
   * Token ids of a text. Special tokens written in the text are recognised, as the Rust library does by default.
   * @param options.addSpecialTokens whether the template's tokens (BOS, ...) are added; default true
   */
  encode(text: string, options: { addSpecialTokens?: boolean } = {}): number[] {
    const ids = this.#ids(text)
    return options.addSpecialTokens === false ? ids : this.#parts.addSpecial(ids)
  }

  /**
   * Token ids with the character each token starts at, without template tokens.
   * @param literal ranges of the text in which special tokens are plain text: none of their ids comes out of them
   * @throws AlignGPTError ERR_DATA
   */
  encodeWithOffsets(text: string, literal: readonly Range[] = []): EncodedText {
    const starts: number[] = []
    return { ids: this.#ids(text, starts, literal), starts }
  }

  /**
   * CLIP's text input: [BOS, ..., EOS], cut to `limit` ids with the end token kept.
   * @returns Int32Array of 2..limit ids
   */
  encodeClip(text: string, limit: number): Int32Array {
    if (!Number.isInteger(limit) || limit < 2)
      throw mismatch('ERR_ARGUMENT', 'encodeClip', 'limit', 'at least 2', show(limit))
    const ids = this.encode(text)
    if (ids.length > limit) ids.splice(limit - 1, ids.length, ids[ids.length - 1])
    return Int32Array.from(ids)
  }

  /** Text of token ids; ids outside the vocabulary are left out. */
  decode(ids: Iterable<number>, options: { skipSpecialTokens?: boolean } = {}): string {
    const tokens: string[] = []
    for (const id of ids) {
      const token = options.skipSpecialTokens && this.#specialIds.has(id) ? undefined : this.idToToken(id)
      if (token !== undefined) tokens.push(token)
    }
    return tokens.length ? this.#parts.decode(tokens).join('') : ''
  }

  /** A decoder for ids that arrive one by one. */
  stream(options: { skipSpecialTokens?: boolean } = {}): StreamDecoder {
    this.#anchor ??= this.#findAnchor()
    return new StreamDecoder(this, options, this.#anchor.id < 0 ? null : this.#anchor)
  }

  /** Texts of special tokens that a text holds, in their order: `encode` makes them those tokens. */
  specialTokensIn(text: string): string[] {
    return this.#raw.split(text).flatMap(({ token }) => (token?.special ? [token.content] : []))
  }

  /** Whether an id is a special token (BOS, EOS, ...). */
  isSpecial(id: number): boolean {
    return this.#specialIds.has(id)
  }

  /** A token that is plain letters wherever it stands; id -1 when there is none. */
  #findAnchor(): { id: number; text: string } {
    for (let id = 0; id < this.vocabSize; id++) {
      const token = this.idToToken(id)
      if (!token || this.isSpecial(id) || !/^[A-Za-z]+$/.test(token)) continue
      if (this.decode([id]) === token && this.decode([id, id]) === token + token) return { id, text: token }
    }
    return { id: -1, text: '' }
  }
}

/** The words that begin with a ▁, or follow one. */
function atMarks(word: AlignedText): AlignedText[] {
  const out: AlignedText[] = []
  let from = 0
  for (let i = word.text.indexOf('▁', 1); i > 0; i = word.text.indexOf('▁', i + 1)) {
    if (word.text[i - 1] === '▁') continue
    out.push(word.slice(from, i))
    from = i
  }
  out.push(word.slice(from, word.text.length))
  return out
}

/** For every UTF-8 byte of a text, and the end, the UTF-16 unit of its character. */
function unitsOfBytes(text: string): number[] {
  const out: number[] = []
  let at = 0
  for (const c of text) {
    for (let n = Buffer.byteLength(c); n > 0; n--) out.push(at)
    at += c.length
  }
  return [...out, at]
}

/**
 * Turns arriving token ids into text. Only finished characters leave `push`: bytes of an unfinished UTF-8 sequence wait
 * for the rest. For valid text the pieces put together are `decode` of all ids.
 */
export class StreamDecoder {
  readonly #tokenizer: Tokenizer
  readonly #options: { skipSpecialTokens?: boolean }
  readonly #anchor: { id: number; text: string } | null
  #pending: number[] = []
  #first = true
  constructor(
    tokenizer: Tokenizer,
    options: { skipSpecialTokens?: boolean },
    anchor: { id: number; text: string } | null,
  ) {
    this.#tokenizer = tokenizer
    this.#options = options
    this.#anchor = anchor
  }
  /** Adds a token; returns the text that is complete now (possibly empty). */
  push(id: number): string {
    this.#pending.push(id)
    const text = this.#text()
    // A character has at most four bytes: a fifth token cannot finish one that four did not.
    if (text.endsWith('\ufffd') && this.#pending.length < 4) return ''
    return this.#flush(text)
  }
  /** The rest, once no more tokens come; unfinished bytes become U+FFFD. */
  end(): string {
    return this.#flush(this.#text())
  }
  #text(): string {
    if (this.#first || !this.#anchor) return this.#tokenizer.decode(this.#pending, this.#options)
    // A decoder drops the space of a text's first word; a known token in front keeps it.
    return this.#tokenizer.decode([this.#anchor.id, ...this.#pending], this.#options).slice(this.#anchor.text.length)
  }
  #flush(text: string): string {
    // Skipped special tokens leave the decoder at the start of its text.
    if (this.#pending.some((id) => !(this.#options.skipSpecialTokens && this.#tokenizer.isSpecial(id))))
      this.#first = false
    this.#pending = []
    return text
  }
}

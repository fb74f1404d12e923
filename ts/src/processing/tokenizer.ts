/**
 * Tokenizers of Hugging Face folders: tokenizer.json, tokenizer.model (sentencepiece BPE) or CLIP's vocab.json and
 * merges.txt. Merging and normalising is @huggingface/tokenizers; added here are character offsets of tokens, decoding
 * as the Rust library does it, streaming, and speed for tokenizers that take a whole text as one word.
 */
import path from 'node:path'
import { Tokenizer as Library } from '@huggingface/tokenizers'
import { mismatch, show } from '../util/errors.js'
import { type AddedToken, AddedTokens, type Range, type Section } from './added-tokens.js'
import { definitionOf, type Json, optionalJson, roleId } from './tokenizer-files.js'

export interface EncodedText {
  /** token ids, without special tokens of the template */
  ids: number[]
  /** UTF-16 offset of the first character of each token; a token of the prefix space starts where its text starts */
  starts: number[]
}

/** GPT-2's printable stand-ins for bytes. */
function byteAlphabet(): Map<string, number> {
  const map = new Map<string, number>()
  let extra = 256
  for (let b = 0; b < 256; b++) {
    const printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174
    map.set(String.fromCharCode(printable ? b : extra++), b)
  }
  return map
}
const BYTES = byteAlphabet()
const BYTE_TOKEN = /^<0x([0-9A-F]{2})>$/

/** The Rust library's ByteFallback: a run of byte tokens that is not UTF-8 becomes one U+FFFD for each byte. */
function byteFallback(tokens: string[]): string[] {
  const out: string[] = []
  let run: number[] = []
  const flush = (): void => {
    if (!run.length) return
    try {
      out.push(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(run)))
    } catch {
      out.push('\ufffd'.repeat(run.length))
    }
    run = []
  }
  for (const token of tokens) {
    const m = BYTE_TOKEN.exec(token)
    if (m) run.push(Number.parseInt(m[1], 16))
    else {
      flush()
      out.push(token)
    }
  }
  flush()
  return out
}

/** Replaces the ByteFallback decoder wherever it sits in the library's decoder. */
function patchDecoder(decoder: unknown): void {
  const d = decoder as { config?: Json; decoders?: unknown[]; decode_chain?: (t: string[]) => string[] } | null
  if (!d) return
  if (d.config?.type === 'ByteFallback') d.decode_chain = byteFallback
  for (const child of d.decoders ?? []) patchDecoder(child)
}

export class Tokenizer {
  /** one more than the largest id */
  readonly vocabSize: number
  readonly #library: Library
  readonly #raw: AddedTokens
  readonly #normalized: AddedTokens
  readonly #roles: Record<'bos' | 'eos' | 'pad' | 'unk', number | null>
  readonly #where: string
  readonly #specialIds: Set<number>
  /** texts of special tokens, but for the one that stands for everything unknown */
  readonly #specials: Set<string>
  readonly #byteLevel: boolean
  readonly #metaspace: boolean
  readonly #byteFallback: boolean
  /** whether a text is merged word by word, for speed: the tokens are the same */
  readonly splitWords: boolean
  readonly #surfaces = new Map<string, Uint8Array>()
  #anchor: { id: number; text: string } | undefined

  /**
   * @param definition structure of tokenizer.json
   * @param config tokenizer_config.json and special_tokens_map.json: names of bos, eos, pad, unk
   * @param model config.json: ids of bos, eos, pad when the names are not given
   * @param where name for messages
   */
  constructor(definition: Json, config: Json[] = [], model: Json = {}, where = 'tokenizer') {
    this.#where = where
    const d = definition as { added_tokens?: AddedToken[]; model?: Json; [key: string]: unknown }
    // A `normalized` special token can never match behind a normalizer that prepends, so an end token in the text would
    // silently become letters; transformers registers special tokens as not normalized for the same reason.
    const added = (d.added_tokens ?? []).map((t) => (t.special ? { ...t, normalized: false } : t))
    try {
      const complete = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null, ...d }
      this.#library = new Library({ ...complete, added_tokens: added }, config[0] ?? {})
    } catch (e) {
      throw mismatch('ERR_FORMAT', 'tokenizer', where, 'a tokenizer.json that can be used', String(e), e)
    }
    patchDecoder(this.#library.decoder)
    this.#raw = new AddedTokens(added.filter((t) => !t.normalized))
    this.#normalized = new AddedTokens(added.filter((t) => t.normalized))
    const parts = JSON.stringify([d.normalizer, d.pre_tokenizer, d.decoder])
    this.#byteLevel = parts.includes('"ByteLevel"')
    this.#metaspace = parts.includes('▁')
    this.#byteFallback = d.model?.byte_fallback === true
    const vocab = this.#library.model?.tokens_to_ids ?? new Map<string, number>()
    let largest = -1
    for (const id of vocab.values()) if (id > largest) largest = id
    for (const { id } of added) if (id > largest) largest = id
    this.vocabSize = largest + 1
    // A text without pre-tokenization is one huge word. Where no piece crosses from a letter to a ▁, merging word by word
    // gives the same result, and words repeat.
    const whole = d.pre_tokenizer == null || (d.pre_tokenizer as Json).type === 'Metaspace'
    this.splitWords = whole && this.#metaspace && ![...vocab.keys()].some((t) => /[^▁]▁/.test(t))
    const id = (role: string): number | null => roleId(role, config, model, (t) => this.tokenToId(t))
    this.#roles = { bos: id('bos'), eos: id('eos'), pad: id('pad'), unk: id('unk') }
    const special = added.filter((t) => t.special)
    this.#specialIds = new Set(special.map((t) => t.id))
    this.#specials = new Set(special.map((t) => t.content).filter((t) => t !== d.model?.unk_token))
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
    return this.#library.token_to_id(token)
  }
  idToToken(id: number): string | undefined {
    return this.#library.id_to_token(id)
  }

  /** Tokens of a normalised stretch without added tokens; `index` is the number of the section it lies in. */
  #words(text: string, index: number): string[] {
    const { pre_tokenizer: pre, model } = this.#library
    let words = pre ? pre.pre_tokenize(text, { section_index: index }) : [text]
    if (this.splitWords) words = words.flatMap((w: string) => w.split(/(?<=[^▁])(?=▁)/u))
    // `_call` and not `encode`: it also fuses unknown tokens where the model says so.
    return model ? model._call(words) : words
  }

  /** The same where special tokens are plain text: one that merging has put together is taken apart again. */
  #plainWords(text: string, index: number): string[] {
    const apart = (token: string): string[] => Array.from(token).flatMap((c) => this.#library.model?._call([c]) ?? [c])
    return this.#words(text, index).flatMap((t) => (this.#specials.has(t) ? apart(t) : [t]))
  }

  /** Tokens of every section with the UTF-16 offset of each token when `starts` is given; `literal` as encodeWithOffsets has it. */
  #tokens(text: string, starts?: number[], literal: readonly Range[] = []): string[] {
    const out: string[] = []
    const words = (t: string, index: number): string[] =>
      literal.length ? this.#plainWords(t, index) : this.#words(t, index)
    this.#raw.split(text, literal).forEach((section, index) => {
      if (section.added) {
        out.push(section.text)
        starts?.push(section.start)
        return
      }
      const target = this.#library.normalizer ? this.#library.normalizer.normalize(section.text) : section.text
      const parts = this.#normalized.split(target).map((s) => (s.added ? [s.text] : words(s.text, index)))
      if (starts) this.#align(section, target, parts, starts)
      for (const p of parts) out.push(...p)
    })
    return out
  }

  /** Bytes a token stands for, with ▁ as a space. */
  #surface(token: string): Uint8Array {
    let bytes = this.#surfaces.get(token)
    if (bytes) return bytes
    const byte = this.#byteFallback ? BYTE_TOKEN.exec(token) : null
    if (byte) bytes = Uint8Array.of(Number.parseInt(byte[1], 16))
    else if (this.#byteLevel && Array.from(token).every((c) => BYTES.has(c)))
      bytes = Uint8Array.from(token, (c) => BYTES.get(c) as number)
    else bytes = Buffer.from(this.#metaspace ? token.replaceAll('▁', ' ') : token)
    this.#surfaces.set(token, bytes)
    return bytes
  }

  /**
   * Finds the tokens of a section in its normalised text, byte by byte, and appends the offset of each in the original.
   * @throws AlignGPTError ERR_DATA when they do not match: labels must never be guessed
   */
  #align(section: Section, target: string, parts: string[][], starts: number[]): void {
    const spaced = (s: string): string => (this.#metaspace ? s.replaceAll('▁', ' ') : s)
    const bytes = Buffer.from(spaced(target))
    const source = this.#sourceOffsets(spaced(section.text), spaced(target), bytes.length)
    const unknown = this.#library.model?.unk_token
    const matches = (t: Uint8Array, at: number, from: number): boolean =>
      at + t.length - from <= bytes.length && bytes.compare(t, from, t.length, at, at + t.length - from) === 0
    let pos = 0
    for (const tokens of parts) {
      tokens.forEach((token, i) => {
        const t = this.#surface(token)
        starts.push(section.start + source[Math.min(pos, bytes.length)])
        if (matches(t, pos, 0)) pos += t.length
        // The pre-tokenizer's prefix space is not in the text.
        else if (i === 0 && t[0] === 32 && matches(t, pos, 1)) pos += t.length - 1
        else if (token === unknown) {
          // One or more characters without a token: up to where the next token fits.
          const next = i + 1 < tokens.length ? this.#surface(tokens[i + 1]) : null
          do {
            pos++
          } while (pos < bytes.length && ((bytes[pos] & 0xc0) === 0x80 || !next || !matches(next, pos, 0)))
        } else {
          const got = show(bytes.toString('utf8', pos, pos + 20))
          throw mismatch('ERR_DATA', 'tokenizer', `${this.#where}: offset of token ${show(token)}`, show(token), got)
        }
      })
    }
    if (pos < bytes.length)
      throw mismatch('ERR_DATA', 'tokenizer', `${this.#where}: offsets`, `${bytes.length} bytes`, `${pos}`)
  }

  /** For every byte of the normalised text the UTF-16 offset in the original that it comes from. */
  #sourceOffsets(original: string, target: string, length: number): Int32Array {
    const char = new Int32Array(target.length + 1)
    if (target.length === original.length + 1 && target.endsWith(original))
      for (let i = 1; i <= target.length; i++) char[i] = i - 1
    else if (target === original) for (let i = 1; i <= target.length; i++) char[i] = i
    else this.#normalisedOffsets(original, target, char)
    const out = new Int32Array(length + 1)
    let at = 0
    for (let i = 0; i < target.length; ) {
      const code = target.codePointAt(i) as number
      const n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4
      out.fill(char[i], at, at + n)
      at += n
      i += code > 0xffff ? 2 : 1
    }
    out[length] = original.length
    return out
  }

  /** The slow way for normalizers that change text: normalise every prefix and see how far it reaches. */
  #normalisedOffsets(original: string, target: string, char: Int32Array): void {
    const normalize = (s: string): string => {
      const n = this.#library.normalizer?.normalize(s) ?? s
      return this.#metaspace ? n.replaceAll('▁', ' ') : n
    }
    let reached = 0
    for (let i = 0; i < original.length; ) {
      const next = i + ((original.codePointAt(i) as number) > 0xffff ? 2 : 1)
      const prefix = normalize(original.slice(0, next))
      let n = Math.min(prefix.length, target.length)
      while (n > reached && target.slice(0, n) !== prefix.slice(0, n)) n--
      char.fill(i, reached, n)
      reached = Math.max(reached, n)
      i = next
    }
    char.fill(original.length, reached)
  }

  #idsOf(tokens: string[]): number[] {
    return tokens.map((t) => {
      const id = this.tokenToId(t) ?? this.#library.model?.unk_token_id
      if (id === undefined) throw mismatch('ERR_DATA', 'tokenizer', this.#where, 'a token of the vocabulary', show(t))
      return id
    })
  }

  /**
   * Token ids of a text. Special tokens written in the text are recognised, as the Rust library does by default.
   * @param options.addSpecialTokens whether the template's tokens (BOS, ...) are added; default true
   */
  encode(text: string, options: { addSpecialTokens?: boolean } = {}): number[] {
    const tokens = this.#tokens(text)
    const post = this.#library.post_processor
    if (options.addSpecialTokens === false || !post) return this.#idsOf(tokens)
    return this.#idsOf(post.post_process(tokens, null, true).tokens)
  }

  /**
   * Token ids with the character each token starts at, without template tokens.
   * @param literal ranges of the text in which special tokens are plain text: none of their ids comes out of them
   * @throws AlignGPTError ERR_DATA
   */
  encodeWithOffsets(text: string, literal: readonly Range[] = []): EncodedText {
    const starts: number[] = []
    const ids = this.#idsOf(this.#tokens(text, starts, literal))
    if (ids.length !== starts.length)
      throw mismatch('ERR_DATA', 'tokenizer', 'offsets', `${ids.length}`, `${starts.length}`)
    return { ids, starts }
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
    const known = [...ids].filter(
      (id) => this.idToToken(id) !== undefined && !(options.skipSpecialTokens && this.#specialIds.has(id)),
    )
    if (!known.length) return ''
    return this.#library.decode(known, { clean_up_tokenization_spaces: false })
  }

  /** A decoder for ids that arrive one by one. */
  stream(options: { skipSpecialTokens?: boolean } = {}): StreamDecoder {
    this.#anchor ??= this.#findAnchor()
    return new StreamDecoder(this, options, this.#anchor.id < 0 ? null : this.#anchor)
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

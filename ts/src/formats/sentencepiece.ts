/**
 * A sentencepiece BPE model (`tokenizer.model`) as the structure of a tokenizer.json, the way transformers'
 * LlamaConverter does it, so that one tokenizer implementation serves both files. Format: ModelProto of
 * google/sentencepiece, src/sentencepiece_model.proto.
 */
import { type AlignGPTError, mismatch, show } from '../util/errors.js'

interface Piece {
  text: string
  score: number
  /** NORMAL 1, UNKNOWN 2, CONTROL 3, USER_DEFINED 4, UNUSED 5, BYTE 6 */
  type: number
}

/** Options of tokenizer_config.json that shape the conversion. */
export interface SentencePieceOptions {
  /** Llama's `legacy` flag: true = prefix space before every section, false = before the first alone */
  legacy: boolean
  addBos: boolean
  addEos: boolean
}

const fail = (file: string, what: string, expected: string, got: string): AlignGPTError =>
  mismatch('ERR_FORMAT', 'tokenizer.model', `${file}: ${what}`, expected, got)

/** Walks the fields of one protobuf message: number, wire type, value (number, or bytes for length-delimited). */
function* fields(b: Buffer, file: string): Generator<[number, number | Buffer]> {
  let p = 0
  const need = (n: number): number => {
    if (p + n > b.length) throw fail(file, `byte ${p}`, `${n} more bytes`, `${b.length - p}`)
    p += n
    return p - n
  }
  const varint = (): number => {
    let [v, scale] = [0, 1]
    for (let i = 0; i < 10; i++) {
      const c = b[need(1)]
      v += (c & 127) * scale
      scale *= 128
      if (c < 128) return v
    }
    throw fail(file, `byte ${p}`, 'a varint of at most 10 bytes', 'a longer one')
  }
  while (p < b.length) {
    const tag = varint()
    const wire = tag % 8
    const field = Math.floor(tag / 8)
    if (wire === 0) yield [field, varint()]
    else if (wire === 1) yield [field, b.readDoubleLE(need(8))]
    else if (wire === 5) yield [field, b.readFloatLE(need(4))]
    else if (wire === 2) {
      const n = varint()
      const at = need(n)
      yield [field, b.subarray(at, at + n)]
    } else throw fail(file, `byte ${p}`, 'wire type 0, 1, 2 or 5', `${wire}`)
  }
}

function bytesOf(v: number | Buffer, file: string, what: string): Buffer {
  if (typeof v === 'number') throw fail(file, what, 'bytes', 'a number')
  return v
}

function readPiece(b: Buffer, file: string): Piece {
  const piece: Piece = { text: '', score: 0, type: 1 }
  for (const [field, v] of fields(b, file)) {
    if (field === 1) piece.text = bytesOf(v, file, 'piece').toString('utf8')
    else if (field === 2 && typeof v === 'number') piece.score = v
    else if (field === 3 && typeof v === 'number') piece.type = v
  }
  return piece
}

/**
 * Settings that change ids and that are not read: [message, field, value of one that is, default of the format], of
 * trainer_spec and normalizer_spec.
 */
const REFUSED: Record<number, readonly [name: string, field: number, read: number, usual: number][]> = {
  2: [
    ['model_type', 3, 2, 1],
    ['treat_whitespace_as_suffix', 24, 0, 0],
  ],
  3: [
    ['remove_extra_whitespaces', 4, 0, 1],
    ['escape_whitespaces', 5, 1, 1],
  ],
}

/** Adds the numbers of a message by field; of bytes their length. */
function addNumbers(message: Buffer, file: string, to: Map<number, number>): void {
  for (const [field, v] of fields(message, file)) to.set(field, typeof v === 'number' ? v : v.length)
}

/** Reads pieces and settings. @throws AlignGPTError ERR_FORMAT */
function readModel(b: Buffer, file: string): { pieces: Piece[]; byteFallback: boolean; dummyPrefix: boolean } {
  const pieces: Piece[] = []
  const specs: Record<number, Map<number, number>> = { 2: new Map(), 3: new Map() }
  for (const [field, v] of fields(b, file)) {
    if (field === 1) pieces.push(readPiece(bytesOf(v, file, 'piece'), file))
    else if (field in specs) addNumbers(bytesOf(v, file, 'settings'), file, specs[field])
  }
  for (const [spec, settings] of Object.entries(REFUSED))
    for (const [name, field, read, usual] of settings) {
      const got = specs[Number(spec)].get(field) ?? usual
      const type = name === 'model_type' ? ' (BPE)' : ''
      if (got !== read) throw fail(file, name, `${read}${type}`, `${got}`)
    }
  if (specs[3].get(2)) throw fail(file, 'precompiled_charsmap', 'none (identity)', `${specs[3].get(2)} bytes`)
  if (!pieces.length) throw fail(file, 'pieces', 'at least one', 'none')
  return { pieces, byteFallback: specs[2].get(35) === 1, dummyPrefix: (specs[3].get(3) ?? 1) === 1 }
}

// sentencepiece makes pieces of at most 16 unless told otherwise; every split of one is looked at.
const LONGEST = 1024

/**
 * Merge list of a sentencepiece BPE: every split of a piece into two pieces, best score first (ties: the longer left
 * part, then the longer right part, then the order found), as transformers' generate_merges orders them.
 */
function mergesOf(pieces: Piece[], vocab: Map<string, number>, file: string): [string, string][] {
  const found: { left: string; right: string; score: number; a: number; b: number }[] = []
  for (const { text, score, type } of pieces) {
    if (type !== 1 && type !== 4) continue
    const chars = Array.from(text)
    if (chars.length > LONGEST) throw fail(file, 'a piece', `at most ${LONGEST} characters`, `${chars.length}`)
    const local: typeof found = []
    for (let i = 1; i < chars.length; i++) {
      const [left, right] = [chars.slice(0, i).join(''), chars.slice(i).join('')]
      if (vocab.has(left) && vocab.has(right)) local.push({ left, right, score, a: i, b: chars.length - i })
    }
    const id = (s: string): number => vocab.get(s) as number
    local.sort((x, y) => id(x.left) - id(y.left) || id(x.right) - id(y.right))
    found.push(...local)
  }
  found.sort((x, y) => y.score - x.score || y.a - x.a || y.b - x.b)
  return found.map(({ left, right }) => [left, right])
}

/**
 * Converts the bytes of a tokenizer.model.
 * @returns an object with the structure of tokenizer.json
 * @throws AlignGPTError ERR_FORMAT when it is no BPE model or is damaged
 */
export function fromSentencePiece(b: Buffer, file: string, options: SentencePieceOptions): Record<string, unknown> {
  const { pieces, byteFallback, dummyPrefix } = readModel(b, file)
  const vocab = new Map<string, number>()
  pieces.forEach(({ text }, i) => {
    if (vocab.has(text)) throw fail(file, `piece ${i}`, 'distinct pieces', `${show(text)} twice`)
    vocab.set(text, i)
  })
  const added = pieces.flatMap(({ text, type }, id) =>
    type === 2 || type === 3 || type === 4
      ? [
          {
            id,
            content: text,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: type !== 4,
          },
        ]
      : [],
  )
  const unk = pieces.find((p) => p.type === 2)?.text
  const [bos, eos] = ['<s>', '</s>'].map((t) => ({ SpecialToken: { id: t, type_id: 0 } }))
  const single = [
    ...(options.addBos && vocab.has('<s>') ? [bos] : []),
    { Sequence: { id: 'A', type_id: 0 } },
    ...(options.addEos && vocab.has('</s>') ? [eos] : []),
  ]
  const specials = Object.fromEntries(
    ['<s>', '</s>'].filter((t) => vocab.has(t)).map((t) => [t, { id: t, ids: [vocab.get(t)], tokens: [t] }]),
  )
  const replace = { type: 'Replace', pattern: { String: ' ' }, content: '▁' }
  const legacy = options.legacy || !dummyPrefix
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: added,
    normalizer: legacy
      ? { type: 'Sequence', normalizers: dummyPrefix ? [{ type: 'Prepend', prepend: '▁' }, replace] : [replace] }
      : null,
    pre_tokenizer: legacy ? null : { type: 'Metaspace', replacement: '▁', prepend_scheme: 'first', split: false },
    post_processor: { type: 'TemplateProcessing', single, pair: single, special_tokens: specials },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(dummyPrefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: unk ?? null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: byteFallback,
      ignore_merges: false,
      vocab: Object.fromEntries(vocab),
      merges: mergesOf(pieces, vocab, file),
    },
  }
}

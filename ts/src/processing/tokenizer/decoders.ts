/** Decoders of tokenizer.json (Hugging Face's Rust library, decoders/): tokens back to text. */
import type { Json } from '../tokenizer-files.js'
import { AlignedText } from './aligned-text.js'
import { listOf, patternOf, textOf, Unsupported } from './pattern.js'
import { BYTE_CHARS } from './pre-tokenizers.js'

export type Decoder = (tokens: string[]) => string[]

const BYTE_OF = new Map(BYTE_CHARS.map((c, b) => [c, b]))
const lossy = new TextDecoder('utf-8', { ignoreBOM: true })
const strict = new TextDecoder('utf-8', { ignoreBOM: true, fatal: true })

/** All tokens as bytes; one that is not made of stand-ins alone has its own. */
const byteLevel: Decoder = (tokens) => {
  const parts = tokens.map((t) => {
    const bytes = Array.from(t, (c) => BYTE_OF.get(c))
    return bytes.includes(undefined) ? Buffer.from(t) : Buffer.from(bytes as number[])
  })
  return [lossy.decode(Buffer.concat(parts))]
}

const BYTE_TOKEN = /^<0x([0-9A-Fa-f]{2})>$/

/** A run of byte tokens that is not UTF-8 becomes one U+FFFD for each byte. */
const byteFallback: Decoder = (tokens) => {
  const out: string[] = []
  let run: number[] = []
  const flush = (): void => {
    if (!run.length) return
    try {
      out.push(strict.decode(Uint8Array.from(run)))
    } catch {
      for (const _ of run) out.push('\ufffd')
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

/** Takes up to `start` and `stop` of one character off the ends of every token. */
function strip(content: string, start: number, stop: number): Decoder {
  const one = (token: string): string => {
    const chars = Array.from(token)
    let [from, to] = [0, chars.length]
    while (from < Math.min(start, chars.length) && chars[from] === content) from++
    while (chars.length - to < stop && to > 0 && chars[to - 1] === content) to--
    return chars.slice(from, Math.max(from, to)).join('')
  }
  return (tokens) => tokens.map(one)
}

function metaspace(c: Json, where: string): Decoder {
  const mark = textOf(c.replacement, `${where}.replacement`, '▁')
  const scheme = String(c.prepend_scheme ?? (c.add_prefix_space === false ? 'never' : 'always')).toLowerCase()
  return (tokens) => tokens.map((t, i) => t.replaceAll(mark, i === 0 && scheme !== 'never' ? '' : ' '))
}

/** @param where its path in the file. @throws Unsupported */
export function decoderOf(config: Json | null | undefined, where = 'decoder'): Decoder {
  // Without a decoder tokens are words.
  if (!config) return (tokens) => [tokens.join(' ')]
  switch (config.type) {
    case 'Sequence': {
      const all = listOf<Json>(config.decoders, `${where}.decoders`).map((c, i) => decoderOf(c, `${where}[${i}]`))
      return (tokens) => all.reduce((some, decode) => decode(some), tokens)
    }
    case 'ByteLevel':
      return byteLevel
    case 'ByteFallback':
      return byteFallback
    case 'Fuse':
      return (tokens) => [tokens.join('')]
    case 'Strip':
      return strip(textOf(config.content, `${where}.content`, ' '), Number(config.start ?? 0), Number(config.stop ?? 0))
    case 'Metaspace':
      return metaspace(config, where)
    case 'Replace': {
      const pattern = patternOf(config.pattern, `${where}.pattern`)
      const content = textOf(config.content, `${where}.content`)
      return (tokens) => tokens.map((t) => new AlignedText(t, 0).replace(pattern, content).text)
    }
    case 'BPEDecoder': {
      const suffix = textOf(config.suffix, `${where}.suffix`)
      return (tokens) => tokens.map((t, i) => t.replaceAll(suffix, i === tokens.length - 1 ? '' : ' '))
    }
  }
  const known = 'Sequence, ByteLevel, ByteFallback, Fuse, Strip, Metaspace, Replace or BPEDecoder'
  throw new Unsupported(`${where}.type`, known, String(config.type))
}

/** Post-processors of tokenizer.json: which special tokens stand around a text. */
import { show } from '../../util/errors.js'
import type { Json } from '../tokenizer-files.js'
import { listOf, Unsupported } from './pattern.js'

export type PostProcessor = (ids: number[]) => number[]

const isId = (v: unknown): boolean => Number.isInteger(v) && (v as number) >= 0

function template(c: Json, where: string): PostProcessor {
  const special = (c.special_tokens ?? {}) as Record<string, { ids: number[] }>
  const single = listOf<{ SpecialToken?: { id: string }; Sequence?: unknown }>(c.single, `${where}.single`)
  for (const { SpecialToken: t } of single) {
    const ids: unknown = t && special[t.id]?.ids
    if (t && !(Array.isArray(ids) && ids.every(isId)))
      throw new Unsupported(`${where}.special_tokens`, `the ids of ${show(t.id)}`, show(ids ?? 'none'))
  }
  return (ids) => single.flatMap(({ SpecialToken: t }) => (t ? special[t.id].ids : ids))
}

/** @param where its path in the file. @throws Unsupported */
export function postProcessorOf(config: Json | null | undefined, where = 'post_processor'): PostProcessor {
  if (!config) return (ids) => ids
  switch (config.type) {
    case 'Sequence': {
      const all = listOf<Json>(config.processors, `${where}.processors`).map((c, i) =>
        postProcessorOf(c, `${where}[${i}]`),
      )
      return (ids) => all.reduce((some, add) => add(some), ids)
    }
    case 'ByteLevel':
      return (ids) => ids // offsets alone
    case 'TemplateProcessing':
      return template(config, where)
    case 'BertProcessing':
    case 'RobertaProcessing': {
      const [cls, sep] = [config.cls, config.sep].map((t) => (t as [string, number] | undefined)?.[1] as number)
      if (!isId(cls) || !isId(sep))
        throw new Unsupported(where, 'cls and sep, each a text and an id', show([config.cls, config.sep]))
      return (ids) => [cls, ...ids, sep]
    }
  }
  const known = 'Sequence, ByteLevel, TemplateProcessing, BertProcessing or RobertaProcessing'
  throw new Unsupported(`${where}.type`, known, String(config.type))
}

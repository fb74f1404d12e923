/** Post-processors of tokenizer.json: which special tokens stand around a text. */
import type { Json } from '../tokenizer-files.js'
import { Unsupported } from './pattern.js'

export type PostProcessor = (ids: number[]) => number[]

function template(c: Json, where: string): PostProcessor {
  const special = (c.special_tokens ?? {}) as Record<string, { ids: number[] }>
  const single = (c.single ?? []) as { SpecialToken?: { id: string }; Sequence?: unknown }[]
  for (const { SpecialToken: t } of single)
    if (t && !Array.isArray(special[t.id]?.ids))
      throw new Unsupported(`${where}.special_tokens`, `the ids of ${t.id}`, 'none')
  return (ids) => single.flatMap(({ SpecialToken: t }) => (t ? special[t.id].ids : ids))
}

/** @param where its path in the file. @throws Unsupported */
export function postProcessorOf(config: Json | null | undefined, where = 'post_processor'): PostProcessor {
  if (!config) return (ids) => ids
  switch (config.type) {
    case 'Sequence': {
      const all = ((config.processors ?? []) as Json[]).map((c, i) => postProcessorOf(c, `${where}[${i}]`))
      return (ids) => all.reduce((some, add) => add(some), ids)
    }
    case 'ByteLevel':
      return (ids) => ids // offsets alone
    case 'TemplateProcessing':
      return template(config, where)
    case 'BertProcessing':
    case 'RobertaProcessing': {
      const [cls, sep] = [config.cls, config.sep].map((t) => (t as [string, number])[1])
      return (ids) => [cls, ...ids, sep]
    }
  }
  const known = 'Sequence, ByteLevel, TemplateProcessing, BertProcessing or RobertaProcessing'
  throw new Unsupported(`${where}.type`, known, String(config.type))
}

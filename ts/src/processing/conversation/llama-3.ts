/**
 * llama_3, the Llama 3 chat template (LLaVA-NeXT's LLAMA_3 style); BOS comes from the tokenizer. Contents are stripped.
 */
import { type Conversation, content, markup, type Prepared, question } from './turns.js'

const header = (role: string): string => `<|start_header_id|>${role}<|end_header_id|>\n\n`
const render: Conversation['render'] = (p, i) => {
  const value = p.turns[i].value.trim()
  const stripped: Prepared = { ...p, turns: p.turns.map((t, k) => (k === i ? { ...t, value } : t)) }
  const end = '<|eot_id|>'
  if (p.turns[i].from === 'gpt') return [markup(header('assistant')), content(value, true), markup(end, true)]
  const system = i === 0 && p.system ? [markup(header('system')), content(p.system.trim()), markup(end)] : []
  return question(stripped, i, [...system, markup(header('user'))], end)
}

export const llama3: Conversation = {
  system:
    'You are a helpful language and vision assistant. ' +
    'You are able to understand the visual content that the user provides, ' +
    'and assist the user with a variety of tasks using natural language.',
  render,
  open: header('assistant'),
  ends: ['<|eot_id|>', '<|end_of_text|>'],
}

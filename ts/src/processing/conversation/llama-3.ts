/**
 * llama_3, the Llama 3 chat template (LLaVA-NeXT's LLAMA_3 style); BOS comes from the tokenizer. Contents are stripped.
 */
import { type Conversation, type Prepared, question } from './turns.js'

const header = (role: string): string => `<|start_header_id|>${role}<|end_header_id|>\n\n`
const render: Conversation['render'] = (p, i) => {
  const value = p.turns[i].value.trim()
  const stripped: Prepared = { ...p, turns: p.turns.map((t, k) => (k === i ? { ...t, value } : t)) }
  const system = i === 0 && p.system ? `${header('system')}${p.system.trim()}<|eot_id|>` : ''
  return p.turns[i].from === 'human'
    ? question(stripped, i, system + header('user'), '<|eot_id|>')
    : [
        { text: header('assistant'), loss: false },
        { text: `${value}<|eot_id|>`, loss: true },
      ]
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

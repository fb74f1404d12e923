/**
 * vicuna_v1, LLaVA's TWO style: `SYSTEM USER: q ASSISTANT: a</s>USER: q2 ...`. The space before an answer belongs to it.
 */
import { type Conversation, content, markup, question } from './turns.js'

const render: Conversation['render'] = (p, i, eos) =>
  p.turns[i].from === 'human'
    ? question(p, i, i === 0 ? [content(p.system), markup(' USER: ')] : [markup('USER: ')], ' ')
    : [markup('ASSISTANT:'), markup(' ', true), content(p.turns[i].value, true), markup(eos, true)]

export const vicunaV1: Conversation = {
  system:
    'A chat between a curious user and an artificial intelligence assistant. ' +
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
  render,
  open: 'ASSISTANT:',
  ends: [],
}

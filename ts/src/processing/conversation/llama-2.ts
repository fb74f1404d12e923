/** llama_2, LLaVA's LLAMA_2 style: `[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nq [/INST] a </s><s>[INST] q2 [/INST] a2 </s>`. */
import { type Conversation, content, markup, question } from './turns.js'

const render: Conversation['render'] = (p, i, eos) => {
  if (p.turns[i].from === 'gpt') return [markup(' ', true), content(p.turns[i].value, true), markup(` ${eos}`, true)]
  const start = markup(`${i === 0 ? '' : '<s>'}[INST] `)
  const system = i === 0 && p.system ? [markup('<<SYS>>\n'), content(p.system), markup('\n<</SYS>>\n\n')] : []
  return question(p, i, [start, ...system], ' [/INST]')
}

export const llama2: Conversation = {
  system:
    'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  ' +
    'Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. ' +
    'Please ensure that your responses are socially unbiased and positive in nature.\n\n' +
    'If a question does not make any sense, or is not factually coherent, explain why instead of answering something ' +
    "not correct. If you don't know the answer to a question, please don't share false information.",
  render,
  open: '',
  ends: [],
}

/** What the gate does: several questions about a picture in one batch, answered with its weights and with one level alone. */

import path from 'node:path'
import { AlignGPT } from 'aligngpt'

const base = path.resolve('ts/test/golden/base')
const image = `${base}/images/a00.png`
const folder = process.argv[2] // one of your own, as `model.save` writes it
const model = folder
  ? await AlignGPT.load(folder)
  : await AlignGPT.create({ llm: `${base}/model/llm`, clip: `${base}/model/clip`, levels: 8 })

const questions = ['What is this?', 'Which colour is it?', 'Are there shapes in the picture?']
const requests = questions.map((prompt) => ({ prompt, image }))
const gated = await model.generateBatch(requests, { maxNewTokens: 8 })
for (const [i, { text, alpha }] of gated.entries()) {
  const shares = alpha?.slice(0, -1).map((a) => a.toFixed(2)) // the last one is the global vector's, always 1
  console.log(questions[i], '->', text, '| weights', shares?.join(' '))
}

for (const level of [0, model.levels - 1]) {
  const [first] = await model.generateBatch(requests.slice(0, 1), { maxNewTokens: 8, mix: { mode: 'level', level } })
  console.log(`level ${level} alone:`, first.text)
}
model.dispose()

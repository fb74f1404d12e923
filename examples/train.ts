/** Both phases and an answer, on the reference models and pictures of the tests: replace the paths by your own. */
import path from 'node:path'
import { AlignGPT, evaluate, finetune, levels, loadDataset, pretrain } from 'aligngpt'

const base = path.resolve('ts/test/golden/base')
const out = path.resolve(process.argv[2] ?? 'runs/example')
const images = path.join(base, 'images')

const model = await AlignGPT.create(
  { llm: `${base}/model/llm`, clip: `${base}/model/clip`, levels: 8 },
  { device: 'auto' },
)
const pairs = await loadDataset(`${base}/data_phase1.json`, { images })
const scored = await levels(pairs, model, { buckets: 'width', write: false })
console.log('pairs of each level', scored.histogram)
await pretrain(model, pairs, { out: `${out}/pretrain`, batch: 7, lr: 1e-3, onStep: (s) => console.log(s.step, s.loss) })
await finetune(model, await loadDataset(`${base}/data_phase2.json`, { images }), {
  out: `${out}/finetune`,
  batch: 4,
  epochs: 3,
})
for await (const piece of model.generate({ image: `${images}/a00.png`, prompt: 'What is this?', maxNewTokens: 8 }))
  process.stdout.write(piece.text)
const questions = [{ id: '1', image: 'a00.png', question: 'Are there shapes?', answer: 'Yes' }]
console.log('\naccuracy', (await evaluate(model, questions, { images, blind: false })).accuracy)
await model.save(`${out}/model`)
model.dispose()

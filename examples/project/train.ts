/** Both phases on pictures of your own, and a question: `npm run train`. */
import { AlignGPT, finetune, levels, loadDataset, pretrain } from 'aligngpt'

const images = 'data/pictures'
const models = { llm: 'models/llm', clip: 'models/clip' } // Hugging Face folders, say Vicuna and CLIP ViT-L/14-336
const onStep = (s: { step: number; loss: number }) => console.log(`step ${s.step + 1} loss ${s.loss.toFixed(4)}`)

const model = await AlignGPT.create({ ...models, levels: 4 }, { device: 'auto' })

const pairs = await loadDataset('data/pairs.json', { images })
const { histogram } = await levels(pairs, model) // writes `similarity` into the file
console.log(`pairs of each level: ${histogram.join(' ')}`)
await pretrain(model, pairs, { batch: 5, epochs: 2, lr: 1e-3, onStep })

const instructions = await loadDataset('data/instructions.json', { images })
await finetune(model, instructions, { batch: 5, epochs: 4, lr: 1e-3, onStep })

for await (const piece of model.generate({ image: `${images}/cat.png`, prompt: 'What is this?', maxNewTokens: 8 }))
  process.stdout.write(piece.text)
await model.save('my-aligngpt')
model.dispose()
console.log('\nsaved to my-aligngpt')

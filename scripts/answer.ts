/**
 * The picture of the README: an image, a question, what a model answers, and its gate.
 * `npx tsx scripts/answer.ts MODEL IMAGE QUESTION docs/answer.png`, with model and image of `npm run quickstart`.
 */
import { AlignGPT } from 'aligngpt'
import sharp from 'sharp'

const [folder, image, question, out] = process.argv.slice(2)
if (!out) throw new Error('usage: answer.ts MODEL IMAGE QUESTION OUT.png')

const model = await AlignGPT.load(folder)
const [{ text, alpha }] = await model.generateBatch([{ image, prompt: question }], { maxNewTokens: 16 })
model.dispose()
if (!alpha) throw new Error(`[answer] model: expected one with a gate, got ${folder}`)

const WIDTH = 760
const HEIGHT = 280
const PHOTO = 216
const LEFT = 290 // of the text
const BAR = { left: LEFT + 66, width: 330, height: 14, top: 110, step: 18 }

const escaped = (s: string): string => s.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
const label = (i: number): string => (i === alpha.length - 1 ? 'global' : `level ${i}`)
const bars = alpha.map((weight, i) => {
  const y = BAR.top + i * BAR.step
  const colour = i === alpha.length - 1 ? '#8a94a6' : '#2f6fdb'
  const width = weight * BAR.width
  return `<text x="${BAR.left - 10}" y="${y + 12}" text-anchor="end" class="small">${label(i)}</text>
<rect x="${BAR.left}" y="${y}" width="${width.toFixed(1)}" height="${BAR.height}" rx="2" fill="${colour}"/>
<text x="${(BAR.left + width + 6).toFixed(1)}" y="${y + 12}" class="small">${weight.toFixed(2)}</text>`
})
const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}">
<style>text{font-family:DejaVu Sans,Arial,sans-serif;font-size:16px;fill:#1d2433}
.grey{fill:#5b6577;font-size:14px}.bold{font-weight:bold;font-size:20px}.small{font-size:12px;fill:#3a4353}</style>
<rect x="1" y="1" width="${WIDTH - 2}" height="${HEIGHT - 2}" rx="12" fill="#fff" stroke="#d5dae3"/>
<text x="${LEFT}" y="42" class="grey">${escaped(question)}</text>
<text x="${LEFT}" y="70" class="bold">${escaped(text.trim())}</text>
<text x="${LEFT}" y="98" class="grey">weights of the alignment vectors, chosen by the gate</text>
${bars.join('\n')}
</svg>`

const SCALE = 2 // for sharp screens
const photo = await sharp(image)
  .resize(PHOTO * SCALE, PHOTO * SCALE, { fit: 'contain', background: '#fff' })
  .toBuffer()
await sharp(Buffer.from(svg), { density: 72 * SCALE })
  .composite([{ input: photo, left: 32 * SCALE, top: ((HEIGHT - PHOTO) / 2) * SCALE }])
  .png({ palette: true, quality: 90 })
  .toFile(out)
console.log(`${question} ${text.trim()}\n${alpha.map((a, i) => `${label(i)} ${a.toFixed(3)}`).join(', ')}\n${out}`)

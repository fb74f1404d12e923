import { spawnSync } from 'node:child_process'
import { expect, test } from 'vitest'

/** Every value of every public entry; types are in types.ts. */
const ENTRIES: Record<string, string[]> = {
  aligngpt: ['AlignGPT', 'AlignGPTError', 'evaluate', 'finetune', 'levels', 'loadDataset', 'plan', 'pretrain'],
  'aligngpt/core': [
    ...['AdamW', 'Rng', 'Tensor', 'backward', 'cosineRate', 'cpuInfo', 'memory', 'nn', 'noGrad', 'ops', 'permutation'],
    ...['resolveDevice', 'scope', 'tensor', 'zeros'],
  ],
  'aligngpt/data': [
    ...['Dataset', 'IGNORE', 'PROBLEMS', 'augment', 'bucketLevels', 'checkDataset', 'decodeImage', 'encodePieces'],
    ...['normaliseInto', 'normaliseTable', 'preprocessImage', 'render', 'writeLevels'],
  ],
  'aligngpt/train': [
    ...['PRESETS', 'addLora', 'evaluateLoss', 'findCheckpoint', 'largestMicroBatch', 'listCheckpoints', 'loadAdapter'],
    ...['mergeLora', 'saveAdapter', 'shuffled', 'train', 'verifyCheckpoint'],
  ],
  'aligngpt/models': [
    ...['CLIPModel', 'Tokenizer', 'clipScores', 'createClip', 'createLanguageModel', 'hiddenStates', 'loadClip'],
    ...['readPreprocessor', 'saveTokenizer', 'saveWeights', 'trainBpe', 'trainClipBpe'],
  ],
  'aligngpt/report': ['CHART_STYLE', 'PAGE_STYLE', 'escapeHtml', 'htmlPage', 'lineChart'],
  'aligngpt/convert': ['downloadRepo', 'exportModel', 'importModel'],
}
const file = (entry: string): string =>
  entry === 'aligngpt' ? '../src/index.ts' : `../src/entries/${entry.slice('aligngpt/'.length)}.ts`

for (const [entry, names] of Object.entries(ENTRIES))
  test(`${entry} exports what it says`, async () => {
    expect(Object.keys(await import(file(entry))).sort()).toEqual([...names].sort())
  })

test('each name is in one entry', () => {
  const all = Object.values(ENTRIES).flat()
  expect(all).toHaveLength(new Set(all).size)
})

test.each(['evaluate', 'hub', 'plan'])('aligngpt/%s still works and says that it has moved', (name) => {
  const url = new URL(`../src/entries/${name}.ts`, import.meta.url).href
  const code = `const m = await import(${JSON.stringify(url)}); console.log(Object.keys(m).length > 0)`
  const args = ['--import', 'tsx', '--input-type=module', '-e', code]
  const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' })
  expect(stdout.trim()).toBe('true')
  expect(stderr).toMatch(new RegExp(`DeprecationWarning: aligngpt/${name} has moved to aligngpt`))
})

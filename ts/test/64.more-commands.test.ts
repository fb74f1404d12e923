/** The commands around training: plan, generate, eval. */
import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const root = new URL('../..', import.meta.url)
const golden = fileURLToPath(new URL('golden/wide/model/', import.meta.url))

function aligngpt(...args: string[]): Promise<{ status: number | null; out: string; err: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], { cwd: root })
    let [out, err] = ['', '']
    child.stdout.on('data', (d) => (out += d))
    child.stderr.on('data', (d) => (err += d))
    child.on('close', (status) => resolve({ status, out, err }))
  })
}

test('plan: sizes of a preset and of folders, what fits, exit statuses', async () => {
  const usual = ['--dtype', 'bf16', '--recompute', '--text-tokens', '63']
  const compact = ['--optimizer-state', 'compact']
  const [seven, little, model, folders, neither, adapters] = await Promise.all([
    aligngpt('plan', '--preset', '7b', ...usual, ...compact, '--memory', '80G', '--json'),
    aligngpt('plan', '--preset', '13b', ...usual, '--memory', '80G'),
    aligngpt('plan', '--model', `${golden}aligngpt`, '--clip', `${golden}clip`, '--json'),
    aligngpt('plan', '--llm', `${golden}llm`, '--clip', `${golden}clip`, '--phase', 'pretrain'),
    aligngpt('plan', '--dtype', 'bf16'),
    aligngpt('plan', '--preset', '7b', ...usual, '--lora-rank', '128', '--memory', '80G', '--json'),
  ])
  expect(seven.status, seven.err).toBe(0)
  const { plan, options, largestMicroBatch, memory } = JSON.parse(seven.out)
  // Vicuna 7B, ViT-L/14-336, projector, table and gate: as in 41.plan.test.ts
  expect(plan.parameters).toBe(6_738_415_616 + 303_507_456 + 20_979_712 + 8 * 4096 + 256 * 577 + 7 * 257)
  expect([memory, options.microBatch]).toEqual([80 * 2 ** 30, largestMicroBatch])
  expect(plan.peak).toBeLessThanOrEqual(memory)
  const low = JSON.parse(adapters.out)
  expect(low.plan.trainable).toBeLessThan(plan.trainable / 10)
  expect(low.largestMicroBatch).toBeGreaterThan(largestMicroBatch)

  expect(little.status).toBe(1) // 18 bytes for each of 13 billion
  expect(little.out).toMatch(/^finetune, bf16, 1 x 63 .*\n13\d{3}\.\d M parameters/)
  expect(little.out).toMatch(/largest micro-batch in 80\.00 GiB: 0\n/)
  expect(little.err).toMatch(/^ERR_MEMORY \[plan\] step: expected at most 80\.00 GiB, got 2\d\d\.\d\d GiB\n$/)

  expect(model.status, model.err).toBe(0)
  expect(JSON.parse(model.out)).toMatchObject({
    largestMicroBatch: null,
    options: { phase: 'finetune', microBatch: 1 },
  })
  expect(folders.status, folders.err).toBe(0)
  expect(folders.out).toMatch(/^pretrain, f32, 1 x \d+ text tokens/)
  expect(neither.status).toBe(2)
  expect(neither.err).toContain('--preset NAME, --model DIR, or --llm DIR with --clip DIR')
})

/** Every op at every CPU level of this machine, see specs.ts and op-checks.ts. */
import { spawnSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'
import { native } from '../src/native.js'
import { cpuLevels } from './cpu-levels.js'
import { specs } from './specs.js'

for (const level of cpuLevels)
  describe(level, () => {
    const run = spawnSync(process.execPath, ['--import', 'tsx', 'ts/test/op-checks.ts'], {
      cwd: new URL('../..', import.meta.url),
      env: { ...process.env, ALIGNGPT_CPU_LEVEL: level },
      encoding: 'utf8',
      maxBuffer: 1 << 26,
    })
    const rows = new Map(
      run.stdout.split('\n').flatMap((line) => {
        if (!line.startsWith('{')) return []
        const row = JSON.parse(line) as { name: string; checks: number; failures: string[] }
        return [[row.name, row] as const]
      }),
    )
    test('the checks ran to the end', () => expect(run.status, run.stderr).toBe(0))
    for (const spec of specs)
      test(spec.name, () => {
        const row = rows.get(spec.name)
        expect(row?.checks).toBeGreaterThan(spec.cases.length)
        expect(row?.failures).toEqual([])
      })
  })

test('every native op has a row', () => {
  const covered = new Set(specs.flatMap((s) => s.covers))
  // tested elsewhere: optimizer, sampling and in-place ops are not functions from tensors to a tensor
  const elsewhere = ['adamw', 'sumSquares', 'sample', 'fill', 'copy', 'random']
  const core = [
    'tensor',
    'write',
    'read',
    'zeros',
    'empty',
    'shape',
    'dtype',
    'readFile',
    'writeFile',
    'fileCall',
    'fileCalls',
    'failFiles',
    'send',
    'receive',
    'exit',
    'scopeBegin',
    'scopeEnd',
    'keep',
    'persist',
    'dispose',
    'isLive',
    'requiresGrad',
    'wantsGrad',
    'detach',
    'setGradEnabled',
    'backward',
    'grad',
    'setGrad',
    'zeroGrad',
    'memory',
    'kernelSeconds',
    'probeCuda',
    'resetPeak',
    'trim',
    'failAfter',
    'capabilities',
    'threads',
    'setThreads',
  ]
  expect(
    Object.keys(native).filter((name) => !covered.has(name) && !elsewhere.includes(name) && !core.includes(name)),
  ).toEqual([])
})

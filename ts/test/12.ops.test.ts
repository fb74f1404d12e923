/** Every op at every CPU level of this machine and on its GPU, see specs.ts and op-checks.ts. */
import { spawnSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'
import { native } from '../src/core/native.js'
import { cpuLevels } from './cpu-levels.js'
import { specs } from './specs/index.js'

const places = [
  ...cpuLevels.map((level) => ({ name: level, device: 'cpu', env: { ALIGNGPT_CPU_LEVEL: level } })),
  ...(typeof native.probeCuda() === 'string' ? [] : [{ name: 'cuda', device: 'cuda', env: {} }]),
]
for (const { name, device, env } of places)
  describe(name, () => {
    const rows = new Map<string, { checks: number; failures: string[] }>()
    test('the checks run to the end', () => {
      const run = spawnSync(process.execPath, ['--import', 'tsx', 'ts/test/op-checks.ts', device], {
        cwd: new URL('../..', import.meta.url),
        env: { ...process.env, ...env },
        encoding: 'utf8',
        maxBuffer: 1 << 26,
      })
      for (const line of run.stdout.split('\n').filter((l) => l.startsWith('{'))) {
        const row = JSON.parse(line)
        rows.set(row.name, row)
      }
      expect(run.status, run.stderr).toBe(0)
    }, 600_000)
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
    'device',
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
    'graphBegin',
    'secondSignalEnds',
    'graphEnd',
    'graphLaunch',
    'graphDispose',
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

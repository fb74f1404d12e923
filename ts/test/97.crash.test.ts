/** Kill -9 and damage, in small: `npm run crash` has the full numbers. */
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { afterAll, expect, test } from 'vitest'
import { crash, damage } from '../../scripts/reliability/campaign.js'

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'crash test '))
afterAll(() => fs.rmSync(scratch, { recursive: true }))

test('killed 12 times, most of them inside a save, the runs come out the same', async () => {
  const report = await crash(scratch, 12, 1, () => {})
  expect(report).toMatchObject({ kills: 12, different: [], unloadable: [] })
  expect(report.insideSave).toBeGreaterThanOrEqual(5)
  expect(report.runs).toBeGreaterThanOrEqual(4)
  expect(report.checkpoints).toBeGreaterThan(15)
})

test('damage of a real checkpoint is seen each time, a whole one raises no alarm', () => {
  const run = fs.readdirSync(scratch).find((n) => n.startsWith('bf16')) as string
  const report = damage(path.join(scratch, run, 'checkpoints'), { flips: 150, cuts: 30, loads: 50, seed: 1 })
  expect(report).toEqual({ flips: 150, cuts: 30, loads: 50, missed: [], falseAlarms: [] })
})

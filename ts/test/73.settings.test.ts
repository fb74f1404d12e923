/** Settings of a run from all places: the table, config files, presets, --set and flags, plan's use of them, completion. */
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command } from 'commander'
import { afterAll, describe, expect, test } from 'vitest'
import { AlignGPT } from '../src/aligngpt.js'
import { candidates, completion } from '../src/cli/commands/completion.js'
import { finetune } from '../src/cli/commands/finetune.js'
import { jobOf, train } from '../src/cli/options.js'
import { flagOf, type Given, resolveSettings, settingsTable } from '../src/cli/settings.js'
import { type Dataset, loadDataset } from '../src/data/dataset.js'
import { PRESETS, SETTINGS, settingsOf, type Values } from '../src/train/run-settings.js'
import { pretrain, type TrainOptions, finetune as tune } from '../src/train/trainer.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const base = fileURLToPath(new URL('golden/base/', import.meta.url))
const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'settings '))
afterAll(() => fs.rmSync(dir, { recursive: true }))
const write = (name: string, text: string): string => {
  fs.writeFileSync(path.join(dir, name), text)
  return path.join(dir, name)
}
const aligngpt = (...args: string[]) =>
  spawnSync(process.execPath, ['--import', 'tsx', 'ts/src/cli.ts', ...args], { cwd: root, encoding: 'utf8' })

// What training takes and a config file cannot say: functions, and what belongs to a program.
type Programs = 'mix' | 'signal' | 'onStep' | 'onEvaluation' | 'onMessage' | 'progress' | 'lora'
const trainOptions: Record<Exclude<keyof TrainOptions, Programs>, true> = {
  ...{ out: true, batch: true, microBatch: true, lr: true, projectorLr: true, epochs: true, steps: true },
  ...{ warmupRatio: true, weightDecay: true, clipGradNorm: true, optimizerState: true, offloadOptimizer: true },
  ...{
    seed: true,
    recompute: true,
    lossNorm: true,
    gateText: true,
    conversation: true,
    groupByLength: true,
    augment: true,
  },
  ...{ workers: true, maxBad: true, saveEvery: true, keep: true, allowLongInterval: true, resume: true },
  ...{ skipOutliers: true, tensorboard: true, evalShare: true, evalData: true, evalImages: true, evalEvery: true },
}

test('every option of training is a setting', () => {
  const keys = new Set(SETTINGS.map((s) => s.key))
  expect(Object.keys(trainOptions).filter((key) => !keys.has(key))).toEqual([])
})

test('docs/config.md has the table', () => {
  const text = fs.readFileSync(path.join(root, 'docs/config.md'), 'utf8')
  expect(text).toContain(settingsTable())
  expect(text.split('\n').filter((line) => line.startsWith('| `')).length).toBe(SETTINGS.length)
})

/** Values of every kind, and of none. */
const VALUES: unknown[] = [
  ...[0, 1, 2, 3, -1, 0.5, 1.5, 1e6, '', 'x', '5', '10m', '1.5h', '0m', '3d', 'linear', 'mlp2x_gelu', 'mlp0x_gelu'],
  ...[true, false, [], ['q_proj'], [1], 'all-linear', {}, { window: 50 }, { window: 0 }, { width: 1 }],
  ...SETTINGS.flatMap((s) => [...(s.kind.choices ?? [])]),
]
const nested = (key: string, value: unknown): Values => {
  const [section, name] = key.split('.')
  return name ? { [section]: { [name]: value } } : { [key]: value }
}
const message = (e: Error): string => e.message
/** What a config file is told of a value; null where it is taken. */
const byFile = (phase: 'pretrain' | 'finetune', key: string, value: unknown): Promise<string | null> =>
  resolveSettings(phase, { config: write('value.json', JSON.stringify(nested(key, value))) }).then(() => null, message)

describe('the library and a config file take the same values', () => {
  const empty = { length: 0, file: 'none' } as unknown as Dataset // accepted options come as far as this
  const byLibrary = async (phase: 'pretrain' | 'finetune', key: string, value: unknown): Promise<string | null> => {
    const given = { out: 'out', ...nested(key, value) } as TrainOptions
    // what a setting has to have beside it, which is another matter
    if (key === 'evalImages') given.evalData = 'x'
    if (key === 'evalEvery') given.evalShare = 0.5
    if (key === 'lr') given.projectorLr = 1e-3
    const run = phase === 'pretrain' ? pretrain : tune
    const said = await run({} as AlignGPT, empty, given).catch(message)
    expect(said).toMatch(/^\[train\] /)
    return said === '[train] none: expected records, got none' ? null : (said as string)
  }
  test.each(SETTINGS.filter((s) => s.of === undefined).map((s) => s.key))('%s', async (key) => {
    let taken = 0
    for (const phase of ['pretrain', 'finetune'] as const)
      for (const value of [...VALUES, null]) {
        const [file, library] = [await byFile(phase, key, value), await byLibrary(phase, key, value)]
        expect([library === null, value, library], `${file}`).toEqual([file === null, value, library])
        if (!settingsOf(phase).some((s) => s.key === key)) continue
        if (library) expect(library.split(': expected ')[1]).toBe(file?.split(': expected ')[1])
        else taken++
      }
    expect(taken).toBeGreaterThan(0)
  })
  // f64 is for the checks of the mathematics, so only the library has it
  const made = SETTINGS.filter((s) => s.of === 'model' && !['model', 'llm', 'clip'].includes(s.key))
  test.each(made.map((s) => s.key))('a new model: %s', async (key) => {
    const model = { llm: path.join(base, 'model/llm'), clip: path.join(base, 'model/clip') }
    let taken = 0
    for (const value of VALUES) {
      const library = await AlignGPT.create({ ...model, [key]: value }).then((m) => m.dispose(), message)
      // how many layers a tower has, only its folder knows
      if (/mm_vision_select_layer: expected -4\.\.3 of 3 layers/.test(String(library))) continue
      expect([await byFile('pretrain', key, value), library ?? null].map((said) => said === null)).toEqual(
        library === undefined ? [true, true] : [false, false],
      )
      taken += Number(library === undefined)
    }
    expect(taken).toBeGreaterThan(0)
  })
  test.for([
    ['warmupRatio', [5, -0.1, 1.01], [0, 0.5, 1]],
    ['lr', [-1e-5, 2, 20], [1e-5, 1]],
    ['projectorLr', [-1, 1.5], [0, 1e-3]],
    ['weightDecay', [-0.1, 10], [0, 0.1]],
    ['clipGradNorm', [0, -1], [0.5, null]],
    ['workers', [-1, 1e6, 0.5], [0, 8]],
    ['maxBad', [1.5, -1], [0, 1]],
    ['skipOutliers', [{ window: 1 }, { window: 2.5 }, { z: 0 }, { warmup: 0 }], [{ window: 50, z: 4 }]],
  ] as const)('%s: only what can be meant', async ([key, refused, taken]) => {
    for (const value of refused) expect(await byFile('finetune', key, value), String(value)).toMatch(/expected .*\d/)
    for (const value of taken) expect(await byFile('finetune', key, value), String(value)).toBeNull()
  })
  test('what has to be there beside a setting is asked for before the model is loaded', async () => {
    const command = new Command().exitOverride().configureOutput({ writeErr: () => {} })
    const flags = { data: 'none', model: 'none', out: path.join(dir, 'never') }
    const refused = (more: Values) => train(command, 'finetune', { ...flags, ...more })
    await expect(refused({ evalEvery: 2 })).rejects.toThrow(
      'evalEvery: expected evalShare or evalData beside it, got 2',
    )
    await expect(refused({ evalImages: 'x', evalShare: 0.5 })).rejects.toThrow(
      'evalImages: expected evalData beside it',
    )
    expect(fs.existsSync(flags.out)).toBe(false)
  })
})

describe('where settings come from', () => {
  const config = write(
    'run.yaml',
    `
    preset: 7b        # counts least
    batch: 64
    lr: 3e-5
    recompute: false
    lora: { rank: 8, alpha: 32 }
    `,
  )
  const given = (g: Given) => resolveSettings('finetune', g)

  test('flag, --set, file, preset, in this order', async () => {
    const s = await given({
      config,
      set: ['lr=4e-5', 'lora.rank=16', 'lora.targets=[q_proj, v_proj]'],
      flags: { lr: 5e-5 },
    })
    expect(s).toMatchObject({
      ...{ batch: 64, lr: 5e-5, recompute: false, dtype: 'bf16', optimizerState: 'compact', groupByLength: true },
      lora: { rank: 16, alpha: 32, targets: ['q_proj', 'v_proj'] },
    })
    expect(await given({ preset: 'tiny', config })).toMatchObject({ augment: true, batch: 64 })
    expect(await given({ preset: 'tiny', config })).not.toHaveProperty('dtype')
    expect(await given({ flags: { loraRank: 4, saveEvery: 5 } })).toEqual({ lora: { rank: 4 }, saveEvery: 5 })
    expect(await given({})).toEqual({})
  })
  test('of two alternatives that from the place that counts more', async () => {
    const config = write('alternatives.yaml', 'preset: 7b\nevalData: dev.jsonl\nsteps: 100')
    const values = await given({ config })
    expect(values).toMatchObject({ evalData: 'dev.jsonl', steps: 100 })
    expect(values).not.toHaveProperty('evalShare')
    const flags = await given({ config, flags: { evalShare: 0.1, epochs: 3 } })
    expect(flags).toMatchObject({ evalShare: 0.1, epochs: 3 })
    expect(flags).not.toHaveProperty('evalData')
    expect(flags).not.toHaveProperty('steps')
  })
  test('presets are settings of their phases', async () => {
    for (const preset of Object.keys(PRESETS))
      for (const phase of ['pretrain', 'finetune'] as const)
        expect(Object.keys(await resolveSettings(phase, { preset })).length).toBeGreaterThan(2)
  })
  test.for([
    ['bach: 8', 'a known key (the nearest: batch), got "bach"'],
    ['saveevery: 8', 'the nearest: saveEvery'],
    ['llm: x', 'a key of finetune, got "llm"'],
    ['lora: { ranc: 8 }', 'the nearest: lora.rank'],
    ['lora: 8', 'values for lora.rank, lora.alpha, lora.targets, got "lora"'],
    ['prest: 7b', 'the nearest: preset'],
    ['batch: 0', 'batch: expected an integer > 0, got 0'],
    ['batch: "8"', 'batch: expected an integer > 0, got "8"'],
    ['dtype: f16', 'dtype: expected f32 or bf16, got "f16"'],
    ['saveEvery: 3d', 'saveEvery: expected steps, or a time such as \'10m\', got "3d"'],
    ['recompute: yes please', 'recompute: expected true or false'],
    ['phase: pretrain', 'phase: expected finetune, got "pretrain"'],
    ['preset: 70b', 'preset: expected tiny, 7b, 13b, got "70b"'],
    ['- batch', 'expected keys and values, got ["batch"]'],
    ['batch: [8', 'expected readable YAML or JSON, got'],
  ])('%s', async ([text, message]) => {
    const file = write('bad.yaml', text)
    const error = await given({ config: file }).catch((e) => e)
    expect(error.code).toBe('ERR_CONFIG')
    expect(error.message).toContain(message)
    expect(error.message).toContain(file)
  })
  test('the same in --set, and files that are not there', async () => {
    await expect(given({ set: ['bach=3'] })).rejects.toThrow(
      '[config] --set: expected a known key (the nearest: batch)',
    )
    await expect(given({ set: ['lora.rank.x=3'] })).rejects.toThrow('(the nearest: lora.rank), got "lora.rank.x"')
    expect(await given({ set: ['preset=tiny'] })).toMatchObject({ augment: true })
    await expect(given({ set: ['batch'] })).rejects.toThrow('--set: expected key=value, got "batch"')
    await expect(given({ config: path.join(dir, 'none.yaml') })).rejects.toThrow('ENOENT')
  })
  test('what a run is made of', async () => {
    const command = new Command().exitOverride().configureOutput({ writeErr: () => {} })
    const made = jobOf(command, 'pretrain', {
      data: 'd',
      llm: 'l',
      clip: 'c',
      levels: 4,
      gate: 'linear',
      out: 'o',
      lr: 1,
    })
    expect(made).toMatchObject({
      ...{ phase: 'pretrain', data: { file: 'd' }, options: { out: 'o', lr: 1 } },
      model: { create: { llm: 'l', clip: 'c', levels: 4, gate: 'linear' } },
    })
    const loaded = jobOf(command, 'finetune', { data: 'd', model: 'm', clip: 'c', lora: { rank: 2 } })
    expect(loaded).toMatchObject({ model: { load: 'm', clip: 'c' }, options: { lora: { rank: 2 } } })
    for (const [phase, settings, message] of [
      ['pretrain', { data: 'd', llm: 'l' }, '--llm and --clip, or --model, are missing'],
      ['pretrain', { data: 'd', model: 'm', levels: 4 }, '--levels does not go with --model'],
      ['finetune', { data: 'd' }, '--model is missing'],
      ['finetune', { model: 'm' }, '--data is missing'],
      ['finetune', { data: 'd', model: 'm', lora: { alpha: 2 } }, '--lora-rank is missing'],
    ] as const)
      expect(() => jobOf(command, phase, { ...settings })).toThrow(message)
  })
})

describe('from the command line', () => {
  const model = path.join(base, 'model/aligngpt')
  const out = path.join(dir, 'run')
  const config = write(
    'tune.json',
    JSON.stringify({
      model,
      data: path.join(base, 'data_phase2.json'),
      images: path.join(base, 'images'),
      batch: 2,
      out,
    }),
  )

  test('a run, and once more from what it wrote down', () => {
    const more = [
      '--conversation',
      'llama_2',
      '--set',
      'lr=1e-3',
      '--steps',
      '3',
      '--seed',
      '7',
      '--set',
      'recompute=true',
      '--no-recompute',
    ]
    const first = aligngpt('finetune', '--config', config, ...more)
    expect(first.status, first.stderr).toBe(0)
    const written = JSON.parse(fs.readFileSync(path.join(out, 'run.json'), 'utf8'))
    expect(written).toMatchObject({ phase: 'finetune', batch: 2, lr: 1e-3, steps: 3, seed: 7, recompute: false, out })
    const again = path.join(dir, 'again')
    const second = aligngpt('finetune', '--config', path.join(out, 'run.json'), '--out', again)
    expect(second.status, second.stderr).toBe(0)
    const weights = [out, again].map((folder) => fs.readFileSync(path.join(folder, 'model.safetensors')))
    expect(weights[1].equals(weights[0])).toBe(true)
    for (const folder of [out, again])
      expect(JSON.parse(fs.readFileSync(path.join(folder, 'config.json'), 'utf8')).conversation).toBe('llama_2')
  })
  test('plan: settings from the file, its steps, a measured time, an interval that comes too late', async () => {
    const records = (await loadDataset(path.join(base, 'data_phase2.json'), { images: path.join(base, 'images') }))
      .length
    const plain = aligngpt('plan', '--config', config)
    expect(plain.status, plain.stderr).toBe(0)
    expect(plain.stdout).toContain(
      `${Math.ceil(records / 2)} steps of 2 samples, ${records} records; time not measured`,
    )
    expect(plain.stdout).toMatch(/decoded pictures, in main memory/)
    const late = aligngpt('plan', '--config', config, '--set', 'saveEvery=50', '--measure')
    expect(late.stdout).toMatch(
      /about .* s: 3 steps measured, .* s each\nwarning: a checkpoint every 50 steps: none before/,
    )
    const json = JSON.parse(aligngpt('plan', '--config', config, '--dtype', 'bf16', '--measure', '--json').stdout)
    expect(json.options.dtype).toBe('bf16')
    expect(json.run).toMatchObject({ records, batch: 2, secondsPerStep: expect.any(Number) })
    const preset = aligngpt('plan', '--config', write('seven.yaml', 'preset: 7b\nphase: pretrain'), '--memory', '80G')
    expect(preset.status, preset.stderr).toBe(0)
    expect(preset.stdout).toMatch(/^pretrain, bf16, 16 x \d+ text tokens and a picture, recompute\n/)
    const both = aligngpt('plan', '--config', write('empty.yaml', 'phase: finetune'), '--preset', '7b')
    expect(both.stdout).toMatch(/^finetune, bf16, 4 x .* recompute\n[\s\S]*\nsteps and time: with a --config/)
    expect(aligngpt('plan', '--preset', '7b', '--set', 'batch=3').stderr).toContain('--set goes with --config')
    expect(aligngpt('plan', '--preset', '7b', '--measure').stderr).toContain(
      'a --config that names the model and the data',
    )
  }, 60_000)
  test('the presets fit into the card they are for', () => {
    for (const preset of ['7b', '13b'])
      for (const phase of ['pretrain', 'finetune']) {
        const file = write(`${preset} ${phase}.yaml`, `preset: ${preset}\nphase: ${phase}`)
        const plan = aligngpt('plan', '--config', file, '--memory', '80G', '--labelled-tokens', '600')
        expect(plan.status, `${preset} ${phase}: ${plan.stderr}`).toBe(0)
      }
  }, 60_000)
})

describe('completion', () => {
  const program = new Command('aligngpt')
  finetune(program)
  completion(program)
  test('commands, flags, choices; files are the shell’s', () => {
    expect(candidates(program, ['f'])).toEqual(['finetune'])
    expect(candidates(program, [''])).toEqual(['finetune', 'completion'])
    expect(candidates(program, ['finetune', '--lora-'])).toEqual(
      settingsOf('finetune')
        .map(flagOf)
        .filter((flag) => flag.startsWith('--lora-')),
    )
    expect(candidates(program, ['finetune', '--dtype', ''])).toEqual(['f32', 'bf16'])
    expect(candidates(program, ['finetune', '--data', ''])).toEqual([])
    expect(candidates(program, ['completion', 'z'])).toEqual(['zsh'])
    expect(candidates(program, ['nothing', '--'])).toEqual([])
  })
  test('bash asks for them', () => {
    const { stdout } = aligngpt('completion', 'bash')
    const call = `aligngpt() { "${process.execPath}" --import tsx ts/src/cli.ts "$@"; }`
    const ask = (words: string): string[] => {
      const list = words.split(' ')
      const script = `${call}\n${stdout}\nCOMP_WORDS=(${list.map((w) => `'${w}'`).join(' ')}); COMP_CWORD=${list.length - 1}; _aligngpt; printf '%s\\n' "\${COMPREPLY[@]}"`
      const shell = spawnSync('bash', ['--norc', '-c', script], { cwd: root, encoding: 'utf8' })
      expect(shell.stderr).toBe('')
      return shell.stdout.trim().split('\n')
    }
    expect(ask('aligngpt fine')).toEqual(['finetune'])
    expect(ask('aligngpt finetune --offl')).toEqual(['--offload-optimizer'])
    expect(ask('aligngpt plan --phase p')).toEqual(['pretrain'])
  })
})

/** What a training step will take of memory, from the settings alone: no weights are read and nothing is allocated. */
import { type Command, Option } from 'commander'
import type { MemoryPlan, PlanModel, PlanOptions } from '../plan.js'
import { bytes, integer, positive } from './options.js'

interface Options extends Omit<PlanOptions, 'microBatch' | 'textTokens' | 'lora'> {
  preset?: keyof typeof VICUNA
  model?: string
  llm?: string
  clip?: string
  projector: string
  levels?: number
  microBatch?: number
  textTokens?: number
  loraRank?: number
  loraTargets?: string[]
  memory?: number
  json?: boolean
}

const VICUNA = {
  '7b': { hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32 },
  '13b': { hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40, num_attention_heads: 40 },
}
const VIT_L_14_336 = {
  ...{ hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16 },
  ...{ image_size: 336, patch_size: 14 },
}

/** Sizes of the model that is meant, and the longest sequence its training lets through. */
async function sizes(o: Options): Promise<{ model: PlanModel; longest: number }> {
  const config = await import('../config.js')
  const { projector, levels = 8 } = o
  if (o.model !== undefined) {
    const c = config.readAlignGPTConfig(o.model)
    const { vision } = config.readClipConfig(config.visionTowerFolder(o.model, c, o.clip))
    const own = { projector: c.mm_projector_type, levels: o.levels ?? c.n_indicators ?? 8, gate: c.mm_gate_type }
    return { model: { llm: c.llm, vision, ...own }, longest: c.tokenizer_model_max_length }
  }
  const llm = o.preset ? config.parseLlamaConfig(VICUNA[o.preset]) : config.readLlamaConfig(o.llm as string)
  const clip = o.preset
    ? config.parseClipConfig({ vision_config: VIT_L_14_336 })
    : config.readClipConfig(o.clip as string)
  return { model: { llm, vision: clip.vision, projector, levels }, longest: 2048 }
}

const size = (n: number): string =>
  n < 2 ** 30 / 10 ? `${(n / 2 ** 20).toFixed(2).padStart(9)} MiB` : `${(n / 2 ** 30).toFixed(2).padStart(9)} GiB`
const count = (n: number): string => (n < 1e6 ? `${(n / 1e3).toFixed(1)} K` : `${(n / 1e6).toFixed(1)} M`)

/** The plan as lines for people. */
function lines(p: MemoryPlan, o: PlanOptions): string[] {
  const offloaded = o.offloadOptimizer ? 0 : 1
  const rows: [string, number][] = [
    ['weights', p.weights],
    ['gradients', p.gradients],
    ['moments of the optimizer', p.moments * offloaded],
    ['f32 rest of bf16 weights', p.masters * offloaded],
    ['activations kept for backward', p.activations],
    ['widest moment besides', p.transient],
    ['on the device at once', p.peak],
    ...(o.offloadOptimizer ? [['optimizer, in main memory', p.host] as [string, number]] : []),
    ['while a checkpoint is written, in main memory', p.snapshot],
  ]
  return [
    `${o.phase}, ${o.dtype}, ${o.microBatch} x ${o.textTokens} text tokens and a picture${o.recompute ? ', recompute' : ''}`,
    `${count(p.parameters)} parameters, ${count(p.trainable)} of them trained`,
    ...rows.filter(([, n]) => n > 0).map(([what, n]) => `  ${what.padEnd(46)}${size(n)}`),
  ]
}

/** Mistakes between options, which no single option shows. */
function complaint(o: Options): string | undefined {
  const ways = [o.preset, o.model, o.llm].filter((x) => x !== undefined).length
  if (ways !== 1 || (o.llm !== undefined && o.clip === undefined) || (o.preset && o.clip !== undefined))
    return 'expected one of --preset NAME, --model DIR, or --llm DIR with --clip DIR'
  if (o.loraTargets && o.loraRank === undefined) return '--lora-rank is missing beside --lora-targets'
  if (o.loraRank !== undefined && o.phase === 'pretrain') return '--lora-rank goes with --phase finetune'
  return undefined
}

async function run(this: Command, o: Options): Promise<void> {
  const wrong = complaint(o)
  if (wrong) this.error(`error: ${wrong}`)
  const [{ model, longest }, { patchCount }, { largestMicroBatch, plan }] = await Promise.all([
    sizes(o),
    import('../config.js'),
    import('../plan.js'),
  ])
  const { phase, dtype, recompute, optimizerState, offloadOptimizer, labelledTokens, memory, loraRank: rank } = o
  const textTokens = o.textTokens ?? longest - patchCount(model.vision) - 1
  if (labelledTokens !== undefined && labelledTokens > textTokens)
    this.error(`error: --labelled-tokens: expected at most the ${textTokens} text tokens, got ${labelledTokens}`)
  const lora = rank === undefined ? undefined : { rank, targets: o.loraTargets }
  const step = { phase, dtype, recompute, optimizerState, offloadOptimizer, textTokens, labelledTokens, lora }
  const largest = memory === undefined ? null : largestMicroBatch(model, step, memory)
  const options = { ...step, microBatch: o.microBatch ?? Math.max(largest ?? 1, 1) }
  const planned = plan(model, options)
  if (o.json)
    console.log(JSON.stringify({ options, plan: planned, memory: memory ?? null, largestMicroBatch: largest }))
  else console.log(lines(planned, options).join('\n'))
  if (memory === undefined) return
  if (!o.json) console.log(`largest micro-batch in ${size(memory).trim()}: ${largest}`)
  if (planned.peak <= memory) return
  console.error(`ERR_MEMORY [plan] step: expected at most ${size(memory).trim()}, got ${size(planned.peak).trim()}`)
  process.exitCode = 1
}

export function plan(program: Command): void {
  program
    .command('plan')
    .description('memory of a training step, before anything is allocated; exit status 1 when --memory is too little')
    .addOption(new Option('--preset <size>', 'Vicuna 7B or 13B with ViT-L/14-336').choices(Object.keys(VICUNA)))
    .option('--model <dir>', 'AlignGPT folder; only its settings are read')
    .option('--llm <dir>', 'LLaMA in Hugging Face layout, with --clip')
    .option('--clip <dir>', 'CLIP in Hugging Face layout')
    .option('--projector <type>', 'of a model that is not made yet: linear, mlpNx_gelu or identity', 'mlp2x_gelu')
    .option('--levels <n>', 'number of alignment levels (default: those of --model, or 8)', integer)
    .addOption(new Option('--phase <name>', 'which phase').choices(['pretrain', 'finetune']).default('finetune'))
    .addOption(new Option('--dtype <type>', 'of the weights').choices(['f32', 'bf16']).default('f32'))
    .option('--micro-batch <n>', 'samples run at once (default: the most that --memory takes, or 1)', positive)
    .option('--text-tokens <n>', 'of a sample (default: as many as the longest sequence has room for)', positive)
    .option('--labelled-tokens <n>', 'of them with loss (default: all)', positive)
    .option('--recompute', 'less memory, one more forward pass')
    .addOption(
      new Option('--optimizer-state <kind>', 'of bf16 weights: full (18 bytes each) or compact (10)')
        .choices(['full', 'compact'])
        .default('full'),
    )
    .option('--offload-optimizer', "the optimizer's state in main memory, for a model on a GPU")
    .option('--lora-rank <r>', 'low-rank adapters instead of the whole language model', positive)
    .option('--lora-targets <names...>', 'modules such as q_proj (default: all matrices of the layers)')
    .option('--memory <bytes>', 'of the device, such as 80G (GiB) or 512M: which micro-batch fits', bytes)
    .option('--json', 'options, bytes and the largest micro-batch as JSON')
    .action(run)
}

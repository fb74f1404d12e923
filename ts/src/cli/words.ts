/**
 * The words of other tools: transformers' TrainingArguments, LLaVA's scripts, LLaMA-Factory, ms-swift, axolotl and PEFT. Who types one
 * of them is told ours, and how the value converts. None of them is taken: the same word may mean something else there.
 */

import leven from 'leven'

/** A key of ours (run-settings.ts) or a flag of a command, and what differs; or no key, and why there is none. */
interface Word {
  ours: string | null
  note?: string
}
const is = (ours: string, note?: string): Word => ({ ours, note })
const none = (note: string): Word => ({ ours: null, note })

const perStep = 'samples of a whole step: per-device batch x devices x accumulation steps'
const adapters = 'adapters are on where {lora.rank} is given'

/** By letters and digits alone, in lower case: `learning_rate`, `--learning-rate` and `learningRate` are one word. */
export const WORDS: Readonly<Record<string, Word>> = {
  // model and data
  modelnameorpath: is('model', 'pretrain takes {llm} and {clip}'),
  basemodel: is('model', 'pretrain takes {llm} and {clip}'),
  modelid: is('model'),
  modelpath: is('model'),
  pretrainedmodelnameorpath: is('model'),
  modelbase: is('model', 'an adapter goes into its model by import --adapter'),
  languagemodel: is('llm'),
  llmpath: is('llm'),
  visiontower: is('clip'),
  mmvisiontower: is('clip'),
  visionmodel: is('clip'),
  clippath: is('clip'),
  datapath: is('data'),
  dataset: is('data'),
  datasets: is('data'),
  datasetpath: is('data'),
  trainfile: is('data'),
  traindata: is('data'),
  traindataset: is('data'),
  questionfile: is('data', 'of generate and eval the argument'),
  datadir: is('data', 'a file; the folder of the pictures is {images}'),
  datasetdir: is('data', 'a file; the folder of the pictures is {images}'),
  imagefolder: is('images'),
  imagedir: is('images'),
  imagepath: is('images'),
  imageroot: is('images'),
  imagefile: is('image'),
  mediadir: is('images'),
  outputdir: is('out'),
  output: is('out'),
  outdir: is('out'),
  savedir: is('out'),
  savepath: is('out'),
  answersfile: is('out', 'of eval it is --answers'),
  outputfile: is('out'),
  loggingdir: is('out', 'log.jsonl is there; TensorBoard with {tensorboard}'),
  evalfile: is('evalData'),
  evaldataset: is('evalData'),
  valdataset: is('evalData'),
  validationfile: is('evalData'),
  valsize: is('evalShare', 'a share of the records between 0 and 1'),
  valsetsize: is('evalShare', 'a share of the records between 0 and 1'),
  splitdatasetratio: is('evalShare'),
  pretrainmmmlpadapter: none('the projector comes with the model: import makes one of a projector file'),
  mmprojectortype: is('projector'),
  projectortype: is('projector'),
  mmvisionselectlayer: is('selectLayer'),
  visionselectlayer: is('selectLayer'),
  mmvisionselectfeature: is('selectFeature'),
  tunemmmlpadapter: none('pretrain trains the projector, finetune all but the vision tower'),
  freezebackbone: none('pretrain trains the projector and the alignment vectors alone'),
  freezevisiontower: none('the vision tower is always frozen'),
  freezevit: none('the vision tower is always frozen'),
  mmusestartend: none('there are no tokens around the picture'),
  mmuseimstartend: none('there are no tokens around the picture'),
  mmuseimpatchtoken: none('there are no patch tokens'),
  imageaspectratio: none('square padding is as the model has it, none in pretrain'),
  groupbymodalitylength: is('groupByLength'),
  grouptosimilarlengths: is('groupByLength'),
  lazypreprocess: none('records are always read when they are needed'),
  version: is('conversation', 'v1 is vicuna_v1; plain is what pretrain takes'),
  convmode: is('style', 'in training {conversation}'),
  conversationtemplate: is('conversation', 'at inference --style'),
  chattemplate: is('conversation', 'at inference --style'),
  template: is('conversation', 'at inference --style'),
  prompttemplate: is('conversation', 'at inference --style'),
  // the run
  learningrate: is('lr'),
  numtrainepochs: is('epochs'),
  numepochs: is('epochs'),
  nepochs: is('epochs'),
  epoch: is('epochs'),
  maxsteps: is('steps', '-1 for epochs is leaving it out'),
  numtrainsteps: is('steps'),
  perdevicetrainbatchsize: is('batch', `${perStep}; what is run at once is {microBatch}`),
  batchsize: is('batch', `${perStep}; what is run at once is {microBatch}`),
  trainbatchsize: is('batch', perStep),
  globalbatchsize: is('batch'),
  microbatchsize: is('microBatch'),
  perdeviceevalbatchsize: is('batch', 'the held-out records go in the same micro-batches; of eval --batch'),
  evalbatchsize: is('batch', 'of eval; in training the held-out records go in micro-batches'),
  gradientaccumulationsteps: is('microBatch', 'the step (batch) is cut into batch / {microBatch} parts'),
  warmupratio: is('warmupRatio'),
  warmupsteps: is('warmupRatio', 'a share of the steps: warmup steps / steps'),
  numwarmupsteps: is('warmupRatio', 'a share of the steps: warmup steps / steps'),
  weightdecay: is('weightDecay'),
  maxgradnorm: is('clipGradNorm'),
  gradclip: is('clipGradNorm'),
  gradientclipping: is('clipGradNorm'),
  gradientclipval: is('clipGradNorm'),
  lrschedulertype: none('the rate rises linearly ({warmupRatio}) and falls as a cosine'),
  lrscheduler: none('the rate rises linearly ({warmupRatio}) and falls as a cosine'),
  optim: none('the optimizer is AdamW; {optimizerState}: compact needs less memory'),
  optimizer: none('the optimizer is AdamW; {optimizerState}: compact needs less memory'),
  adambeta1: none('AdamW has the betas 0.9 and 0.999'),
  adambeta2: none('AdamW has the betas 0.9 and 0.999'),
  adamepsilon: none('AdamW has the usual epsilon, 1e-8'),
  mmprojectorlr: is('projectorLr'),
  alignerlr: is('projectorLr'),
  bf16: is('dtype', 'bf16 in place of true'),
  fp16: is('dtype', 'bf16 or f32'),
  fp32: is('dtype', 'f32 in place of true'),
  tf32: none('a GPU takes what its products are best at'),
  torchdtype: is('dtype', 'bfloat16 is bf16, float32 f32'),
  precision: is('dtype', 'bf16 or f32'),
  bits: none('weights are f32 or bf16 ({dtype})'),
  loadin4bit: none('weights are f32 or bf16 ({dtype})'),
  loadin8bit: none('weights are f32 or bf16 ({dtype})'),
  load4bit: none('weights are f32 or bf16 ({dtype})'),
  load8bit: none('weights are f32 or bf16 ({dtype})'),
  quantizationbit: none('weights are f32 or bf16 ({dtype})'),
  devicemap: is('device', 'auto, cpu or cuda'),
  usecpu: is('device', 'cpu in place of true'),
  nocuda: is('device', 'cpu in place of true'),
  gradientcheckpointing: is('recompute'),
  activationcheckpointing: is('recompute'),
  cpuoffload: is('offloadOptimizer'),
  offload: is('offloadOptimizer'),
  deepspeed: none('a run has one device; {optimizerState}, {offloadOptimizer} and {recompute} save memory'),
  fsdp: none('a run has one device; {optimizerState}, {offloadOptimizer} and {recompute} save memory'),
  localrank: none('a run has one device'),
  dataloadernumworkers: is('workers'),
  numworkers: is('workers'),
  preprocessingnumworkers: is('workers'),
  datasetnumproc: is('workers'),
  randomseed: is('seed'),
  dataseed: is('seed'),
  manualseed: is('seed'),
  modelmaxlength: none("the longest sequence is tokenizer_model_max_length of the model's config.json"),
  maxlength: none(
    "the longest sequence is tokenizer_model_max_length of the model's config.json; of check --max-length",
  ),
  maxseqlength: none("the longest sequence is tokenizer_model_max_length of the model's config.json"),
  cutofflen: none("the longest sequence is tokenizer_model_max_length of the model's config.json"),
  sequencelen: none("the longest sequence is tokenizer_model_max_length of the model's config.json"),
  // saving, evaluating, telling
  savesteps: is('saveEvery', 'steps, or a time such as 30m'),
  savestrategy: is('saveEvery', 'steps, or a time such as 30m'),
  savetotallimit: is('keep'),
  evalsteps: is('evalEvery'),
  evaluationstrategy: is('evalEvery', 'steps; with {evalShare} or {evalData}'),
  evalstrategy: is('evalEvery', 'steps; with {evalShare} or {evalData}'),
  resumefromcheckpoint: is('resume'),
  autoresumefromcheckpoint: is('resume'),
  loggingsteps: none('every step is in log.jsonl of {out}'),
  loggingstrategy: none('every step is in log.jsonl of {out}'),
  reportto: is('tensorboard', 'the one such place'),
  overwriteoutputdir: none('a run takes the folder {out} as it is; {resume} goes on with one'),
  // adapters
  loraenable: is('lora.rank', adapters),
  uselora: is('lora.rank', adapters),
  finetuningtype: is('lora.rank', adapters),
  traintype: is('lora.rank', adapters),
  tunertype: is('lora.rank', adapters),
  adapter: is('lora.rank', adapters),
  usepeft: is('lora.rank', adapters),
  lorar: is('lora.rank'),
  r: is('lora.rank'),
  loratarget: is('lora.targets'),
  loratargetmodules: is('lora.targets'),
  targetmodules: is('lora.targets'),
  loratargetlinear: is('lora.targets', 'all-linear in place of true'),
  loradropout: none('adapters have no dropout'),
  lorabias: none('adapters have no bias'),
  loraweightpath: none('a LoRA adapter goes into its model by import --adapter'),
  adapternameorpath: none('a LoRA adapter goes into its model by import --adapter'),
  // asking
  maxnewtokens: is('maxNewTokens'),
  maxtokens: is('maxNewTokens'),
  maxgenlen: is('maxNewTokens'),
  temp: is('temperature'),
  topp: is('topP'),
  topk: is('topK'),
  numbeams: none('there is no beam search: the most likely token, or sampling ({temperature})'),
  dosample: is('temperature', 'above 0 samples, 0 takes the most likely token'),
  repetitionpenalty: none('there is none'),
  query: is('prompt'),
  question: is('prompt'),
  numlevels: is('levels'),
  nindicators: is('levels'),
}

const bare = (word: string): string => word.toLowerCase().replaceAll(/[^a-z0-9]/g, '')

/** Options that stand for another one of ours where a command has not that. */
const ELSEWHERE: Readonly<Record<string, readonly string[]>> = {
  out: ['to', 'answers'],
  data: ['questions'],
  style: ['conversation'],
  conversation: ['style'],
  images: ['image'],
}

/** The known name that somebody may have meant by a slip of the hand. */
function nearest(word: string, known: readonly string[]): string | undefined {
  const far = (k: string): number => leven(bare(word), bare(k))
  const [near] = known.toSorted((a, b) => far(a) - far(b))
  return near !== undefined && far(near) <= Math.max(1, Math.floor(bare(word).length / 3)) ? near : undefined
}

/**
 * What is meant by a word that is none of ours; undefined without an idea.
 * @param known what may stand there: keys, or names of options
 * @param shown how a key is written there
 */
export function hint(word: string, known: readonly string[], shown: (key: string) => string): string | undefined {
  const same = known.find((k) => bare(k) === bare(word))
  const other = Object.hasOwn(WORDS, bare(word)) ? WORDS[bare(word)] : undefined
  if (same !== undefined || !other) {
    const near = same ?? nearest(word, known)
    return near && `the nearest: ${shown(near)}`
  }
  const note = other.note?.replaceAll(/\{([\w.]+)\}/g, (_, key: string) => shown(key))
  if (other.ours === null) return `here there is none: ${note}`
  const ours = [other.ours, ...(ELSEWHERE[other.ours] ?? [])].find((k) => known.includes(k))
  const said = ours === undefined ? `${shown(other.ours)} of other commands` : `here it is ${shown(ours)}`
  return note === undefined ? said : `${said}; ${note}`
}

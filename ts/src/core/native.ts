/** Loads the native core and types its exports. Handles are plain numbers; see native/addon. */
import { createRequire } from 'node:module'
import path from 'node:path'
import { AlignGPTError } from '../util/errors.js'
import { setFileCallHook } from '../util/files.js'
import { packageRoot } from '../util/package.js'

export type Dtype = 'f32' | 'bf16' | 'f64' | 'i32' | 'i64'
/** Where a tensor's memory is. cuda: the first GPU the driver shows (CUDA_VISIBLE_DEVICES chooses). */
export type Device = 'cpu' | 'cuda'
export type TensorData = Float32Array | Float64Array | Int32Array | BigInt64Array
type H = number

/** Arguments of the fused op; shapes at `alignMix` in ops.ts. */
export interface NativeAlignMix {
  x: H
  weight: H | null
  bias: H | null
  embed: H
  table: H
  tokens: H
  imageRows: H
  alignRows: H
  patches: number
  mode: 'level' | 'gate' | 'fixed'
  levels: H | null
  coefficients: H | null
  gateIds: H | null
  gateOffsets: H | null
  gate: H[]
  global: boolean
}

export interface NativeQkvLinear {
  x: H
  heads: number
  kvHeads: number
  weights: H[]
  biases: H[]
  plus: H | null
  position: H | null
  cos: H | null
  sin: H | null
  kCache: H | null
  vCache: H | null
  slots: H | null
}

export interface Capabilities {
  /** cpu, cuda */
  name: string
  /** avx2, sm_90 ... */
  level: string
  /** what the machine calls it */
  device: string
  threads: number
  /** 0: unknown */
  memoryBytes: number
  /** what matrix products run on and why, in words; empty: nothing to say */
  products: string
}

/** The lists have an entry for each parameter. */
export interface NativeAdamW {
  params: H[]
  grads: H[]
  /** of bf16 parameters */
  masters: (H | null)[]
  /** f32: full state; bf16: compact state */
  m: H[]
  v: H[]
  lrScale: number[]
  weightDecay: number[]
  beta1: number
  beta2: number
  eps: number
  lr: number
  /** 1 for the first */
  step: number
  /** of sumSquares: not finite means that nothing is changed */
  normSquared: H | null
  /** 0: no clipping */
  maxNorm: number
  seed: number
}

/** Where a device can be named, the default is the CPU. */
export interface Native {
  tensor(data: TensorData, shape: number[], dtype: Dtype, device?: Device): H
  write(t: H, data: TensorData): void
  read(t: H): TensorData
  zeros(shape: number[], dtype: Dtype, device?: Device): H
  empty(shape: number[], dtype: Dtype, device?: Device): H
  shape(t: H): number[]
  dtype(t: H): Dtype
  device(t: H): Device
  readFile(t: H, path: string, offset: number, dtype: string): void
  writeFile(t: H, path: string, offset: number): void
  /** counts a call to the file system. @throws ERR_FILE when failFiles says so */
  fileCall(path: string): void
  /** of this process so far: those of readFile and writeFile, and fileCall */
  fileCalls(): number
  /** test hook: the `after`-th file call from now (from 0) and the `count` - 1 behind it fail, or end the process as kill -9; -1: off */
  failFiles(after: number, count: number, kill: boolean): void
  /** a ticket with which another thread takes the tensor, once; the storage is shared */
  send(t: H): number
  receive(ticket: number): H
  /** ends the process at once, whatever its threads are doing */
  exit(status: number): void
  /** the first SIGINT or SIGTERM from now on is heard as usual, the second ends the process at once (130, 143); not on Windows */
  secondSignalEnds(on: boolean): void
  scopeBegin(): number
  scopeEnd(depth: number): void
  keep(t: H): void
  persist(t: H): void
  dispose(t: H): void
  isLive(t: H): boolean
  /** what this thread enqueues on the device until graphEnd is kept and not done, working in the memory of `beside`; the number is for the others */
  graphBegin(device: Device, beside: number | null): number
  graphEnd(graph: number): void
  graphLaunch(graph: number): void
  graphDispose(graph: number): void
  requiresGrad(t: H, on: boolean): void
  wantsGrad(t: H): boolean
  detach(t: H): H
  setGradEnabled(on: boolean): boolean
  backward(root: H, seed: H | null): void
  grad(t: H): H | null
  setGrad(t: H, buffer: H | null): void
  zeroGrad(ts: H[]): void
  /** spent inside kernels by this process so far; on a GPU, in launching them */
  kernelSeconds(device?: Device): number
  memory(device?: Device): { inUse: number; peak: number; reserved: number; blocks: number; handles: number }
  resetPeak(device?: Device): void
  trim(device?: Device): void
  failAfter(allocations: number, device?: Device): void
  capabilities(): Capabilities
  /** the GPU's, or a line that says why there is none to use */
  probeCuda(): Capabilities | string
  threads(): number
  setThreads(n: number): void
  cast(x: H, dtype: Dtype): H
  to(x: H, device: Device): H
  reshape(x: H, shape: number[]): H
  slice(x: H, dim: number, start: number, end: number): H
  concat(xs: H[], dim: number): H
  gather(x: H, index: H): H
  embedding(ids: H, table: H): H
  add(a: H, b: H): H
  sub(a: H, b: H): H
  mul(a: H, b: H): H
  scale(x: H, alpha: number): H
  unary(x: H, name: string): H
  siluMul(gate: H, up: H): H
  sum(x: H): H
  mean(x: H): H
  fill(x: H, value: number): void
  copy(dst: H, src: H): void
  random(x: H, kind: 'uniform' | 'normal', a: number, b: number, seed: number, offset: number): void
  pack(w: H, transB: boolean): number
  unpack(w: H): void
  linear(x: H, w: H, b: H | null, activation: string): H
  siluMulLinear(gate: H, up: H, w: H, b: H | null): H
  qkvLinear(args: NativeQkvLinear): H
  matmul(a: H, b: H, transA: boolean, transB: boolean): H
  patchEmbedding(pixels: H, weight: H, cls: H, position: H): H
  layerNorm(x: H, w: H, b: H, eps: number): H
  rmsNorm(x: H, w: H, eps: number): H
  softmax(x: H): H
  l2Normalize(x: H): H
  attention(
    q: H,
    k: H | null,
    v: H | null,
    qOffsets: H,
    kOffsets: H,
    heads: number,
    kvHeads: number,
    causal: boolean,
    scale: number,
  ): H
  attentionCached(
    qkv: H,
    kCache: H,
    vCache: H,
    qOffsets: H,
    blockTable: H,
    kvLen: H,
    heads: number,
    kvHeads: number,
    scale: number,
  ): H
  alignMix(args: NativeAlignMix): H[]
  lmHeadLoss(hidden: H, weight: H, rows: H, targets: H, denominator: number, chunk: number, scale: H | null): H[]
  crossEntropy(logits: H, targets: H): H
  contrastiveLoss(image: H, text: H, logScale: H): H
  sumSquares(xs: H[]): H
  adamw(args: NativeAdamW): void
  sample(logits: H, temperature: number, topK: number, topP: number, uniform: number[]): number[]
}

/** The machine in the words in which binaries differ. */
function platform(): string {
  const name = `${process.platform}-${process.arch}`
  if (process.platform !== 'linux') return name
  const { header } = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } }
  return `${name} with ${header.glibcVersionRuntime ? `glibc ${header.glibcVersionRuntime}` : 'musl'}`
}

/**
 * The binary built here from source (build/Release), where there is one, else the one that came with the package (prebuilds/):
 * node-gyp-build finds it. What it finds has to be ours and has to load: another one in its place could be an older one.
 */
function load(): { file: string; core: Native } {
  const root = packageRoot()
  const require = createRequire(path.join(root, 'package.json')) // from where this package has it, bundled or not
  let problem: string
  try {
    const file = (require('node-gyp-build') as { path(folder: string): string }).path(root)
    const core = path.basename(file).startsWith('aligngpt.') ? (require(file) as Native) : null
    if (typeof core?.capabilities === 'function') return { file, core }
    problem = `${file}, which is another package's`
  } catch (e) {
    const { code, message } = e as { code?: string; message: string }
    // another error is from one that has loaded and says itself what it does not like
    if (code !== 'ERR_DLOPEN_FAILED' && !message.startsWith('No native build was found')) throw e
    problem = code ? message.split('\n')[0] : `nothing in build${path.sep}Release or prebuilds of ${root}`
  }
  throw new AlignGPTError(
    'ERR_NATIVE',
    `[native] aligngpt.node: expected a binary for ${platform()}, got ${problem}. Build it from source with: ` +
      `npm run --prefix ${JSON.stringify(root)} build:native ` +
      '(needs a C++17 compiler, make or ninja, cmake >= 3.20 and the npm registry)',
  )
}

const { file, core } = load()
/** The native core's file. */
export const nativeFile = file
export const native: Native = core
setFileCallHook((what) => core.fileCall(what))

/** The choice of the device. */
import { AlignGPTError } from '../util/errors.js'
import { type Device, type Dtype, native } from './native.js'

/** The CPU as the core uses it: the code path chosen at load (`avx512`, ...), and how many threads there are. */
export function cpuInfo(): { isa: string; threads: number } {
  const { level, threads } = native.capabilities()
  return { isa: level, threads }
}

/**
 * The device a model goes to. auto: ALIGNGPT_DEVICE where it is set, else the GPU where there is one that computes in `dtype`,
 * else the CPU.
 * @throws ERR_DEVICE when the named device is not there; the message says what is missing
 */
export function resolveDevice(wanted: 'auto' | Device = 'auto', dtype: Dtype = 'f32'): Device {
  const chosen = process.env.ALIGNGPT_DEVICE
  const name = wanted === 'auto' && chosen ? chosen : wanted
  if (name === 'cpu') return name
  if (name !== 'cuda' && name !== 'auto')
    throw new AlignGPTError('ERR_DEVICE', `[device] expected auto, cpu or cuda, got ${name}`)
  const found = native.probeCuda()
  const problem =
    typeof found === 'string' ? found : dtype === 'f64' ? '[device] cuda: expected dtype f32 or bf16, got f64' : null
  if (!problem) return 'cuda'
  if (name === 'cuda') throw new AlignGPTError('ERR_DEVICE', problem)
  return 'cpu'
}

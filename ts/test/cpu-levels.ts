import { native } from '../src/core/native.js'

/** Every CPU level, worst first: a machine that has one has those before it. */
export const allLevels =
  process.arch === 'arm64' ? ['portable', 'neon'] : ['portable', 'avx2', 'avx512', 'avx512bf16', 'amx']
/** Those this machine runs; asked of the level in use, so not meant for a process with ALIGNGPT_CPU_LEVEL. */
export const cpuLevels = allLevels.slice(0, allLevels.indexOf(native.capabilities().level) + 1)

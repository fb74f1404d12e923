/** How much of the machine other programs used meanwhile: numbers taken on a busy machine are not worth reporting. */
import fs from 'node:fs'

/** Ticks of CPU time, 100 a second on Linux. */
const HERTZ = 100
/** Ticks that rounding may add. */
const SLACK = 2

/** Ticks all CPUs were busy, time taken by other virtual machines included; null where there is no /proc. */
function busyTicks(): number | null {
  try {
    const [, user, nice, system, , , irq, softirq, steal] = fs
      .readFileSync('/proc/stat', 'utf8')
      .split('\n', 1)[0]
      .split(/\s+/)
      .map(Number)
    return user + nice + system + irq + softirq + steal
  } catch {
    return null
  }
}

/** Ticks a process used so far. */
function ticksOf(pid: number): number {
  const text = fs.readFileSync(`/proc/${pid}/stat`, 'utf8')
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  return Number(fields[11]) + Number(fields[12])
}

/**
 * Starts watching.
 * @param pids the processes that belong to the measurement
 * @returns a function that gives the CPUs other programs used on average since then; null: not known
 */
export function watchOthers(pids: readonly number[]): () => number | null {
  const foreign = (): number | null => {
    const all = busyTicks()
    return all === null ? null : all - pids.reduce((n, pid) => n + ticksOf(pid), 0)
  }
  const before = foreign()
  const start = performance.now()
  return () => {
    const after = foreign()
    if (before === null || after === null) return null
    return Math.max(0, (after - before - SLACK) / HERTZ / ((performance.now() - start) / 1000))
  }
}

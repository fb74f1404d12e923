/** What a call may do: return, or throw an error of this package with a code that docs/api.md names. */

const CODES = new Set(
  (
    'ERR_ARGUMENT ERR_DATA ERR_IMAGE ERR_CONFIG ERR_FORMAT ERR_WEIGHTS ERR_SHAPE ERR_DTYPE ERR_CHECKPOINT ERR_SAVE ERR_MEMORY ' +
    'ERR_NOT_FINITE ERR_DEVICE ERR_NATIVE ERR_UNSUPPORTED ERR_HANDLE ERR_AUTOGRAD ERR_RANGE ERR_FILE ERR_HUB'
  ).split(' '),
)

/** Thrown by values that a fuzzer plants: it has to come out as it is. */
export class Planted extends Error {}

/** The code of an error that is a refusal; null: anything else. `plain`: native errors have the code and no class. */
export function refusal(e: unknown, plain: boolean): string | null {
  if (e instanceof Planted) return 'planted'
  if (!(e instanceof Error)) return null
  const { code, name } = e as Error & { code?: string }
  if (code === undefined || !CODES.has(code)) return null
  return name === 'AlignGPTError' || (plain && name === 'Error') ? code : null
}

/** Alike for errors of one cause: kind, message without its particulars, first line of this package. */
export function causeOf(e: unknown): string {
  if (!(e instanceof Error)) return `thrown: ${typeof e}`
  const { code } = e as NodeJS.ErrnoException
  const frame = (e.stack ?? '').split('\n').find((l) => l.includes('/ts/src/'))
  const place = frame?.replace(/^.*\/(ts\/src\/[^)]*?):\d+\)?$/, '$1') ?? ''
  return `${e.name} ${code ?? ''} ${e.message.replace(/[-\d]+|'[^']*'|"[^"]*"/g, '#').slice(0, 80)} ${place}`
}

export interface Finding {
  reader: string
  seed: number
  number: number
  cause: string
  message: string
  /** where the input lies */
  file?: string
}

/** A line of a fuzzing process; each has the counts so far. */
export interface Report {
  done: number
  accepted: number
  refused: number
  codes: Record<string, number>
  slowest: number
  rss: number
  heap: number
  files: number
  handles: number
  finding?: Finding
  end?: true
}

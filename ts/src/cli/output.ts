/**
 * What becomes of a command whose output cannot be written. Where the output is the product, it fails; where files are, their work goes
 * on and the loss is told once.
 */
import { AlignGPTError } from '../util/errors.js'
import { bearErrors, lostBecause } from '../util/output.js'
import { fileError, isSystemError } from '../util/paths.js'

/** Commands that make files; what they print is about them. */
const MAKE_FILES: readonly string[] = ['pretrain', 'finetune', 'levels', 'report', 'import', 'export', 'download']

/** Exit status of a process that writes into a closed pipe, as shells give it: 128 and SIGPIPE. */
const PIPE_CLOSED = 141

/**
 * Hears errors of standard output and standard error for the rest of the process.
 * @param command its name as soon as it is known; undefined for --help and the like
 */
export function mindOutput(command: () => string | undefined): void {
  bearErrors(process.stderr) // there is nobody to tell
  bearErrors(process.stdout, (e) => {
    const because = lostBecause(e)
    if (MAKE_FILES.includes(command() ?? '')) {
      console.error(`standard output: ${because}; what it would say is lost, the work goes on`)
      return
    }
    if (e.code === 'EPIPE') process.exit(PIPE_CLOSED) // as every tool in a pipe, without a word
    complain(new AlignGPTError('ERR_FILE', `[output] standard output: expected to be written, got ${because}`))
    process.exit(1)
  })
}

/** What the file system refused, in words. */
function systemError(e: NodeJS.ErrnoException & { dest?: string }): AlignGPTError {
  const of = [e.path, e.dest].filter((p) => p !== undefined).map((p) => JSON.stringify(p))
  return fileError(e.syscall ?? 'file', of.join(' to ') || 'a file', 'it to work', e)
}

/** Says what ended a command, in one line. With ALIGNGPT_STACK=1 the stack of what has no code, which is a mistake of this package. */
export function complain(thrown: unknown): void {
  const e = isSystemError(thrown) ? systemError(thrown) : thrown
  const { code, message = e, stack } = (e ?? {}) as { code?: unknown; message?: unknown; stack?: string }
  const text = String(message).replaceAll(/\s*\n\s*/g, ' ')
  const known = e instanceof Error && typeof code === 'string'
  console.error(
    known ? `${code} ${text}` : `ERR_INTERNAL ${text} (a mistake of aligngpt; ALIGNGPT_STACK=1 shows where)`,
  )
  if (!known && process.env.ALIGNGPT_STACK === '1') console.error(stack)
}

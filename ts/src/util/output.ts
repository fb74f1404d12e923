/** Output that somebody may stop reading: `| head -1`, a closed terminal, a full disk. */

const NAMES: Record<string, string> = {
  EPIPE: 'nobody reads it any more (EPIPE)',
  EIO: 'the terminal is closed (EIO)',
  ENOSPC: 'no space left (ENOSPC)',
}
/** Why a stream could not be written, in words. */
export const lostBecause = ({ code, message }: NodeJS.ErrnoException): string => NAMES[code ?? ''] ?? code ?? message

/**
 * Errors of a stream no longer end the process; the first is told.
 * @returns ends it, once the errors of what was written until then have come
 */
export function bearErrors(
  stream: NodeJS.WriteStream,
  tell: (e: NodeJS.ErrnoException) => void = () => {},
): () => void {
  let told = false
  const hear = (e: NodeJS.ErrnoException): void => {
    if (!told) tell(e)
    told = true
  }
  stream.on('error', hear)
  return () => void setImmediate(() => stream.off('error', hear))
}

/** Every error of this package: `[where] what: expected X, got Y`, with a code for programs. */
export class AlignGPTError extends Error {
  /** @param code ERR_FORMAT, ERR_SHAPE, ERR_DTYPE, ERR_IMAGE, ERR_DATA, ERR_CONFIG, ERR_ARGUMENT, ... */
  constructor(
    readonly code: string,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options)
    this.name = 'AlignGPTError'
  }
}

/** Short, safe rendering of a foreign value for the `got` part of a message. */
export function show(value: unknown): string {
  const isOdd = (v: unknown): boolean => typeof v === 'number' && !Number.isFinite(v)
  let text: string | undefined
  try {
    // JSON has null for NaN and infinities.
    if (isOdd(value)) text = String(value)
    else text = typeof value === 'bigint' ? `${value}n` : JSON.stringify(value, (_, v) => (isOdd(v) ? String(v) : v))
  } catch {
    // Circular, or nested too deep for its text.
    text = typeof value === 'object' ? 'an object without JSON' : undefined
  }
  text ??= String(value)
  return text.length > 120 ? `${text.slice(0, 117)}...` : text
}

/** An error in the package's standard form: `[where] what: expected X, got Y`. `got` is printed as it is. */
export function mismatch(
  code: string,
  where: string,
  what: string,
  expected: string,
  got: string,
  cause?: unknown,
): AlignGPTError {
  const message = `[${where}] ${what}: expected ${expected}, got ${got}`
  return new AlignGPTError(code, message, cause === undefined ? undefined : { cause })
}

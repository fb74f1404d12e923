/** Every error of this package: `[where] what, expected, got`, with a code for programs. */
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

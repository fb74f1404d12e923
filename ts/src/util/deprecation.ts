/** Says once, as a DeprecationWarning of Node, that a name has moved; `--no-deprecation` silences it. */
export function deprecated(old: string, now: string): void {
  process.emitWarning(`${old} has moved to ${now}; the old name goes with the next version`, 'DeprecationWarning')
}

/** The text of an answer as it grows, up to a stop text. */
export class StopText {
  readonly #stop: readonly string[]
  /** text that may be the beginning of a stop text */
  #held = ''
  /** what was shown so far */
  text = ''
  /** a stop text came: nothing is added any more */
  stopped = false

  /** @param stop texts that end an answer and are not part of it */
  constructor(stop: readonly string[]) {
    this.#stop = stop
  }

  /**
   * Adds text. What could become a stop text is held back.
   * @param last no more comes, so nothing is held back
   * @returns what may be shown now
   */
  add(added: string, last: boolean): string {
    if (this.stopped) return ''
    this.#held += added
    const found = this.#stop.map((t) => this.#held.indexOf(t)).filter((at) => at >= 0)
    this.stopped = found.length > 0
    const end = this.stopped ? Math.min(...found) : this.#held.length - (last ? 0 : this.#beginning())
    const shown = this.#held.slice(0, end)
    this.#held = this.#held.slice(end)
    this.text += shown
    return shown
  }

  /** Length of the longest end of the held text that a stop text begins with. */
  #beginning(): number {
    let longest = 0
    for (const t of this.#stop)
      for (let n = Math.min(t.length - 1, this.#held.length); n > longest; n--)
        if (this.#held.endsWith(t.slice(0, n))) longest = n
    return longest
  }
}

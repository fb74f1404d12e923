/** What someone may have meant. */
import distance from 'leven'

/** That of the words that is spelt most like a given one; `words` has one at least. */
export function nearest(given: string, words: readonly string[]): string {
  const far = (word: string): number => distance(given.toLowerCase(), word.toLowerCase())
  return words.reduce((a, b) => (far(b) < far(a) ? b : a))
}

/** The order in which a run takes its records: a pure function of their lengths in words, the seed and the epoch. */
import { permutation } from '../util/rng.js'

export interface OrderOptions {
  /** samples of a global batch */
  batch: number
  seed: number
  epoch: number
  /** batches of one modality, longest samples first (LLaVA's group_by_modality_length) */
  groupByLength?: boolean
  /** false: file order */
  shuffle?: boolean
}

/** Of what is held out. The order of the epochs uses the streams below, augmentation those above. */
export const HOLD_OUT_STREAM = 2 ** 32 - 1
/** Of the augmentation of a record's image: every record and epoch has its own, and the order of the epochs uses others. */
export const augmentStream = (epoch: number, index: number): number => (epoch + 1) * 0x100000000 + index

/**
 * Record indices in the order of an epoch.
 * @param words length of each record in words, negative for text-only records
 */
export function epochOrder(words: Int32Array, o: OrderOptions): Int32Array {
  const { seed, epoch, batch, shuffle = true, groupByLength } = o
  if (!shuffle) return Int32Array.from({ length: words.length }, (_, i) => i)
  return groupByLength ? groupByModalityLength(words, batch, seed, epoch) : permutation(words.length, seed, 4 * epoch)
}

/**
 * LLaVA's group_by_modality_length: shuffled within each modality, cut into batches that are sorted by length (longest
 * first), batches shuffled; the incomplete ones of both modalities come last.
 * @param words length of each record in words, negative for text-only records
 */
export function groupByModalityLength(words: Int32Array, batch: number, seed: number, epoch: number): Int32Array {
  const pick = (sign: number, stream: number): number[][] => {
    const all = [...words.keys()].filter((i) => words[i] * sign > 0)
    const order = [...permutation(all.length, seed, 4 * epoch + stream)].map((i) => all[i])
    const out: number[][] = []
    for (let i = 0; i < order.length; i += batch)
      // Ties by index: the result must not depend on the engine's sort.
      out.push(order.slice(i, i + batch).sort((a, b) => Math.abs(words[b]) - Math.abs(words[a]) || a - b))
    return out
  }
  const groups = [pick(1, 1), pick(-1, 2)].filter((g) => g.length)
  const rest = groups.flatMap((g) => (g[g.length - 1].length < batch ? (g.pop() as number[]) : []))
  const full = groups.flat()
  const order = [...permutation(full.length, seed, 4 * epoch + 3)]
  return Int32Array.from([...order.flatMap((i) => full[i]), ...rest])
}

/** plain, the style of pre-training: image, caption, newline; all text is learned. */
import { content, dataError, markup, type Piece, type Prepared } from './turns.js'

/** `plain`: the question is discarded; picture, caption, newline, and all text is learned. */
export function renderPlain(id: string, p: Prepared, open: boolean): Piece[] {
  const image: Piece[] = p.imageTurn >= 0 ? [{ image: true }] : []
  if (open) return image
  if (p.turns.length !== 2)
    throw dataError(id, 'conversations', 'one question and one caption (plain)', `${p.turns.length} turns`)
  return [...image, content(p.turns[1].value, true), markup('\n', true)]
}

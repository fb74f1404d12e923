/** The learning rate over the steps of a run. */

/** Linear warm-up from 0, then half a cosine to 0 (transformers' get_cosine_schedule_with_warmup). `step` from 0. */
export function cosineRate(step: number, o: { lr: number; totalSteps: number; warmupRatio: number }): number {
  const warmup = Math.ceil(o.totalSteps * o.warmupRatio)
  if (step < warmup) return (o.lr * step) / Math.max(1, warmup)
  const x = (step - warmup) / Math.max(1, o.totalSteps - warmup)
  return o.lr * Math.max(0, 0.5 * (1 + Math.cos(Math.PI * x)))
}

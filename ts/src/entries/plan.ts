export * from '../train/memory-plan.js'

export * from '../train/trainer.js'

export * from '../evaluation/evaluate.js'

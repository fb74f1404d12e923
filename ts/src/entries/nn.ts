/** Layers, and what they are made of: the namespace `nn` of aligngpt/core. */
export { fuseQkv, projectQkv } from '../nn/attention.js'
export { activationOf, Embedding, LayerNorm, Linear, RMSNorm, Sequential } from '../nn/layers.js'
export { type Init, initialize, Module, ParameterSource } from '../nn/module.js'
export { type RopeConfig, RopeTable } from '../nn/rope.js'

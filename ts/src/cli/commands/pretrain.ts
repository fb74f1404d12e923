/** Phase 1: projector and alignment vectors learn from image-text pairs with levels. */
import type { Command } from 'commander'
import type { Values } from '../../train/run-settings.js'
import { train } from '../options.js'
import { type Given, settingsOptions } from '../settings.js'

function run(this: Command, o: Given & Values): Promise<void> {
  return train(this, 'pretrain', o)
}

export function pretrain(program: Command): void {
  const command = program.command('pretrain').description('phase 1: pre-training on image-text pairs with levels')
  settingsOptions(command, 'pretrain').action(run)
}

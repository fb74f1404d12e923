/** Phase 2: language model, projector and gate learn from instructions. */
import type { Command } from 'commander'
import type { Values } from '../../train/run-settings.js'
import { train } from '../options.js'
import { type Given, settingsOptions } from '../settings.js'

function run(this: Command, o: Given & Values): Promise<void> {
  return train(this, 'finetune', o)
}

export function finetune(program: Command): void {
  const command = program.command('finetune').description('phase 2: instruction tuning')
  settingsOptions(command, 'finetune').action(run)
}

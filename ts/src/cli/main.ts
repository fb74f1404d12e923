/**
 * The command line: `aligngpt COMMAND`. A command is one file of commands/ that declares its options and loads what it
 * works with when it runs, so that `--help` is there at once.
 */
import { Command, CommanderError, type Option } from 'commander'
import { version } from '../util/package.js'
import { chat } from './commands/chat.js'
import { check } from './commands/check.js'
import { completion } from './commands/completion.js'
import { download } from './commands/download.js'
import { evaluation } from './commands/eval.js'
import { exporting } from './commands/export.js'
import { finetune } from './commands/finetune.js'
import { generate } from './commands/generate.js'
import { importing } from './commands/import.js'
import { info } from './commands/info.js'
import { levels } from './commands/levels.js'
import { plan } from './commands/plan.js'
import { pretrain } from './commands/pretrain.js'
import { report } from './commands/report.js'
import { complain, mindOutput } from './output.js'
import { flagOf } from './settings.js'
import { hint } from './words.js'

const STATUS = `
Exit status: 0 done; 1 it could not be done (one line on standard error says why), or what was checked is not in order;
2 the command line is not understood; 3 training stopped because checkpoints could not be saved; 129, 130 and 143
stopped by SIGHUP, SIGINT and SIGTERM; 141 nobody reads its output any more.`

/** A command that knows what other tools call its options. */
class Worded extends Command {
  override createCommand(name?: string): Command {
    return new Worded(name)
  }
  unknownOption(given: string): never {
    const flag = given.replace(/=.*/s, '')
    const known = [...this.options.filter((o) => !o.hidden).map((o) => o.long as string), '--help']
    const args = this.registeredArguments.map((a) => a.name())
    const shown = (key: string): string =>
      key.startsWith('--') ? key : args.includes(key) ? `the argument <${key}>` : flagOf({ key })
    const keys = [...known, ...args, ...known.map((f) => f.slice(2).replace(/-(.)/g, (_, c) => c.toUpperCase()))]
    const meant = hint(flag, flag.startsWith('-') ? keys : known, shown)
    return this.error(`error: unknown option '${flag}'${meant === undefined ? '' : ` (${meant})`}`, {
      code: 'commander.unknownOption',
    })
  }
  missingMandatoryOptionValue(option: Option): never {
    const given = this.parent?.args.filter((arg) => arg.startsWith('--')) ?? []
    const unknown = given.find((arg) => !this.options.some((o) => o.long === arg.replace(/=.*/s, '')))
    if (unknown !== undefined) this.unknownOption(unknown) // it may be what is missing
    return this.error(`error: required option '${option.flags}' not specified`)
  }
}

/** The program with all its commands. */
export function commandLine(): Command {
  const program = new Worded('aligngpt')
    .description('train, evaluate and run AlignGPT, a multimodal large language model (arXiv 2405.14129)')
    .version(version())
    .exitOverride()
    .showHelpAfterError('(--help lists the options)')
    .addHelpText('after', STATUS)
  for (const declare of [
    info,
    check,
    levels,
    plan,
    pretrain,
    finetune,
    evaluation,
    report,
    chat,
    generate,
    importing,
    exporting,
    download,
    completion,
  ])
    declare(program)
  return program
}

/** Options that take a path, each a path of this machine. */
function needPaths(command: Command): void {
  for (const option of command.options) {
    const value: unknown = command.getOptionValue(option.attributeName())
    if (!/<(dir|file)>/.test(option.flags) || typeof value !== 'string') continue
    const got = value === '' ? 'no name' : /^[a-z][a-z0-9+.-]+:\/\//i.test(value) ? 'an address' : undefined
    if (got) command.error(`error: option '${option.flags}': expected a path on this machine, got ${got}`)
  }
}

/** Runs the command that process.argv names. @returns the exit status; undefined while a command still runs */
export async function main(): Promise<number | undefined> {
  const program = commandLine()
  let name: string | undefined
  program.hook('preAction', (_, command) => {
    name = command.name()
    needPaths(command)
  })
  mindOutput(() => name)
  process.on('uncaughtException', (e) => {
    complain(e)
    process.exit(1)
  })
  try {
    await program.parseAsync()
  } catch (e) {
    if (e instanceof CommanderError) return e.exitCode === 0 ? 0 : 2 // commander has said what is wrong
    complain(e)
    return (e as { code?: unknown }).code === 'ERR_SAVE' ? 3 : 1
  }
}

/** Completion of commands, flags and their choices in a shell. The shell asks `aligngpt complete` with the words so far. */
import { Argument, type Command, type Option } from 'commander'

/** Each calls back with the words before the cursor and the one at it; without an answer files are offered. */
const SCRIPTS = {
  bash: `_aligngpt() {
  local IFS=$'\\n'
  COMPREPLY=($(aligngpt complete -- "\${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _aligngpt aligngpt
`,
  zsh: `#compdef aligngpt
_aligngpt() {
  local -a found
  found=("\${(@f)$(aligngpt complete -- "\${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _aligngpt aligngpt
`,
  fish: `function __aligngpt
  aligngpt complete -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c aligngpt -a '(__aligngpt)'
`,
}

/** What may stand at the last of the words; nothing where a file or a value of one's own comes. */
export function candidates(program: Command, words: readonly string[]): string[] {
  const [at = ''] = words.slice(-1)
  const before = words.slice(0, -1)
  const command = program.commands.find((c) => c.name() === before[0])
  const starting = (list: readonly string[]): string[] => list.filter((word) => word.startsWith(at))
  if (!command) return starting(before.length ? [] : visible(program))
  const flag = command.options.find((o) => [o.short, o.long].includes(before[before.length - 1]))
  if (flag && takesValue(flag)) return starting(flag.argChoices ?? [])
  if (!at.startsWith('-')) return starting(command.registeredArguments[0]?.argChoices ?? [])
  return starting([...command.options.filter((o) => !o.hidden).map((o) => o.long as string), '--help'])
}

const takesValue = (o: Option): boolean => o.required || o.optional
const visible = (program: Command): string[] =>
  program.commands.filter((c) => c.name() !== 'complete').map((c) => c.name())

export function completion(program: Command): void {
  program
    .command('completion')
    .description('completion for a shell: bash, zsh or fish')
    .addArgument(new Argument('<shell>', 'which shell').choices(Object.keys(SCRIPTS)))
    .addHelpText(
      'after',
      `
  bash: echo 'eval "$(aligngpt completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(aligngpt completion zsh)"' >> ~/.zshrc
  fish: aligngpt completion fish > ~/.config/fish/completions/aligngpt.fish`,
    )
    .action((shell: keyof typeof SCRIPTS) => void process.stdout.write(SCRIPTS[shell]))
  program
    .command('complete', { hidden: true })
    .argument('[words...]')
    .action((words: string[]) => console.log(candidates(program, words).join('\n')))
}

/** Brings a model or data set from the Hugging Face Hub into a folder. */
import type { Command } from 'commander'
import type { DownloadOptions } from '../../convert/hub.js'
import { folderToWrite } from '../../util/paths.js'

interface Options extends Pick<DownloadOptions, 'revision' | 'include' | 'token'> {
  to: string
}

const MB = 1e6

/** A bar on a terminal; elsewhere a line for each file. */
async function progress(): Promise<{ show: NonNullable<DownloadOptions['onProgress']>; end: () => void }> {
  if (!process.stderr.isTTY) {
    let last = ''
    const show = (done: number, total: number, file: string): void => {
      if (file !== last) console.error(`${file} (${(done / MB).toFixed(1)} of ${(total / MB).toFixed(1)} MB are there)`)
      last = file
    }
    return { show, end: () => {} }
  }
  const { SingleBar } = await import('cli-progress')
  const format = '[{bar}] {mb}/{all} MB, {rate} MB/s {file}'
  const bar = new SingleBar({ format, stream: process.stderr, hideCursor: true })
  const from = performance.now()
  let first: number | undefined
  const show = (done: number, total: number, file: string): void => {
    first ??= done
    const rate = ((done - first) / MB / Math.max((performance.now() - from) / 1000, 1e-3)).toFixed(1)
    const values = { mb: (done / MB).toFixed(1), all: (total / MB).toFixed(1), rate, file }
    if (bar.getTotal() === total && bar.isActive) bar.update(done, values)
    else bar.start(total, done, values)
  }
  return { show, end: () => void (bar.isActive && bar.stop()) }
}

async function run(repo: string, { to, ...options }: Options): Promise<void> {
  folderToWrite('download', '--to', to)
  const [{ downloadRepo }, { hearing }] = await Promise.all([import('../../convert/hub.js'), import('../signals.js')])
  const { show, end } = await progress()
  try {
    const asked = { ...options, onProgress: show, onMessage: (text: string) => console.error(text) }
    const m = await hearing('what is there stays', ({ signal }) =>
      downloadRepo(repo, to, { ...asked, signal }).catch((e) => {
        if (!signal.aborted) throw e
        return null
      }),
    )
    end()
    if (!m) {
      console.error('stopped: the same command goes on from what is there')
      return
    }
    const bytes = m.files.reduce((n, f) => n + f.size, 0)
    console.log(`${to}: ${m.files.length} files, ${(bytes / MB).toFixed(1)} MB, verified; ${repo} at ${m.commit}`)
  } finally {
    end()
  }
}

export function download(program: Command): void {
  program
    .command('download')
    .description('bring a model or data set from the Hugging Face Hub into a folder, or go on with it')
    .argument('<repo>', 'owner/name, or datasets/owner/name')
    .requiredOption('--to <dir>', 'the folder; download.json in it pins the commit and the hash of each file')
    .option('--revision <name>', 'branch, tag or commit (default: the one pinned there, else main)')
    .option('--include <globs...>', "files wanted, such as '*.json' (default: all but other frameworks' weights)")
    .option('--token <token>', 'for what is not public (default: HF_TOKEN)')
    .addHelpText(
      'after',
      `
HF_ENDPOINT names a mirror. Behind a proxy, NODE_USE_ENV_PROXY=1 makes Node 24 and later heed HTTPS_PROXY.

Examples:
  aligngpt download openai/clip-vit-large-patch14-336 --to models/clip
  aligngpt download lmsys/vicuna-7b-v1.5 --to models/vicuna --revision main
  aligngpt download datasets/liuhaotian/LLaVA-Pretrain --to data --include '*.json'`,
    )
    .action(run)
}

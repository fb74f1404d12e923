// Runs at `npm install`: does nothing where a prebuilt binary fits, else builds from source.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..')
const prebuilt = path.join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'aligngpt.node')
if (!existsSync(prebuilt)) {
  const result = spawnSync(process.execPath, [path.join(root, 'scripts', 'build-native.mjs')], { stdio: 'inherit' })
  process.exit(result.status ?? 1)
}

/** Where this package lies, and its version. Loads nothing, so that it costs nothing. */
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const NAME = 'aligngpt'
const read = (file: string): { name: string; version: string } => JSON.parse(fs.readFileSync(file, 'utf8'))

/** The package's folder: the nearest above this file, or, when a bundler has put this file elsewhere, the installed one. */
export function packageRoot(): string {
  for (let dir = path.dirname(fileURLToPath(import.meta.url)); ; dir = path.dirname(dir)) {
    const file = path.join(dir, 'package.json')
    if (fs.existsSync(file) && read(file).name === NAME) return dir
    if (path.dirname(dir) === dir) break
  }
  return path.dirname(createRequire(import.meta.url).resolve(`${NAME}/package.json`))
}

export function version(): string {
  return read(path.join(packageRoot(), 'package.json')).version
}

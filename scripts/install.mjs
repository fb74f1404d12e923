// Runs at `npm install`. A prebuilt binary that loads here is enough; else the addon is built from source.
// ALIGNGPT_BUILD_FROM_SOURCE=1 builds in any case.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..')
const require = createRequire(import.meta.url)
const HEADERS = ['node-addon-api', 'node-api-headers']

/** A file that is there but does not load (another libc, say) counts as missing. */
function prebuiltLoads() {
  const file = path.join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'aligngpt.node')
  if (!existsSync(file)) return false
  try {
    require(file)
    return true
  } catch (error) {
    console.error(`[install] the prebuilt binary does not load here (${error.message}): building from source`)
    return false
  }
}

/** They are development dependencies: a checkout has them, an application asks for them. */
function headersPresent() {
  try {
    for (const name of HEADERS) require.resolve(`${name}/package.json`)
    return true
  } catch {
    return false
  }
}

if (process.env.ALIGNGPT_BUILD_FROM_SOURCE === '1' || !prebuiltLoads()) {
  if (headersPresent()) {
    const script = path.join(root, 'scripts', 'build-native.mjs')
    process.exitCode = spawnSync(process.execPath, [script], { stdio: 'inherit' }).status ?? 1
  } else {
    console.error(`[install] no prebuilt binary for ${process.platform}-${process.arch}. To build from source, with a`)
    console.error(`[install] C++17 compiler, make and cmake >= 3.20: npm install aligngpt ${HEADERS.join(' ')}`)
    process.exitCode = 1
  }
}

// The binaries that are published -> prebuilds/PLATFORM-ARCH, by prebuildify, which has node-gyp run binding.gyp: the
// addon, and where nvcc is the CUDA backend beside it. --arch arm64: for 64-bit ARM, by Debian's g++-aarch64-linux-gnu.
// --cpu: what npm ci and an install from git make, the addon alone, without node-gyp, which would need Python and
// Node's headers. The addon moves: build/Release has none afterwards, and what runs is what is published.
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs, promisify } from 'node:util'
import prebuildify from 'prebuildify'
import { ownHeaders } from './headers.mjs'

const root = fileURLToPath(new URL('../..', import.meta.url))
const { values } = parseArgs({ options: { cpu: { type: 'boolean' }, arch: { type: 'string', default: process.arch } } })
const cross = values.arch !== process.arch
const platform = cross ? 'linux' : process.platform
const library = 'libaligngpt_cuda.so'

/** Builds the CUDA backend, for Linux on x64 alone; false where there is no nvcc. */
function buildCuda() {
  if (values.cpu || platform !== 'linux' || values.arch !== 'x64') return false
  if (spawnSync('nvcc', ['--version']).status !== 0) {
    console.log(`${library} is left out: nvcc is not on the PATH`)
    return false
  }
  for (const args of [
    ['--preset', 'cuda'],
    ['--build', '--preset', 'cuda'],
  ]) {
    const { status } = spawnSync('cmake', args, { cwd: root, stdio: 'inherit' })
    if (status !== 0) throw new Error(`[prebuilds] cmake ${args.join(' ')}: status ${status}`)
  }
  return true
}

process.chdir(root) // prebuildify's own paths are then relative: a shell would take one with a space apart
Object.assign(process.env, ownHeaders())
if (cross) process.env.GYP_DEFINES = `build_script=build:${values.arch}`
const cuda = buildCuda() // prebuildify copies every library that it finds beside the addon
await promisify(prebuildify)({
  ...{ napi: true, strip: true, tagLibc: platform === 'linux', targets: [process.versions.node] },
  ...{ arch: values.arch, platform },
  ...(cuda && { postinstall: `cmake -E copy build-native/cuda/native/cuda/${library} build/Release/` }),
  ...(cross && { stripBin: 'aarch64-linux-gnu-strip' }),
  ...(values.cpu && { nodeGyp: 'npm run build:native #', shell: true }), // the arguments for node-gyp become a comment
})
const folder = path.join('prebuilds', `${platform}-${values.arch}`)
for (const name of fs.readdirSync(path.join(root, folder)))
  console.log(`${folder}/${name}  ${(fs.statSync(path.join(root, folder, name)).size / 1e6).toFixed(1)} MB`)

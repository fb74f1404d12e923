/**
 * `node:fs` for whoever must survive a failing disk: each call counts as one of the core's file calls first, so that a test can
 * make any of them fail (native.failFiles). Closing still closes.
 */
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import { native } from '../core/native.js'
import { readRange } from '../formats/safetensors.js'

export const disk: typeof fs = new Proxy(fs, {
  get(target, name: keyof typeof fs) {
    const call = target[name] as (...args: unknown[]) => unknown
    return (...args: unknown[]) => {
      if (name === 'closeSync') call(...args)
      native.fileCall(`${name} ${typeof args[0] === 'number' ? 'file' : args[0]}`)
      return name === 'closeSync' ? undefined : call(...args)
    }
  },
})

/** Opens, uses and closes. */
export function withDescriptor<T>(file: string, flags: string, use: (fd: number) => T): T {
  const fd = disk.openSync(file, flags)
  let result: T
  try {
    result = use(fd)
  } catch (e) {
    fs.closeSync(fd)
    throw e
  }
  disk.closeSync(fd)
  return result
}

/** Makes the names in a folder last. */
export function syncFolder(folder: string): void {
  withDescriptor(folder, 'r', (fd) => disk.fsyncSync(fd))
}

const PIECE = 1 << 22

/** Size and SHA-256 of a file, read in pieces. @throws an error of the file system */
export function fingerprint(file: string): { bytes: number; sha256: string } {
  return withDescriptor(file, 'r', (fd) => {
    const { size } = disk.fstatSync(fd)
    const hash = createHash('sha256')
    for (let at = 0; at < size; at += PIECE) {
      native.fileCall(file)
      hash.update(readRange(fd, at, Math.min(PIECE, size - at), file))
    }
    return { bytes: size, sha256: hash.digest('hex') }
  })
}

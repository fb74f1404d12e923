/** Files: whole reads, whole writes, digests, and `node:fs` for whoever must survive a failing disk. */
import { createHash, randomBytes } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { mismatch } from './errors.js'
import { unreadable } from './file-kind.js'

let onCall: ((what: string) => void) | undefined

/**
 * Says who hears of each call of `disk` before it is made, and may throw in its place. The native core does, which counts its own file
 * calls in the same row: so a test can make any of them fail (native.failFiles).
 */
export function setFileCallHook(hook: (what: string) => void): void {
  onCall = hook
}

/** `node:fs`, each call of which can be made to fail. Closing still closes. */
export const disk: typeof fs = new Proxy(fs, {
  get(target, name: keyof typeof fs) {
    const call = target[name] as (...args: unknown[]) => unknown
    return (...args: unknown[]) => {
      if (name === 'closeSync') call(...args)
      onCall?.(`${name} ${typeof args[0] === 'number' ? 'file' : args[0]}`)
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
export function digestFile(file: string): { bytes: number; sha256: string } {
  return withDescriptor(file, 'r', (fd) => {
    const { size } = disk.fstatSync(fd)
    const hash = createHash('sha256')
    for (let at = 0; at < size; at += PIECE) {
      onCall?.(file)
      hash.update(readRange(fd, at, Math.min(PIECE, size - at), file))
    }
    return { bytes: size, sha256: hash.digest('hex') }
  })
}

/** Reads exactly `length` bytes at `position`. @throws AlignGPTError ERR_FORMAT when the file is shorter */
export function readRange(fd: number, position: number, length: number, file: string): Buffer {
  const out = Buffer.allocUnsafe(length)
  for (let done = 0; done < length; ) {
    const n = fs.readSync(fd, out, done, Math.min(length - done, 1 << 28), position + done)
    if (n === 0) throw mismatch('ERR_FORMAT', 'read', file, `${length} bytes at ${position}`, `${done} bytes`)
    done += n
  }
  return out
}

/** Opens a regular file for reading and passes the descriptor and the size. @throws AlignGPTError ERR_FORMAT */
export function withFile<T>(file: string, use: (fd: number, size: number) => T): T {
  let fd: number
  try {
    fd = fs.openSync(file, 'r')
  } catch (e) {
    throw mismatch('ERR_FORMAT', 'open', file, 'a readable file', unreadable(file, e), e)
  }
  try {
    const info = fs.fstatSync(fd)
    if (!info.isFile()) throw mismatch('ERR_FORMAT', 'open', file, 'a regular file', unreadable(file))
    return use(fd, info.size)
  } finally {
    fs.closeSync(fd)
  }
}

/**
 * Writes a file so that a reader sees the old one or the new one, never half of it: temporary file beside it, `fill`,
 * fsync, rename, fsync of the folder. The temporary file is removed on failure.
 * @param fill receives the open descriptor and the temporary path
 */
export function writeAtomic(named: string, fill: (fd: number, temporary: string) => void): void {
  if (isSpecial(named)) throw mismatch('ERR_FILE', 'write', named, 'a regular file, or none yet', 'something else')
  const file = fs.existsSync(named) ? fs.realpathSync(named) : named // a link stays one
  const temporary = `${file}.tmp-${process.pid}-${randomBytes(4).toString('hex')}`
  const fd = fs.openSync(temporary, 'wx')
  try {
    try {
      fill(fd, temporary)
      fs.fsyncSync(fd)
    } finally {
      fs.closeSync(fd)
    }
    fs.renameSync(temporary, file)
  } catch (e) {
    fs.rmSync(temporary, { force: true })
    const refused = e as NodeJS.ErrnoException
    if (refused.syscall !== undefined) refused.path ??= file // a descriptor has no name
    throw e
  }
  const folder = fs.openSync(path.dirname(path.resolve(file)), 'r')
  try {
    fs.fsyncSync(folder)
  } finally {
    fs.closeSync(folder)
  }
}

/** Writes all of `data` at `position`; fs.writeSync alone may write less than asked. */
export function writeAll(fd: number, data: Uint8Array, position: number): void {
  for (let done = 0; done < data.byteLength; ) {
    // One write call moves at most 2 GiB; smaller pieces keep that limit out of sight.
    const n = Math.min(data.byteLength - done, 1 << 28)
    done += fs.writeSync(fd, data, done, n, position + done)
  }
}

/** Whether there is something that is no regular file: a pipe, a terminal, a device; nothing may take its place. */
export function isSpecial(file: string): boolean {
  const there = fs.statSync(file, { throwIfNoEntry: false })
  return there !== undefined && !there.isFile()
}

/** Writes a text atomically; into a pipe or a device as it is. */
export function writeAtomicText(file: string, text: string): void {
  if (isSpecial(file)) fs.writeFileSync(file, text)
  else writeAtomic(file, (fd) => writeAll(fd, Buffer.from(text), 0))
}

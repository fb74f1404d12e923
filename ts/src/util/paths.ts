/** Paths that somebody names, looked at before work begins: one line that says what was expected and what is there. */
import fs from 'node:fs'
import path from 'node:path'
import { type AlignGPTError, mismatch, show } from './errors.js'

const REASONS: Record<string, string> = {
  ENOENT: 'nothing of this name',
  EEXIST: 'a file of this name',
  EISDIR: 'a folder',
  ENOTDIR: 'a file where a folder of the path should be',
  EACCES: 'no permission',
  EPERM: 'no permission',
  EROFS: 'a file system that is read-only',
  ENOSPC: 'no space left',
  EDQUOT: 'no space left of the quota',
  EFBIG: 'a file that may not grow so large',
  ENAMETOOLONG: 'a name that is too long',
  ELOOP: 'links that lead in a circle',
  EMFILE: 'too many open files',
  ENFILE: 'too many open files',
  EBUSY: 'one that is in use',
  EPIPE: 'nobody who reads it any more',
  EIO: 'a device that fails',
  ENXIO: 'a device that is not there',
  EINVAL: 'a name that the system does not take',
}

/** What the file system said, in words, with its code. */
export function reasonOf(e: unknown): string {
  const { code, message } = e as NodeJS.ErrnoException
  return code !== undefined && Object.hasOwn(REASONS, code) ? `${REASONS[code]} (${code})` : (code ?? String(message))
}

/** Whether the file system refused something; such an error has a path or a call, and no words for a person. */
export const isSystemError = (e: unknown): e is NodeJS.ErrnoException =>
  e instanceof Error && typeof (e as NodeJS.ErrnoException).syscall === 'string'

/** An error of the file system in the package's form. @param what where it happened, such as an option and its path */
export const fileError = (where: string, what: string, expected: string, e: unknown): AlignGPTError =>
  mismatch('ERR_FILE', where, what, expected, reasonOf(e), e)

const statOf = (file: string): fs.Stats | undefined => fs.statSync(file, { throwIfNoEntry: false })
const isLink = (file: string): boolean => fs.lstatSync(file, { throwIfNoEntry: false })?.isSymbolicLink() === true

/** Makes folders level by level, and says which. (Node's recursive mkdir never ends in /proc.) */
function makeLevels(folder: string): string[] {
  const missing: string[] = []
  for (let at = path.resolve(folder); !statOf(at); at = path.dirname(at)) missing.push(at)
  const made: string[] = []
  try {
    for (const level of missing.reverse()) {
      fs.mkdirSync(level)
      made.push(level)
    }
  } catch (e) {
    for (const level of made.reverse()) fs.rmdirSync(level)
    throw e
  }
  return made
}

/**
 * A folder that files are going to be written into: there and writable, or one that can be made. Nothing is left of the trial.
 * @param option that names it, for messages
 * @throws AlignGPTError ERR_FILE
 */
export function folderToWrite(where: string, option: string, folder: string): void {
  const what = `${option} ${show(folder)}`
  const expected = 'a folder to write into'
  const refuse = (got: string): never => {
    throw mismatch('ERR_FILE', where, what, expected, got)
  }
  if (folder === '') refuse('no name')
  try {
    const there = statOf(folder)
    if (there && !there.isDirectory()) refuse(there.isFile() ? 'a file' : 'something else')
    if (!there && isLink(folder)) refuse('a link that leads nowhere')
    if (there) fs.accessSync(folder, fs.constants.W_OK | fs.constants.X_OK)
    else for (const level of makeLevels(folder).reverse()) fs.rmdirSync(level)
  } catch (e) {
    if (isSystemError(e)) throw fileError(where, what, expected, e)
    throw e
  }
}

/**
 * Where a file is going to be written, links followed.
 * @param option that names it, for messages
 * @returns the path, and whether it is written in place: a pipe, a terminal, a device
 * @throws AlignGPTError ERR_FILE: a folder, a link that leads nowhere, no folder to be in, no permission
 */
export function fileToWrite(where: string, option: string, file: string): { file: string; inPlace: boolean } {
  const what = `${option} ${show(file)}`
  const expected = 'a file to write'
  const refuse = (got: string): never => {
    throw mismatch('ERR_FILE', where, what, expected, got)
  }
  if (file === '' || /[\\/]$/.test(file)) refuse(file === '' ? 'no name' : 'the name of a folder')
  try {
    const there = statOf(file)
    if (there?.isDirectory()) refuse('a folder')
    if (!there && isLink(file)) refuse('a link that leads nowhere')
    if (there) fs.accessSync(file, fs.constants.W_OK)
    if (there && (!there.isFile() || /^\/(dev|proc)\//.test(path.resolve(file)))) return { file, inPlace: true }
    const real = there ? fs.realpathSync(file) : path.resolve(file)
    const folder = statOf(path.dirname(real))
    if (!folder) refuse(`no folder ${show(path.dirname(file))}`)
    if (!folder?.isDirectory()) refuse(`${show(path.dirname(file))}, which is no folder`)
    fs.accessSync(path.dirname(real), fs.constants.W_OK | fs.constants.X_OK)
    return { file: real, inPlace: false }
  } catch (e) {
    if (isSystemError(e)) throw fileError(where, what, expected, e)
    throw e
  }
}

/** Lines that a command makes one after the other, for a file that they replace when all are there, or for standard output. */
import fs from 'node:fs'
import { writeAll } from '../util/files.js'
import { fileError, fileToWrite } from '../util/paths.js'

const STANDARD: readonly string[] = ['-', '/dev/stdout', '/dev/fd/1', '/proc/self/fd/1']

export interface LineFile {
  /** where they go while not all are there; null: where they are to stay */
  readonly temporary: string | null
  write(text: string): Promise<void>
  /** all are there */
  finish(): void
  /** they are not: what was written stays in `temporary`; without any it goes */
  leave(): void
}

const standardOutput: LineFile = {
  temporary: null,
  // what goes wrong is heard by mindOutput
  write: (text) => new Promise((resolve) => void process.stdout.write(text, () => resolve())),
  finish: () => {},
  leave: () => {},
}

/** Beside the file, under the first name that is free: what an earlier command left there is somebody's work. */
function openBeside(file: string): { fd: number; temporary: string } {
  for (let n = 1; ; n++) {
    const temporary = `${file}.part${n > 1 ? n : ''}`
    try {
      return { fd: fs.openSync(temporary, 'wx'), temporary }
    } catch (e) {
      if ((e as NodeJS.ErrnoException).code !== 'EEXIST') throw e
    }
  }
}

/** Writes where it stands: a pipe, a device. */
function inPlace(what: string, file: string, where: string): LineFile {
  const fd = fs.openSync(file, fs.constants.O_WRONLY)
  const write = async (text: string): Promise<void> => {
    try {
      fs.writeFileSync(fd, text)
    } catch (e) {
      throw fileError(where, what, 'to be written', e)
    }
  }
  return { temporary: null, write, finish: () => fs.closeSync(fd), leave: () => fs.closeSync(fd) }
}

/**
 * Opens a file for lines before the work begins; undefined and `-` are standard output.
 * @param where the command, for messages
 * @param option the option that names it
 * @throws AlignGPTError ERR_FILE
 */
export function openLines(where: string, option: string, named: string | undefined): LineFile {
  if (named === undefined || STANDARD.includes(named)) return standardOutput
  const what = `${option} ${JSON.stringify(named)}`
  const target = fileToWrite(where, option, named)
  try {
    if (target.inPlace) return inPlace(what, named, where)
    const { fd, temporary } = openBeside(target.file)
    let size = 0
    let open = true
    const close = (): void => {
      if (open) fs.closeSync(fd)
      open = false
    }
    const failed = (e: unknown): Error => fileError(where, what, `to be written (what is there is in ${temporary})`, e)
    const write = async (text: string): Promise<void> => {
      const bytes = Buffer.from(text)
      try {
        writeAll(fd, bytes, size)
        size += bytes.length
      } catch (e) {
        throw failed(e)
      }
    }
    const finish = (): void => {
      try {
        fs.fsyncSync(fd)
        close()
        fs.renameSync(temporary, target.file)
      } catch (e) {
        throw failed(e)
      }
    }
    const leave = (): void => {
      if (open) fs.ftruncateSync(fd, size) // no half a line
      close()
      if (size === 0) fs.rmSync(temporary, { force: true })
    }
    return { temporary, write, finish, leave }
  } catch (e) {
    throw fileError(where, what, 'a file to write', e)
  }
}

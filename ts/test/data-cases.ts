/** The golden cases, and small helpers of the tests 30 to 37. */

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect } from 'vitest'
import type { DataRecord, Turn } from '../src/formats/record-file.js'
import { TarWriter } from '../src/formats/tar.js'
import { AlignGPTError } from '../src/util/errors.js'

export const GOLDEN = fileURLToPath(new URL('./golden/', import.meta.url))
export const CASES = ['base', 'gqa', 'wide'] as const

export interface ExpectedSample {
  id: string
  text: string
  input_ids: number[]
  labels: number[]
}
export interface Expected {
  phase1: { batch_ids: string[]; samples: ExpectedSample[] }
  phase2: { batch_ids: string[]; samples: ExpectedSample[] }
  infer: { id: string; text: string; input_ids: number[]; generated_ids: number[]; generated_text: string }[]
  clip: { ids: string[]; cosine: number[]; levels: number[] }
  tokenizer_probes: {
    text: string
    llm_ids: number[]
    llm_ids_no_special: number[]
    llm_decoded: string
    clip_ids: number[]
  }[]
}

export const caseDir = (name: string, ...parts: string[]): string => path.join(GOLDEN, name, ...parts)
export const readJson = <T>(file: string): T => JSON.parse(fs.readFileSync(file, 'utf8')) as T
export const expectedOf = (name: string): Expected => readJson(caseDir(name, 'expected.json'))

type RawRecord = { id: string; image?: string; conversations: Turn[]; similarity?: number }
export const recordsOf = (name: string, file: string): DataRecord[] =>
  readJson<RawRecord[]>(caseDir(name, file)).map((r) => ({
    id: r.id,
    image: r.image ?? null,
    conversations: r.conversations,
    similarity: r.similarity ?? null,
  }))

const made: string[] = []
/** A fresh folder with a space in its name; it is gone after the file's tests. */
export function tempDir(): string {
  made.push(fs.mkdtempSync(path.join(os.tmpdir(), 'align gpt ')))
  return made.at(-1) as string
}
afterAll(() => {
  for (const dir of made) fs.rmSync(dir, { recursive: true, force: true })
})

/** The error a call ends with; fails when there is none or it is not the package's own. */
export async function errorOf(f: () => unknown): Promise<AlignGPTError> {
  try {
    await f()
  } catch (e) {
    expect(e, String((e as Error)?.stack ?? e)).toBeInstanceOf(AlignGPTError)
    return e as AlignGPTError
  }
  throw new Error('expected an error, got none')
}

/** Expects an AlignGPTError with a code and a message in the standard form that says `pattern`. */
export async function refuses(f: () => unknown, code: string, pattern: RegExp): Promise<void> {
  const e = await errorOf(f)
  expect(e.message).toMatch(pattern)
  expect(e.code).toBe(code)
  expect(e.message).toMatch(/^\[[^\]]+\] [\s\S]*: expected [\s\S]*, got [\s\S]*/)
}

/** The value, after something has been done. */
export const doing = <T>(_: unknown, value: T): T => value

/** Writes a tar with these members. @returns its file */
export function writeTar(file: string, members: readonly [string, Uint8Array][]): string {
  fs.mkdirSync(path.dirname(file), { recursive: true })
  const fd = fs.openSync(file, 'w')
  const writer = new TarWriter(fd)
  for (const [name, content] of members) writer.add(name, content)
  writer.end()
  fs.closeSync(fd)
  return file
}

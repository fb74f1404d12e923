/** What a training run has left in its folder, read for a report: a run that goes on, was killed or is damaged too. */
import fs from 'node:fs'
import path from 'node:path'
import { mismatch } from '../util/errors.js'
import { isObject, readJsonFile } from '../util/json.js'
import { listCheckpoints } from './checkpoint.js'
import { checkpointFolder } from './resume.js'

/** A line of log.jsonl; numbers that it does not have are NaN. */
export interface Step extends Record<Curve, number> {
  step: number
  /** that the step took */
  seconds: number
  tokens: number
  samples: number
  waited: number
  coefficients: number[]
}
export type Curve = 'loss' | 'lr' | 'gradNorm' | 'tokensPerSecond'

/** Held-out records of one level or task. */
export interface Group {
  samples: number
  loss: number
  coefficients: number[]
}

/** The line of an evaluation on held-out records. */
export interface LoggedEvaluation {
  step: number
  loss: number
  best: boolean
  levels: Group[]
  tasks: Map<string, Group>
  /** what the model says to the records of samples.json, by their ids */
  answers: Map<string, string>
}

/** A record of samples.json. */
export interface Shown {
  id: string
  question: string
  expected: string
  /** data URI */
  picture: string | null
}

export interface RunLog {
  folder: string
  phase: string
  /** steps that the run shall have */
  wanted: number
  steps: Step[]
  evaluations: LoggedEvaluation[]
  shown: Shown[]
  /** lines that are none, such as the last one of a killed run */
  broken: number
  /** every option that the numbers depend on, null where the run has not written them yet */
  options: Record<string, unknown> | null
  /** state.json, when it is of the log's last step */
  state: Record<string, unknown> | null
}

type Json = Record<string, unknown>
export const numberOf = (v: unknown): number => (typeof v === 'number' ? v : Number.NaN)
const numbersOf = (v: unknown): number[] => (Array.isArray(v) ? v.map(numberOf) : [])
const objectsOf = (v: unknown): Json[] => (Array.isArray(v) ? v.filter(isObject) : [])
const textOf = (v: unknown): string => (typeof v === 'string' ? v : '')

function parseLine(line: string): Json | null {
  try {
    const value: unknown = JSON.parse(line)
    return isObject(value) && Number.isInteger(value.step) ? value : null
  } catch {
    return null
  }
}

function stepOf(line: Json): Step {
  const seconds = numberOf(line.tokens) / numberOf(line.tokensPerSecond)
  return {
    step: line.step as number,
    seconds,
    tokens: numberOf(line.tokens),
    samples: numberOf(line.samplesPerSecond) * seconds,
    loss: numberOf(line.loss),
    lr: numberOf(line.lr),
    gradNorm: numberOf(line.gradNorm),
    tokensPerSecond: numberOf(line.tokensPerSecond),
    waited: numberOf(line.waited),
    coefficients: numbersOf(line.coefficients),
  }
}

const groupOf = ({ samples, loss, coefficients }: Json): Group => ({
  samples: numberOf(samples),
  loss: numberOf(loss),
  coefficients: numbersOf(coefficients),
})

function evaluationOf(line: Json): LoggedEvaluation {
  const e = line.evaluation as Json
  const tasks = Object.entries(isObject(e.tasks) ? e.tasks : {})
  return {
    step: line.step as number,
    loss: numberOf(e.loss),
    best: e.best === true,
    levels: objectsOf(e.levels).map(groupOf),
    tasks: new Map(tasks.flatMap(([name, group]) => (isObject(group) ? [[name, groupOf(group)]] : []))),
    answers: new Map(objectsOf(e.answers).map(({ id, text }) => [textOf(id), textOf(text)])),
  }
}

/** A picture stands in the page as it is, so nothing but the data URI of one is taken. */
function shownOf({ id, question, expected, picture }: Json): Shown {
  const isImage = /^data:image\/webp;base64,[A-Za-z0-9+/]+=*$/.test(textOf(picture))
  const [name, asked, answer] = [id, question, expected].map(textOf)
  return { id: name, question: asked, expected: answer, picture: isImage ? textOf(picture) : null }
}

/** The JSON value in a file, null without one. */
const readIfThere = (file: string): unknown => (fs.existsSync(file) ? readJsonFile(file, 'ERR_DATA') : null)

/** The JSON object in a file, null without one. */
function readObject(file: string): Json | null {
  const value = readIfThere(file)
  return isObject(value) ? value : null
}

/** A run that has not ended has its options in its checkpoints only. */
function savedOptions(folder: string): Json | null {
  const checkpoints = checkpointFolder(folder)
  for (const step of listCheckpoints(checkpoints)) {
    const manifest = readObject(path.join(checkpoints, `step-${step}`, 'manifest.json'))?.manifest
    if (isObject(manifest) && isObject(manifest.config)) return manifest.config
  }
  return null
}

/**
 * @param folder `out` of a training
 * @throws AlignGPTError ERR_DATA when the folder has no log
 */
export function readRun(folder: string): RunLog {
  const file = path.join(folder, 'log.jsonl')
  if (!fs.existsSync(file)) throw mismatch('ERR_DATA', 'report', folder, "a run's folder with log.jsonl", 'none')
  const text = fs.readFileSync(file, 'utf8').split('\n').filter(Boolean)
  const lines = text.map(parseLine).filter((l) => l !== null)
  const last = lines.at(-1)
  const state = readObject(path.join(folder, 'state.json'))
  // That of an earlier run, or of the part before this one, says nothing about this log.
  const current = state && last && state.steps === (last.step as number) + 1 ? state : null
  return {
    folder,
    phase: String(last?.phase ?? ''),
    wanted: numberOf(last?.steps),
    steps: lines.filter((l) => !isObject(l.evaluation)).map(stepOf),
    evaluations: lines.filter((l) => isObject(l.evaluation)).map(evaluationOf),
    shown: objectsOf(readIfThere(path.join(folder, 'samples.json'))).map(shownOf),
    broken: text.length - lines.length,
    options: isObject(current?.options) ? current.options : savedOptions(folder),
    state: current,
  }
}

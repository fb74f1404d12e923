/** The best model of a run, in `out/best`: kept whenever an evaluation says so, and taken over by a run that goes on elsewhere. */
import fs from 'node:fs'
import path from 'node:path'
import type { Best } from '../evaluation/held-out.js'
import { hasLora } from '../models/adapters.js'
import type { AlignGPTNetwork } from '../models/aligngpt.js'
import { saveAdapter } from '../models/peft.js'
import { saveModel } from '../models/save.js'

export class BestModel {
  readonly #model: AlignGPTNetwork
  readonly #out: string | undefined
  readonly #tell: (text: string) => void

  /** @param out folder of the run; without one nothing is written */
  constructor(model: AlignGPTNetwork, out: string | undefined, tell: (text: string) => void) {
    this.#model = model
    this.#out = out
    this.#tell = tell
  }

  /** Saves the model as the best one, adapters as they are beside it. @returns whether that could be done */
  keep(step: number): boolean {
    if (!this.#out) return true
    const folder = folderIn(this.#out)
    try {
      removeUnfinished(folder)
      saveModel(this.#model, folder)
      if (hasLora(this.#model)) saveAdapter(this.#model, path.join(folder, 'adapter'))
      return true
    } catch (e) {
      this.#tell(`${folder}: the model of step ${step} was not saved: ${(e as Error).message}; training goes on`)
      return false
    }
  }

  /** @param from folder of the run that is continued, where `best` was seen */
  takeOver(from: string, best: Best | null): void {
    if (!best || !this.#out) return
    const [theirs, mine] = [folderIn(from), folderIn(this.#out)]
    if (!fs.existsSync(theirs)) this.#tell(`${theirs} is gone, the best model so far, of step ${best.step}`)
    else if (path.resolve(theirs) !== path.resolve(mine)) copyFolder(theirs, mine)
  }
}

const folderIn = (out: string): string => path.join(out, 'best')

/** What a killed save left beside the files that count. */
function removeUnfinished(folder: string): void {
  const names = fs.existsSync(folder) ? fs.readdirSync(folder) : []
  for (const n of names) if (/\.tmp-\d+-[0-9a-f]+$/.test(n)) fs.rmSync(path.join(folder, n))
}

function copyFolder(from: string, to: string): void {
  const temporary = `${to}.tmp`
  for (const old of [temporary, to]) fs.rmSync(old, { recursive: true, force: true })
  fs.cpSync(from, temporary, { recursive: true })
  fs.renameSync(temporary, to)
}

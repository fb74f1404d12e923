import { defineConfig } from 'vitest/config'
import { BaseSequencer, type TestSpecification } from 'vitest/node'

/** Files run in the order of their names, which is that of the floors of ts/src: a failure low down explains those above. */
class ByName extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    return files.toSorted((a, b) => (a.moduleId < b.moduleId ? -1 : 1))
  }
}

// One fork after the other: the native core uses every core by itself, and each file gets a fresh process.
export default defineConfig({
  // the public entries by their names, as tsconfig.json has them
  resolve: { tsconfigPaths: true },
  test: {
    include: ['ts/test/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    fileParallelism: false,
    sequence: { sequencer: ByName },
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // models go where a test says, else to the CPU, also on a machine with a GPU
    env: { ALIGNGPT_DEVICE: process.env.ALIGNGPT_DEVICE ?? 'cpu' },
  },
})

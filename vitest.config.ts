import { defineConfig } from 'vitest/config'

// One fork after the other: the native core uses every core by itself, and each file gets a fresh process.
export default defineConfig({
  // the public entries by their names, as tsconfig.json has them
  resolve: { tsconfigPaths: true },
  test: {
    include: ['ts/test/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // models go where a test says, else to the CPU, also on a machine with a GPU
    env: { ALIGNGPT_DEVICE: process.env.ALIGNGPT_DEVICE ?? 'cpu' },
  },
})

/** The same package from CommonJS, without `import()`. */
import aligngpt = require('aligngpt')

export const load: typeof aligngpt.AlignGPT.load = aligngpt.AlignGPT.load
// @ts-expect-error no such export
export const missing = aligngpt.Nothing

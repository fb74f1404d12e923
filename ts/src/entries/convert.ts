/** aligngpt/convert: checkpoints of other layouts, and the Hugging Face Hub. */

export { type ExportOptions, exportModel } from '../convert/export.js'
export type { Converted } from '../convert/folder.js'
export { type DownloadManifest, type DownloadOptions, downloadRepo } from '../convert/hub.js'
export { importModel } from '../convert/import.js'
export type { ConvertOptions } from '../convert/tensors.js'
